"""Products of rows with their experts on (interpreted) GPUs: shapes and tolerance of the others.

Shapes are those of test_fp8_experts.py with rows in bfloat16, the only type that the GPU kernels
take; sizes that are no multiples of half a block are refused. Tolerance: the one explained there.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.fp8_experts import gpu
from dspark_jax.pallas_kernels.gpu_target import plgpu
from tests.kernels.gpu_interpreter import ARCHITECTURES, needs_interpreter, run
from tests.kernels.test_fp8_experts import BLOCK, CASES, Case, arguments, exact, named

pytestmark = needs_interpreter

ALL = [case._replace(dtype=jnp.bfloat16) for case in CASES]
MORE = Case((3, 0, 20, 1), 2, 576, 192, 2, jnp.bfloat16)  # two tiles of one expert; cut short
RUN = [case for case in ALL if not case.size_in % 64 and not case.size_out % 64] + [MORE]
QUICK = (CASES[0].sizes, CASES[1].sizes, CASES[2].sizes)


def each() -> list[Any]:
    return [
        pytest.param(case, id=named(case), marks=() if case.sizes in QUICK else pytest.mark.slow)
        for case in RUN
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", each())
def test_every_row_meets_its_expert(case: Case, arch: str):
    given = arguments(case)
    assert gpu.unsupported(*given, block=BLOCK) is None
    y, fault = run(gpu.fp8_experts, *given, block=BLOCK, arch=arch)
    truth, magnitude, _ = exact(case)
    assert not fault and y.dtype == jnp.float32
    assert y.shape == (len(truth) + case.idle, case.size_out)
    allowed = 2.0**-24 * (np.sqrt(case.size_in) + 8) * magnitude
    assert np.all(np.abs(np.asarray(y[: len(truth)], np.float64) - truth) <= allowed)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_expert_without_rows_is_not_read(arch: str):
    case = ALL[1]
    x, values, scales, sizes, layer = arguments(case)
    unread = jnp.asarray(case.sizes)[:, None, None] == 0
    nowhere = jnp.where(unread, jnp.nan, values.astype(jnp.float32)).astype(values.dtype)
    y, _ = run(gpu.fp8_experts, x, nowhere, scales, sizes, layer, block=BLOCK, arch=arch)
    assert np.all(np.isfinite(y[: sum(case.sizes)]))


def test_every_expert_has_tiles_of_its_own():
    place, expert = gpu.places(jnp.array([3, 0, 20, 1]), 26, 16, 5)
    assert np.array_equal(expert, [0, 2, 2, 3, 4])
    assert np.array_equal(place, [0, 1, 2, *range(16, 36), 48, 80, 80])


def test_what_cannot_be_run_is_said():
    x, values, scales, sizes, layer = arguments(ALL[1])
    for case in ALL:
        if case not in RUN:
            assert gpu.unsupported(*arguments(case), block=BLOCK)
    for wrong in (
        gpu.unsupported(x, values, scales, sizes[:-1], layer, block=BLOCK),
        gpu.unsupported(x, values, scales, sizes, jnp.int32(0), block=BLOCK),
        gpu.unsupported(x.astype(jnp.float32), values, scales, sizes, layer, block=BLOCK),
        gpu.unsupported(x, values, scales, sizes, layer, block=(64, 128)),
    ):
        assert wrong is not None and wrong.endswith(".")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_not_waited_for_is_noticed(arch: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plgpu, "barrier_wait", lambda *_: None)
    _, fault = run(gpu.fp8_experts, *arguments(ALL[0]), block=BLOCK, arch=arch)
    assert fault
