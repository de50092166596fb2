"""Block attention: every implementation gives the reference's numbers, and the reference's law."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels import tiles
from dspark_jax.pallas_kernels.block_attention import reference, tpu
from tests.kernels.races import interpreted, race_found

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
"""Of outputs of size one. float32: sums in another order. bfloat16: the reference rounds weights
after their division and the kernel before it, which is one unit of 2**-8 in each of them, and
rounds the result to 2**-8 of itself."""


class Case(NamedTuple):
    """Sizes; `lengths` gives B, and `tile` what the kernel may hold at a time."""

    lengths: tuple[int, ...]
    size: int = 16
    pages: int = 4
    K: int = 7
    shared: int = 2
    ratio: int = 2
    d: int = 32
    window: int | None = None
    causal: bool = False
    dtype: str = "bfloat16"
    tile: int = 32
    wide: int | None = None  # of the context's rows, if more than d


# Cases of the same sizes are compiled once.
CASES = {
    "no context": Case((0, 0, 0, 0)),
    "odd lengths": Case((1, 33, 0, 64)),
    "full pages": Case((16, 32, 48, 64)),
    "empty in front and behind": Case((0, 0, 20, 0)),
    "window": Case((64, 21, 15, 3), window=16, causal=True, dtype="float32"),
    "window of whole pages": Case((16, 32, 33, 48), window=16, causal=True, dtype="float32"),
    "one request": Case((40,), ratio=8, shared=1, K=5),
    "head of 96": Case((40, 63), d=96, wide=128, K=8, ratio=1, causal=True),
    "contiguous, tiles overlap": Case((80, 79, 65, 0), size=80, pages=1, window=70),
    "pages of several tiles": Case((160, 81, 80), size=80, pages=2, dtype="float32"),
}
SLOW = {
    "head of 96 in narrow rows": Case((40, 63), d=96, K=8),
    "a page is a tile": Case((5, 40), size=32),
    "small pages": Case((3, 30), size=8, pages=5, dtype="float32"),
    "causal": Case((19, 64), causal=True, ratio=4, shared=1),
    "window of a row": Case((33, 32), window=1, causal=True),
    "window beyond the context": Case((33, 64), window=100),
    "window at a tile's edge": Case((64, 32), window=32, causal=True),
    "three heads share": Case((40,), ratio=3, causal=True),
    "one slot": Case((40, 7), K=1),
    "head of 128": Case((40, 63), d=128, dtype="float32"),
    "contiguous": Case((0, 64, 63, 32), size=64, pages=1),
    "contiguous float32": Case((80, 9), size=80, pages=1, dtype="float32", causal=True),
    "a tile does not divide the pages": Case((144, 47), pages=9, tile=48),
}
ALL = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]
STATIC = ("window", "causal", "interpret")
SPECIFIED = jax.jit(reference.block_attention, static_argnames=STATIC[:2])
KERNEL = jax.jit(tpu.block_attention, static_argnames=STATIC)


def arrays(case: Case) -> tuple[Any, ...]:
    """Random arguments; page 0 belongs to nobody, and sequences own the others in any order."""
    draw = np.random.default_rng(0)
    B, total = len(case.lengths), 1 + len(case.lengths) * case.pages

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape), case.dtype)

    query = normal(B, case.K, case.shared * case.ratio, case.d)
    key, value = (normal(B, case.K, case.shared, case.d) for _ in "kv")
    context = [normal(total, case.shared, case.size, case.d) for _ in "kv"]
    if case.wide is not None:
        behind = ((0, 0), (0, 0), (0, 0), (0, case.wide - case.d))
        context = [jnp.pad(x, behind) for x in context]
    pages = draw.permutation(np.arange(1, total)).reshape(B, case.pages)
    # What a sequence does not reach is page 0, as the server's table has it.
    used = np.arange(case.pages) * case.size < np.asarray(case.lengths)[:, None]
    pages = jnp.asarray(np.where(used, pages, 0), jnp.int32)
    return query, key, value, *context, pages, jnp.asarray(case.lengths, jnp.int32)


def run(case: Case, given: tuple[Any, ...], kernel: Any = KERNEL) -> Any:
    """The kernel, interpreted."""
    settings = {"window": case.window, "causal": case.causal}
    assert tpu.unsupported(*given, **settings) is None
    return jax.block_until_ready(kernel(*given, **settings, interpret=interpreted()))


def specified(case: Case, given: tuple[Any, ...]) -> Any:
    return SPECIFIED(*given, window=case.window, causal=case.causal)


def agrees(case: Case, found: Any, wanted: Any) -> bool:
    pair = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.allclose(*pair, rtol=0, atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", ALL)
def test_the_kernel_agrees_with_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    given = arrays(case)
    found, wanted = run(case, given), specified(case, given)
    assert found.dtype == wanted.dtype
    assert agrees(case, found, wanted)
    assert not race_found()


@pytest.mark.parametrize("case", ALL)
def test_the_reference_is_softmax_over_what_is_seen(case: Case):
    given = arrays(case)
    query, key, value, context_key, context_value, pages = (
        np.asarray(x, np.float64 if x.dtype != jnp.int32 else None) for x in given[:-1]
    )
    wanted = np.zeros(query.shape)
    for b, k, h in np.ndindex(query.shape[:3]):
        shared, length = h // case.ratio, case.lengths[b]
        first = 0 if case.window is None else max(length - case.window, 0)
        rows = [(pages[b, c // case.size], shared, c % case.size) for c in range(first, length)]
        own = slice(None, k + 1 if case.causal else None)
        keys = [*(context_key[row][: case.d] for row in rows), *key[b, own, shared]]
        values = [*(context_value[row][: case.d] for row in rows), *value[b, own, shared]]
        weight = np.exp(np.stack(keys) @ query[b, k, h] * case.d**-0.5)
        wanted[b, k, h] = weight @ np.stack(values) / weight.sum()
    assert agrees(case, specified(case, given), wanted)


def test_rows_that_are_not_seen_may_be_anything(monkeypatch: pytest.MonkeyPatch):
    case = CASES["window"]
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    query, key, value, *context, pages, length = arrays(case)
    clean = specified(case, (query, key, value, *context, pages, length))
    seen = np.zeros((context[0].shape[0], case.size), bool)
    for b, rows in enumerate(case.lengths):
        for c in range(max(rows - 16, 0), rows):
            seen[pages[b, c // case.size], c % case.size] = True
    context = [jnp.where(seen[:, None, :, None], x, jnp.nan) for x in context]
    assert agrees(case, run(case, (query, key, value, *context, pages, length)), clean)


def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch):
    case = CASES["odd lengths"]
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    monkeypatch.setattr(tiles, "wait", lambda copy: None)
    given = arrays(case)
    found = run(case, given, tpu.block_attention)
    assert race_found() or not agrees(case, found, specified(case, given))


@pytest.mark.parametrize(
    "changed, said",
    [
        (Case((3,), d=40), "heads of 40"),
        (Case((3,), size=24), "24 rows"),
        (Case((3,), size=12, dtype="float32"), "12 rows"),
        (Case((3,), dtype="float16"), "float16"),
        (Case((3,), window=0), "window of 0"),
    ],
)
def test_what_the_kernel_refuses_it_names(changed: Case, said: str):
    reason = tpu.unsupported(*arrays(changed), window=changed.window, causal=False)
    assert reason is not None and said in reason
