"""Products with FP8 matrices on (interpreted) GPUs: the shapes and tolerance of the other kernels.

Shapes are those of test_fp8_matmul.py, with rows in bfloat16 throughout, the only type that the
GPU kernels take; what they refuse of the shapes is listed here. Tolerance: the one explained there,
√n + 8 half units (2^-24) of the sum of magnitudes, since every block's product is exact here too
and summed in float32, and half a unit in the last place of bfloat16, 2^-8 of the result at most.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.fp8_matmul import gpu
from dspark_jax.pallas_kernels.gpu_target import plgpu
from tests.kernels.gpu_interpreter import ARCHITECTURES, needs_interpreter, run
from tests.kernels.test_fp8_matmul import BLOCK, CASES, OPERATIONS, Case, arguments, exact

pytestmark = needs_interpreter

REFUSED = {(200, 72), (384, 130)}
"""Sizes that are no multiples of half a block, of which no published checkpoint has any."""
MORE = [
    Case(5, 576, 576, 2, jnp.bfloat16),  # cut short both ways
    Case(70, 640, 128, 0, jnp.bfloat16),  # two tiles of rows and two parts of the sum
    Case(1, 1152, 64, 0, jnp.bfloat16),  # three parts, the last of one block; half a tile
]
ALL = [case._replace(dtype=jnp.bfloat16) for case in CASES] + MORE
RUN = [case for case in ALL if (case.size_in, case.size_out) not in REFUSED]
QUICK = {(1, 128), (8, 256), (5, 576), (70, 640)}
"""Rows and inputs of those that take a second or two; each with one of the operations."""


def each() -> list[Any]:
    """(case, operation), most of them slow: an interpreter takes its time."""
    found = []
    for i, case in enumerate(RUN):
        for operation in OPERATIONS:
            quick = case[:2] in QUICK and operation == OPERATIONS[i % 2]
            name = f"{'x'.join(map(str, case[:3]))}-{operation}"
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(case, operation, id=name, marks=marks))
    return found


def off_by(y: Any, truth: Any, magnitude: Any, size_in: int) -> float:
    """The largest error, in units of what is allowed."""
    allowed = 2.0**-24 * (np.sqrt(size_in) + 8) * magnitude + 2.0**-8 * np.abs(truth)
    return float(np.max(np.abs(np.asarray(y, np.float64) - truth) / allowed))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("case", "operation"), each())
def test_a_product_is_the_sum_of_scaled_blocks(case: Case, arch: str, operation: str):
    given = arguments(case)
    assert gpu.unsupported(*given, block=BLOCK) is None
    y, fault = run(getattr(gpu, operation), *given, block=BLOCK, arch=arch)
    truth, magnitude, _ = exact(operation, *given)
    assert not fault and y.dtype == case.dtype and y.shape == truth.shape
    assert off_by(y, truth, magnitude, case.size_in) <= 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_row_ignores_its_neighbours(arch: str):
    x, *rest = arguments(Case(5, 128, 64, 0, jnp.bfloat16))
    others = x.at[jnp.array([0, 1, 3, 4])].set(jnp.nan)
    (alone, _), (among, _) = (
        run(gpu.fp8_matmul_w8a8, rows, *rest, block=BLOCK, arch=arch) for rows in (x, others)
    )
    assert np.array_equal(alone[2], among[2])


def test_what_cannot_be_run_is_said():
    for case in ALL:
        if (case.size_in, case.size_out) in REFUSED:
            assert gpu.unsupported(*arguments(case), block=BLOCK)
    x, values, scales, layer = arguments(MORE[0])
    for wrong in (
        gpu.unsupported(x, values, scales, layer, block=(128, 64)),
        gpu.unsupported(x.astype(jnp.float32), values, scales, layer, block=BLOCK),
        gpu.unsupported(x, values.astype(jnp.bfloat16), scales, layer, block=BLOCK),
        gpu.unsupported(x, values, scales, block=BLOCK),
        gpu.unsupported(x[:0], values, scales, layer, block=BLOCK),
    ):
        assert wrong is not None and wrong.endswith(".")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("forgotten", "case"),
    [("barrier_wait", RUN[0]), ("commit_smem", Case(64, 384, 128, 0, jnp.bfloat16))],
    ids=["an arrival", "a commit"],
)
def test_what_is_not_waited_for_is_noticed(
    forgotten: str, case: Case, arch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    _, fault = run(gpu.fp8_matmul, *arguments(case), block=BLOCK, arch=arch)
    assert fault
