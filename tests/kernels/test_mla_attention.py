"""Latent attention: every implementation gives the reference's numbers, and the reference's law."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels import tiles
from dspark_jax.pallas_kernels.mla_attention import reference, tpu
from tests.kernels.races import interpreted, race_found

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
"""Of outputs of size one. float32: sums in another order. bfloat16: weights are rounded to 2**-8 of
themselves, of other sizes in each tile."""
SCALE = 0.07


class Case(NamedTuple):
    """Sizes; `positions` are those of a sequence's rows, and `tile` what the kernel holds."""

    positions: tuple[tuple[int, ...], ...]
    size: int = 16
    pages: int = 4
    H: int = 4
    p: int = 32
    wide: int = 32
    chosen: float | None = None  # the share of rows that are selected
    dtype: str = "bfloat16"
    tile: int = 32


# 999 is padding. Cases of the same sizes are compiled once.
CASES = {
    "first rows": Case(((0, 1, 2), (999, 999, 999), (5, 999, 999))),
    "odd lengths": Case(((14, 15, 16), (40, 41, 42), (61, 62, 63))),
    "nothing in front": Case(((999, 999, 999), (33, 34, 999), (999, 999, 999))),
    "sparse": Case(((0, 1, 2), (40, 41, 999), (61, 62, 63)), chosen=0.5, dtype="float32"),
    "sparse and rare": Case(
        ((9, 10, 11), (40, 41, 42), (61, 62, 63)), chosen=0.02, dtype="float32"
    ),
    "contiguous, tiles overlap": Case(((77, 78, 79), (63, 64, 65)), size=80, pages=1, wide=64),
}
SLOW = {
    "one row of one request": Case(((20,),)),
    "float32": Case(((14, 15, 16, 17), (40, 41, 42, 999)), size=8, dtype="float32"),
    "contiguous": Case(((1, 31), (32, 63)), size=64, pages=1, dtype="float32"),
    "sparse tiles overlap": Case(((77, 78), (79, 999)), size=80, pages=1, chosen=0.2),
    "sparse pages of bfloat16": Case(((77, 78), (79, 999)), pages=5, chosen=0.1),
    "heads of several products": Case(((50, 51, 52),), H=65, chosen=0.5),
    "several products of slots": Case((tuple(range(30, 34)),), H=50, p=64, wide=128),
}
ALL = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]
SPECIFIED = jax.jit(reference.mla_attention, static_argnames="scale")
KERNEL = jax.jit(tpu.mla_attention, static_argnames=("scale", "interpret"))


def arrays(case: Case) -> tuple[Any, ...]:
    """Random arguments; page 0 belongs to nobody, and sequences own the others in any order."""
    draw = np.random.default_rng(0)
    B, S, r = len(case.positions), len(case.positions[0]), 128
    total, capacity = 1 + B * case.pages, case.pages * case.size

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape), case.dtype)

    latent, rope = normal(B, S, case.H, r), normal(B, S, case.H, case.p)
    turned = jnp.pad(normal(total, case.size, case.p), ((0, 0), (0, 0), (0, case.wide - case.p)))
    pages = draw.permutation(np.arange(1, total)).reshape(B, case.pages)
    given = (latent, rope, normal(total, case.size, r), turned, jnp.asarray(pages, jnp.int32))
    given = (*given, jnp.asarray(case.positions, jnp.int32))
    if case.chosen is None:
        return given
    return (*given, jnp.asarray(draw.uniform(size=(B, S, capacity)) < case.chosen))


def run(given: tuple[Any, ...], kernel: Any = KERNEL) -> Any:
    """The kernel, interpreted."""
    assert tpu.unsupported(*given, scale=SCALE) is None
    return jax.block_until_ready(kernel(*given, scale=SCALE, interpret=interpreted()))


