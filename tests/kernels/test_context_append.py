"""Appending to a context: every implementation writes the reference's rows and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.context_append import reference, tpu
from tests.kernels.races import interpreted, race_found

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-7}
"""Relative to what is written. float32: sums and angles in another program. bfloat16: a sum that
falls on the other side of a rounding border is 2**-7 away."""
SETTINGS = {"eps": 1e-6, "theta": 1e4}
NOWHERE = (np.iinfo(np.int32).max, 3)


class Case(NamedTuple):
    """Sizes, and the (page, place) of every row."""

    cells: tuple[tuple[int, int], ...]
    pages: int = 6
    size: int = 16
    layers: int = 2
    Hk: int = 2
    d: int = 32
    wide: int = 32
    dtype: str = "bfloat16"


def side_by_side(page: int, begin: int, count: int) -> tuple[tuple[int, int], ...]:
    return tuple((page, begin + i) for i in range(count))


# Cases of the same sizes are compiled once.
CASES = {
    "one sequence": Case((*side_by_side(2, 3, 5), *[NOWHERE] * 3)),
    "over a page's border": Case((*side_by_side(4, 13, 3), *side_by_side(1, 0, 4), NOWHERE)),
    "nothing": Case((NOWHERE,) * 8),
    "all over": Case(tuple((5 - i // 2, 15 * (i % 2)) for i in range(8))),
    "out of range": Case(((-1, 2), (6, 2), (3, 16), (3, -1), (3, 15), NOWHERE, (0, 0), (0, 2))),
    "more tiles than slots": Case(
        tuple((i % 6, 8 * (i // 6 % 2) + i // 12) for i in range(24)),
        dtype="float32",
        layers=1,
        d=96,
        wide=128,
    ),
}
SLOW = {
    "one row": Case(((3, 9),), layers=3),
    "whole pages": Case((*side_by_side(1, 0, 16), *side_by_side(2, 0, 16)), Hk=1),
    "contiguous": Case(((0, 47), (1, 48), (0, 30), (1, 0)), pages=2, size=64, dtype="float32"),
}
ALL = [
    *(pytest.param(case, id=name) for name, case in CASES.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]
SPECIFIED = jax.jit(reference.context_append, static_argnames=("eps", "theta"))
KERNEL = jax.jit(tpu.context_append, static_argnames=("eps", "theta", "interpret"))


def arrays(case: Case) -> tuple[Any, ...]:
    """Random arguments."""
    draw = np.random.default_rng(0)
    rows, hidden = len(case.cells), 24

    def normal(*shape: int) -> Any:
        return jnp.asarray(draw.normal(size=shape), case.dtype)

    def contexts() -> tuple[Any, ...]:
        sizes = (case.pages, case.Hk, case.size, case.wide)
        return tuple(normal(*sizes) for _ in range(case.layers))

    page, place = (jnp.asarray(x, jnp.int32) for x in zip(*case.cells, strict=True))
    return (
        normal(rows, hidden),
        normal(hidden, case.layers * 2 * case.Hk * case.d),
        normal(case.layers, case.d),
        jnp.asarray(draw.integers(0, 300, rows), jnp.int32),
        *(page, place, contexts(), contexts()),
    )


def run(given: tuple[Any, ...], kernel: Any = KERNEL) -> Any:
    """The kernel, interpreted."""
    assert tpu.unsupported(*given, **SETTINGS) is None
    return jax.block_until_ready(kernel(*given, **SETTINGS, interpret=interpreted()))


def agrees(case: Case, found: Any, wanted: Any) -> bool:
    """Whether written cells are close, and others the same to the bit."""
    written = np.zeros((case.pages, case.size), bool)
    for page, place in case.cells:
        if 0 <= page < case.pages and 0 <= place < case.size:
            written[page, place] = True
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = (np.moveaxis(np.asarray(x, np.float64), 1, 2) for x in (one, other))
        if not np.array_equal(one[~written], other[~written]):
            return False
        tolerance = TOLERANCE[case.dtype]
        if not np.allclose(one[written], other[written], rtol=tolerance, atol=tolerance):
            return False
    return True


@pytest.mark.parametrize("case", ALL)
def test_the_kernel_agrees_with_the_reference(case: Case):
    given = arrays(case)
    if case.wide > case.d:  # behind the heads there are zeros, which both leave there
        given = (*given[:6], *([x.at[..., case.d :].set(0) for x in c] for c in given[6:]))
        given = (*given[:6], *map(tuple, given[6:]))
    found = run(given)
    assert agrees(case, found, SPECIFIED(*given, **SETTINGS))
    assert not race_found()


@pytest.mark.parametrize("case", ALL)
def test_the_reference_writes_normed_and_rotated_keys(case: Case):
    given = arrays(case)
    hidden, kernel, norm, position = (np.asarray(x, np.float64) for x in given[:4])
    keys, values = ([np.array(x) for x in contexts] for contexts in given[6:])
    both = (hidden @ kernel).reshape(len(hidden), case.layers, 2, case.Hk, case.d)
    half = case.d // 2
    turn = position[:, None] * SETTINGS["theta"] ** (-np.arange(half) / half)
    for r, (page, place) in enumerate(case.cells):
        if not (0 <= page < case.pages and 0 <= place < case.size):
            continue
        for i in range(case.layers):
            key = both[r, i, 0]
            key = key / np.sqrt((key**2).mean(-1, keepdims=True) + SETTINGS["eps"]) * norm[i]
            whole = (key[:, :half] + 1j * key[:, half:]) * np.exp(1j * turn[r])
            keys[i][page, :, place, : case.d] = np.concatenate([whole.real, whole.imag], axis=-1)
            values[i][page, :, place, : case.d] = both[r, i, 1]
    found = SPECIFIED(*given, **SETTINGS)
    # float32 rounds an angle of 300 to 2e-5, and keys are as large as 5. bfloat16 rounds after the
    # product, the norm, its weight and the rotation.
    tolerance = 2e-4 if case.dtype == "float32" else 0.06
    for one, other in zip(jax.tree.leaves(found), [*keys, *values], strict=True):
        pair = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(*pair, rtol=tolerance / 3, atol=tolerance)


def test_a_missing_wait_is_found(monkeypatch: pytest.MonkeyPatch):
    case, given = CASES["all over"], arrays(CASES["all over"])
    monkeypatch.setattr(tpu, "wait", lambda copy: None)
    found = run(given, tpu.context_append)
    assert race_found() or not agrees(case, found, SPECIFIED(*given, **SETTINGS))


def test_rows_of_one_tile_are_one_run():
    page = jnp.asarray([3, 1, 3, 9, 1, 3], jnp.int32)
    place = jnp.asarray([1, 20, 0, 0, 5, 2], jnp.int32)
    runs = tpu.find_runs(page, place, pages=4, size=32, step=16)
    assert runs.total.tolist() == [3]
    begin = runs.begin.tolist()
    assert begin[:4] == [0, 1, 2, 5]
    grouped = [sorted(runs.row.tolist()[begin[t] : begin[t + 1]]) for t in range(3)]
    assert grouped == [[4], [1], [0, 2, 5]]


@pytest.mark.parametrize(
    "changed, said",
    [
        (Case(((0, 0),), d=24, wide=24), "24 numbers"),
        (Case(((0, 0),), size=24), "24 rows"),
        (Case(((0, 0),), dtype="float16"), "float16"),
        (Case(((0, 0),), layers=40, Hk=16), "80 contexts of 16 heads"),
    ],
)
def test_what_the_kernel_refuses_it_names(changed: Case, said: str):
    reason = tpu.unsupported(*arrays(changed), **SETTINGS)
    assert reason is not None and said in reason
