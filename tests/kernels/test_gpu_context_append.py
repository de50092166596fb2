"""Appending to a context on (interpreted) GPUs: shapes, data and tolerance of the other kernels.

Beside them more rows than a tile has. Tolerance: the one explained in test_context_append.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.context_append import gpu
from dspark_jax.pallas_kernels.gpu_target import plgpu
from tests.kernels.gpu_interpreter import needs_interpreter, run
from tests.kernels.test_context_append import (
    ALL,
    CASES,
    SETTINGS,
    SPECIFIED,
    Case,
    agrees,
    arrays,
    side_by_side,
)

pytestmark = needs_interpreter

TILES = Case(tuple(cell for page in (4, 0, 5, 1, 3) for cell in side_by_side(page, 1, 14)), Hk=1)
"""One tile of rows and six rows of the next."""
# Compiled as the reference is: angles of programs that round otherwise are further apart.
KERNEL = jax.jit(gpu.context_append, static_argnames=("eps", "theta", "interpret"))


@pytest.mark.parametrize(
    "case", [*ALL, pytest.param(TILES, id="two tiles of rows", marks=pytest.mark.slow)]
)
def test_the_kernel_agrees_with_the_reference(case: Case):
    given = arrays(case)  # what lies behind a head is anything, and stays
    assert gpu.unsupported(*given, **SETTINGS) is None
    found, fault = run(KERNEL, *given, **SETTINGS)
    assert not fault and agrees(case, found, SPECIFIED(*given, **SETTINGS))


def test_no_rows_are_no_change():
    given = arrays(CASES["nothing"])
    keys, values = gpu.context_append(
        *(x[:0] if i in (0, 3, 4, 5) else x for i, x in enumerate(given)), **SETTINGS,
        arch="sm_90a",
    )  # fmt: skip
    assert keys is given[6] and values is given[7]


def test_a_row_ignores_its_neighbours():
    case = CASES["one sequence"]
    hidden, *rest = arrays(case)
    found, _ = run(gpu.context_append, hidden, *rest, **SETTINGS)
    other, _ = run(gpu.context_append, hidden.at[1:].set(jnp.nan), *rest, **SETTINGS)
    (page, place), *_ = case.cells
    for one, two in zip(found[0] + found[1], other[0] + other[1], strict=True):
        assert np.array_equal(one[page, :, place], two[page, :, place])


@pytest.mark.parametrize("forgotten", ["barrier_wait", "commit_smem"])
def test_what_is_not_waited_for_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    _, fault = run(gpu.context_append, *arrays(CASES["all over"]), **SETTINGS)
    assert fault


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (Case(((0, 0),), d=24, wide=24), "24 numbers"),
        (Case(((0, 0),), d=272, wide=272), "272 numbers"),
        (Case(((0, 0),), wide=36), "36 wide"),
        (Case(((0, 0),), dtype="float16"), "float16"),
    ],
)
def test_what_the_kernel_refuses_it_names(changed: Case, said: str):
    reason: Any = gpu.unsupported(*arrays(changed), **SETTINGS)
    assert reason is not None and said in reason and reason.endswith(".")