def agrees(case: Case, found: Any, wanted: Any) -> bool:
    pair = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.allclose(*pair, rtol=0, atol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", ALL)
def test_the_kernel_agrees_with_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    given = arrays(case)
    found, wanted = run(given), SPECIFIED(*given, scale=SCALE)
    assert found.dtype == wanted.dtype == jnp.float32
    assert agrees(case, found, wanted)
    assert not race_found()


@pytest.mark.parametrize("case", ALL)
def test_the_reference_is_softmax_over_what_is_seen(case: Case):
    given = arrays(case)
    latent, rope, latents, ropes = (np.asarray(x, np.float64) for x in given[:4])
    pages, capacity = np.asarray(given[4]), case.pages * case.size
    wanted = np.zeros(latent.shape)
    for b, s in np.ndindex(latent.shape[:2]):
        position = case.positions[b][s]
        seen = (np.arange(capacity) <= position) & (position < capacity)
        if case.chosen is not None:
            seen &= np.asarray(given[6])[b, s]
        rows = latents[pages[b]].reshape(capacity, -1)[seen]
        turned = ropes[pages[b]].reshape(capacity, -1)[seen, : case.p]
        if len(rows):
            weight = np.exp((latent[b, s] @ rows.T + rope[b, s] @ turned.T) * SCALE)
            wanted[b, s] = weight @ rows / weight.sum(axis=1, keepdims=True)
    assert agrees(case, SPECIFIED(*given, scale=SCALE), wanted)


@pytest.mark.parametrize("tile", [16, 64])
def test_the_reference_does_not_depend_on_its_tile(tile: int, monkeypatch: pytest.MonkeyPatch):
    case = CASES["sparse"]
    given = arrays(case)
    whole = SPECIFIED(*given, scale=SCALE)
    monkeypatch.setattr(reference, "TILE", tile)
    assert agrees(case, reference.mla_attention(*given, scale=SCALE), whole)


@pytest.mark.parametrize("name", ["odd lengths", "sparse"])
def test_rows_beyond_the_last_position_may_be_anything(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    given = arrays(case)
    wanted = SPECIFIED(*given, scale=SCALE)
    written = np.zeros(given[2].shape[:2], bool)
    for pages, positions in zip(np.asarray(given[4]), case.positions, strict=True):
        for c in range(max(x for x in positions if x != 999) + 1):
            written[pages[c // case.size], c % case.size] = True
    broken = [jnp.where(written[:, :, None], x, jnp.nan) for x in given[2:4]]
    assert agrees(case, run((*given[:2], *broken, *given[4:])), wanted)


PROMPTS = {
    "dense": Case((tuple(range(7)), (40, 41, 42, 43, 44, 999, 999)), dtype="float32"),
    "sparse": Case(
        (tuple(range(57, 64)), (5, *(999,) * 6)), chosen=0.05, dtype="float32", size=32, pages=2
    ),
}
"""Rows of 4 heads, padded to 8, of which a program holds 16: four programs, the last half empty."""


@pytest.mark.parametrize("name", PROMPTS)
def test_queries_of_several_programs_agree_with_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    case = PROMPTS[name]
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    monkeypatch.setattr(tpu, "QUERY_ROWS", 16)
    given = arrays(case)
    assert tpu.slots_of(7, case.H, case.dtype) == 2
    found = run(given, jax.jit(tpu.mla_attention, static_argnames=("scale", "interpret")))
    assert agrees(case, found, SPECIFIED(*given, scale=SCALE))
    assert not race_found()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("H", [1, 4, 8, 12, 16, 20, 24, 40, 64, 65, 128, 200, 1000, 1024])
def test_programs_share_the_queries_out(H: int, dtype: str):
    """In products that are not small, whatever number of queries there is; primes are cut well."""
    for S in range(1, 530):
        slots = tpu.slots_of(S, H, dtype)
        heads, together = tpu.grouping(slots, H, dtype)
        programs = -(-S // slots)
        assert slots * heads <= max(tpu.QUERY_ROWS, heads), S
        assert slots % together == 0 and together * heads <= max(tpu.PRODUCT_ROWS, heads), S
        assert 4 * together * heads > min(tpu.PRODUCT_ROWS, S * heads), S
        assert (programs - 1) * slots < S, "a program has no query"


@pytest.mark.parametrize("sparse", [False, True])
def test_a_program_walks_over_no_more_than_its_own_rows_see(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
):
    """Rows that only the second program sees are no numbers: a weight of zero hides none."""
    case = Case(((0, 1, 62, 63),), dtype="float32", chosen=0.9 if sparse else None)
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    monkeypatch.setattr(tpu, "QUERY_ROWS", 16)
    given = arrays(case)
    wanted = SPECIFIED(*given, scale=SCALE)
    late = np.asarray(given[4])[0, 2:]
    broken = [x.at[late].set(jnp.nan) for x in given[2:4]]
    spoilt = (*given[:2], *broken, *given[4:])
    found = run(spoilt, jax.jit(tpu.mla_attention, static_argnames=("scale", "interpret")))
    assert agrees(case, found[:, :2], wanted[:, :2])
    assert bool(jnp.all(jnp.isnan(found[:, 2:])))


def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch):
    case = CASES["odd lengths"]
    monkeypatch.setattr(tiles, "TILE_ROWS", case.tile)
    monkeypatch.setattr(tiles, "wait", lambda copy: None)
    given = arrays(case)
    found = run(given, tpu.mla_attention)
    assert race_found() or not agrees(case, found, SPECIFIED(*given, scale=SCALE))


def test_tiles_of_which_nothing_is_selected_are_not_visited():
    layout = tiles.Layout(pages=4, size=16, tile=32)
    selected = np.zeros((2, 1, 64), bool)
    selected[0, 0, [3, 40]] = selected[1, 0, 63] = True
    cut, order, count = tpu.chosen_tiles(
        layout, jnp.asarray(selected), jnp.asarray([[50], [63]], jnp.int32)
    )
    assert cut.shape == (2, 2, 1, 32) and int(cut.sum()) == 3
    assert count.tolist() == [2, 1]
    assert order[0].tolist() == [0, 1] and order[1, 0] == 1


@pytest.mark.parametrize(
    "changed, said",
    [
        (Case(((3,),), p=24, wide=24), "24 rotated"),
        (Case(((3,),), size=24), "24 rows"),
        (Case(((3,),), dtype="float16"), "float16"),
        (Case(((3,),), H=1025), "1025 heads"),
    ],
)
def test_what_the_kernel_refuses_it_names(changed: Case, said: str):
    reason = tpu.unsupported(*arrays(changed), scale=SCALE)
    assert reason is not None and said in reason
