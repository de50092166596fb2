"""Every product with one FP8 matrix against the definition in float64, over the same odd shapes.

Tolerance: float32 sums of n terms in any order are off by about √n half units (2^-24) of the sum of
magnitudes; allowed is √n + 8 of them, and where the result is bfloat16 its own rounding, 2^-8 of
it, besides. Beyond 1,024 rows the reference rounds the matrix to x's type first: up to 2^-8 of
every term, of which the root of the sum of squares is allowed three times over.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import fp8
from dspark_jax.fp8 import BlockScaled
from dspark_jax.pallas_kernels.fp8_matmul import reference, tpu
from tests.kernels.races import interpreted, race_found

BLOCK = (128, 128)
OPERATIONS = ("fp8_matmul", "fp8_matmul_w8a8")


class Case(NamedTuple):
    """Rows, sizes, how many matrices are stacked (0: one, not stacked), x's type."""

    R: int
    size_in: int
    size_out: int
    stack: int
    dtype: Any


CASES = [
    Case(1, 128, 128, 0, jnp.float32),
    Case(3, 200, 72, 0, jnp.float32),  # cut short both ways, in less than a block
    Case(8, 256, 576, 2, jnp.bfloat16),  # four and a half blocks of columns
    Case(64, 384, 130, 3, jnp.bfloat16),
    Case(5, 2304, 256, 0, jnp.bfloat16),  # a sum in two tiles
    Case(4, 2432, 64, 2, jnp.float32),  # 19 blocks: the second tile reaches beyond the matrix
    Case(7, 128, 1216, 2, jnp.float32),  # two tiles of columns
    Case(530, 128, 256, 0, jnp.bfloat16),  # two tiles of rows, the second cut short
    Case(1030, 256, 128, 0, jnp.bfloat16),  # a long prompt
]
IMPLEMENTATIONS = ("reference", "tpu")


def implementation(name: str, operation: str) -> Callable[..., Any]:
    if name == "reference":
        return jax.jit(getattr(reference, operation), static_argnames="block")

    def interpreted_kernel(*arguments: Any, **settings: Any) -> Any:
        y = getattr(tpu, operation)(*arguments, **settings, interpret=interpreted())
        jax.block_until_ready(y)
        assert not race_found()
        return y

    return interpreted_kernel


@functools.cache
def arguments(case: Case) -> tuple[Any, ...]:
    """(x, values, scales, layer) with numbers of every magnitude that a block might hold."""
    rng = np.random.default_rng(0)
    lead = (case.stack,) if case.stack else ()

    def draw(*shape: int) -> jax.Array:
        wide = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
        return jnp.asarray(wide, jnp.float32)

    kernel = fp8.quantise(draw(*lead, case.size_in, case.size_out), BLOCK)
    layer = jnp.int32(case.stack - 1) if case.stack else None
    x = draw(case.R, case.size_in).astype(case.dtype)
    return x, kernel.values, kernel.scales, layer


def exact(operation: str, x: Any, values: Any, scales: Any, layer: Any) -> tuple[Any, Any, Any]:
    """In float64: the product, its terms' magnitudes, and the root of their sum of squares."""
    own = BlockScaled(values, scales, BLOCK, layer)
    w = np.asarray(fp8.dequantise(own, jnp.float32), np.float64)
    if operation == "fp8_matmul_w8a8":
        x = fp8.dequantise(fp8.quantise_activations(x), jnp.float32)
    wide = np.asarray(x, np.float64)
    return wide @ w, np.abs(wide) @ np.abs(w), np.sqrt(wide**2 @ w**2)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[:3])))
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_product_is_the_sum_of_scaled_blocks(name: str, case: Case, operation: str):
    given = arguments(case)
    y = implementation(name, operation)(*given, block=BLOCK)
    truth, magnitude, root = exact(operation, *given)
    assert y.dtype == case.dtype and y.shape == truth.shape
    allowed = 2.0**-24 * (np.sqrt(case.size_in) + 8) * magnitude
    if case.dtype == jnp.bfloat16:
        allowed += 2.0**-8 * np.abs(truth)
        if name == "reference" and operation == "fp8_matmul" and case.R > reference.FEW_ROWS:
            allowed += 3 * 2.0**-8 * root
    assert np.all(np.abs(np.asarray(y, np.float64) - truth) <= allowed)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_number_there_is_is_multiplied_as_itself(name: str):
    code = np.arange(128 * 128, dtype=np.uint8).reshape(128, 128)
    code[(code & 0x7F) == 0x7F] = 0x80  # NaN; this is -0
    values = jax.lax.bitcast_convert_type(jnp.asarray(code), jnp.float8_e4m3fn)
    x, scales = jnp.eye(128, dtype=jnp.bfloat16), jnp.full((1, 1), 0.5)
    y = implementation(name, "fp8_matmul")(x, values, scales, block=BLOCK)
    assert np.array_equal(y, values.astype(jnp.float32) / 2)


@pytest.mark.parametrize("case", CASES[1::3], ids=lambda case: "x".join(map(str, case[:3])))
def test_the_reference_computes_what_the_core_does_to_the_last_bit(case: Case):
    x, values, scales, layer = arguments(case)
    kernel = BlockScaled(values, scales, BLOCK, layer)
    for ours, core in (
        (reference.fp8_matmul, fp8.matmul),
        (reference.fp8_matmul_w8a8, fp8.matmul_w8a8),
    ):
        assert np.array_equal(ours(x, values, scales, layer, block=BLOCK), core(x, kernel))


def test_a_row_ignores_its_neighbours():
    x, *rest = arguments(Case(6, 256, 200, 0, jnp.float32))
    others = x.at[jnp.array([0, 1, 3, 4, 5])].set(jnp.nan)
    for operation in OPERATIONS:
        run = implementation("tpu", operation)
        assert np.array_equal(run(x, *rest, block=BLOCK)[2], run(others, *rest, block=BLOCK)[2])


def test_what_cannot_be_run_is_said():
    x, values, scales, layer = arguments(CASES[2])
    assert tpu.unsupported(x, values, scales, layer, block=BLOCK) is None
    for wrong in (
        tpu.unsupported(x, values, scales, layer, block=(128, 64)),
        tpu.unsupported(x.astype(jnp.float16), values, scales, layer, block=BLOCK),
        tpu.unsupported(x, values.astype(jnp.bfloat16), scales, layer, block=BLOCK),
        tpu.unsupported(x, values, scales, block=BLOCK),
        tpu.unsupported(x[:0], values, scales, layer, block=BLOCK),
    ):
        assert wrong is not None and wrong.endswith(".")


def test_a_total_that_is_not_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "clear", lambda total: None)
    given = arguments(CASES[0])
    y = tpu.fp8_matmul(*given, block=BLOCK, interpret=interpreted())
    truth, magnitude, _ = exact("fp8_matmul", *given)
    assert not np.all(np.abs(np.asarray(y, np.float64) - truth) <= 1e-5 * magnitude)


def test_cores_that_share_a_sum_are_a_race(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel",) * 3)
    two = interpreted(num_cores_or_threads=2)
    y = tpu.fp8_matmul(*arguments(CASES[4]), block=BLOCK, interpret=two)
    jax.block_until_ready(y)
    assert race_found()
