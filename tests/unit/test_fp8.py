"""Block-scaled FP8 matrices: what is left of a number, and that they stand where an array may."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.fp8 import (
    LARGEST,
    Block,
    BlockScaled,
    dequantise,
    matmul,
    matmul_w8a8,
    quantise,
    quantise_activations,
    saturate,
)

pytestmark = pytest.mark.optimised

CASES = st.sampled_from(
    [((8, 12), (4, 4)), ((7, 13), (3, 5)), ((7, 13), (1, 8)), ((7, 13), (20, 20)), ((5, 1), (1, 1))]
)
"""Shapes with blocks that fit, are cut short, are rows, exceed the matrix, are numbers."""
SEEDS = st.integers(0, 2**31 - 1)
SOME = settings(max_examples=25, deadline=None)


def draw(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers of every magnitude that a block might hold together."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(4 * rng.standard_normal(shape))).astype(np.float32)


def quantised(shape: tuple[int, ...], block: Block, seed: int = 0) -> BlockScaled:
    return quantise(jnp.asarray(draw(shape, seed)), block)


def elementwise(scaled: BlockScaled) -> np.ndarray:
    """The matrix by the definition, one element after another."""
    values, scales = np.asarray(scaled.values, np.float32), np.asarray(scaled.scales)
    (rows, columns), whole = scaled.block, np.empty(scaled.shape, np.float32)
    for place in np.ndindex(*scaled.shape):
        *lead, i, o = place
        whole[place] = values[place] * scales[(*lead, i // rows, o // columns)]
    return whole


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@SOME
@given(case=CASES, seed=SEEDS)
def test_a_matrix_is_its_values_times_the_scales_of_their_blocks(case, seed):
    shape, block = case
    scaled = quantised(shape, block, seed)
    assert scaled.values.dtype == jnp.float8_e4m3fn and scaled.scales.dtype == jnp.float32
    assert scaled.scales.shape == tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    assert np.array_equal(dequantise(scaled, jnp.float32), elementwise(scaled))


@SOME
@given(case=CASES, seed=SEEDS)
def test_a_round_trip_loses_at_most_half_a_step_of_e4m3(case, seed):
    shape, block = case
    x = draw(shape, seed)
    scaled = quantise(jnp.asarray(x), block)
    units = BlockScaled(jnp.ones(shape), scaled.scales, block)
    # Steps are 1/8 of the binade, or 2^-9 below its smallest normal number.
    half = np.maximum(np.abs(x) / 16, dequantise(units, jnp.float32) / 1024)
    error = np.abs(np.asarray(dequantise(scaled, jnp.float32), float) - x)
    assert np.all(error <= half * (1 + 1e-6))


@SOME
@given(case=CASES, seed=SEEDS)
def test_every_block_is_quantised_as_if_alone(case, seed):
    shape, block = case
    x, (rows, columns) = draw(shape, seed), block
    scaled = quantise(jnp.asarray(x), block)
    back = elementwise(scaled)
    for i, o in np.ndindex(*scaled.scales.shape):
        part = slice(i * rows, (i + 1) * rows), slice(o * columns, (o + 1) * columns)
        alone = np.abs(x[part]).max()
        np.testing.assert_allclose(scaled.scales[i, o], alone / LARGEST, rtol=2e-7)
        assert np.abs(np.asarray(scaled.values[part], np.float32)).max() == LARGEST
        np.testing.assert_allclose(np.abs(back[part]).max(), alone, rtol=3e-7)


def test_a_block_of_zeros_has_a_scale_that_is_not_zero():
    scaled = quantise(jnp.zeros((4, 6)), (4, 3))
    assert np.all(np.asarray(scaled.scales) > 0)
    assert not np.any(dequantise(scaled, jnp.float32))


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "compiled"])
def test_numbers_beyond_the_largest_saturate(call: Any):
    beyond = jnp.asarray([448, 460, 464, 464.1, 465, 480, 3e38, np.inf])
    for sign in (1, -1):
        assert np.all(np.asarray(call(saturate)(sign * beyond), np.float32) == sign * LARGEST)
    assert np.isnan(np.asarray(call(saturate)(jnp.float32(np.nan)), np.float32))


def test_sizes_of_a_published_checkpoint_that_blocks_do_not_divide():
    latent = quantised((256, 576), (128, 128))  # kv_a_proj_with_mqa: 512 + 64 columns
    assert latent.scales.shape == (2, 5)
    heads = quantised((128, 3 * 448), (128, 128))  # kv_b_proj: 3.5 blocks per head
    assert heads.scales.shape == (1, 11)
    second = np.asarray(dequantise(heads, jnp.float32))[:, 448:896]
    scales = np.asarray(heads.scales)[0, np.arange(448, 896) // 128]
    assert np.array_equal(second, np.asarray(heads.values, np.float32)[:, 448:896] * scales)
    assert len(set(scales)) == 4  # blocks 3 to 6; block 3 belongs to the first head too


def test_one_rounding_leads_to_a_narrow_type():
    scaled = quantised((7, 13), (3, 5))
    narrow = dequantise(scaled, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    assert np.array_equal(narrow, elementwise(scaled).astype(jnp.bfloat16))


@SOME
@given(seed=SEEDS, group=st.sampled_from([4, 5, 16]))
def test_every_token_and_group_of_channels_has_its_own_scale(seed, group):
    x = draw((2, 3, 10), seed)
    tokens = quantise_activations(jnp.asarray(x), group)
    assert tokens.scales.shape == (2, 3, -(-10 // group))
    for place in np.ndindex(*tokens.scales.shape):
        *token, k = place
        largest = np.abs(x[(*token, slice(k * group, (k + 1) * group))]).max()
        expected = max(largest, 1e-10) / LARGEST
        np.testing.assert_allclose(tokens.scales[place], expected, rtol=2e-7)


def test_groups_are_128_channels_unless_said_otherwise():
    assert quantise_activations(jnp.ones((2, 300))).scales.shape == (2, 3)


@pytest.mark.parametrize(
    ("block", "rows"), [((5, 13), ()), ((4, 4), (3,)), ((3, 5), (2, 3)), ((20, 20), (3,))], ids=str
)
def test_products_are_those_of_the_dequantised_factors(block: Block, rows: tuple[int, ...]):
    kernel, x = quantised((10, 13), block), jnp.asarray(draw((*rows, 10), 1))
    plain = elementwise(kernel).astype(float)
    tokens = elementwise(quantise_activations(x.reshape(-1, 10), block[0])).reshape(x.shape)
    for product, left in ((matmul, np.asarray(x)), (matmul_w8a8, tokens)):
        ours, size = product(x, kernel), np.abs(left).astype(float) @ np.abs(plain)
        assert ours.shape == (*rows, 13) and ours.dtype == x.dtype
        assert np.all(np.abs(ours - left.astype(float) @ plain) <= 1e-6 * size)


@pytest.mark.parametrize("product", [matmul, matmul_w8a8])
def test_products_of_narrow_activations_are_summed_in_float32(product: Any):
    x = jnp.ones((1, 4096), jnp.bfloat16)  # a bfloat16 sum of ones ends at 256
    kernel = quantise(jnp.ones((4096, 2)), (128, 128))
    ours = product(x, kernel)
    assert ours.dtype == jnp.bfloat16
    assert np.all(np.asarray(ours, np.float32) == 4096)
    # A CPU sums in float32 whatever it is asked for; other devices do as they are told.
    assert "preferred_element_type=float32" in str(jax.make_jaxpr(product)(x, kernel))


@pytest.mark.parametrize("product", [matmul, matmul_w8a8])
def test_a_row_does_not_depend_on_its_neighbours(product: Any):
    kernel, x = quantised((10, 13), (4, 4)), jnp.asarray(draw((3, 10), 1))
    others = x.at[0].mul(-1e6).at[2].set(0)
    assert np.array_equal(product(x, kernel)[1], product(others, kernel)[1])


def test_stacked_matrices_are_quantised_one_by_one():
    x = draw((2, 3, 7, 13))
    stack = quantise(jnp.asarray(x), (3, 5))
    one = quantise(jnp.asarray(x[1, 2]), (3, 5))
    assert same(stack[1, 2], one) and same(stack[1][2], one) and same(stack[1:, 2][0], one)
    assert np.array_equal(dequantise(stack, jnp.float32), elementwise(stack))


def test_a_scan_over_a_stack_meets_each_matrix():
    stack, x = quantised((4, 7, 7), (3, 5)), jnp.asarray(draw((2, 7), 1))

    def step(x: jax.Array, kernel: BlockScaled) -> tuple[jax.Array, jax.Array]:
        y = jnp.tanh(matmul(x, kernel))
        return y, y

    _, scanned = jax.jit(lambda x, stack: jax.lax.scan(step, x, stack))(x, stack)
    for i in range(4):
        x, one = step(x, stack[i])
        np.testing.assert_allclose(scanned[i], one, rtol=1e-5, atol=1e-6)


def test_a_module_may_hold_one_in_place_of_an_array():
    scaled, x = quantised((7, 13), (3, 5)), jnp.asarray(draw((2, 7), 1))

    class Linear(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(scaled)

    graphdef, params = nnx.split(Linear())
    merged = jax.jit(lambda params: matmul(x, nnx.merge(graphdef, params).kernel[...]))(params)
    np.testing.assert_allclose(merged, matmul(x, scaled), rtol=1e-5, atol=1e-6)
    shapes: Any = nnx.eval_shape(Linear)
    assert shapes.kernel.shape == (7, 13)
    ((path, param),) = nnx.to_flat_state(params)
    assert path == ("kernel",) and same(param[...], scaled)
    assert scaled[...] is scaled  # as large as it may be, nothing is copied


def test_layers_stacked_by_vmap_are_scanned():
    kernels, x = jnp.asarray(draw((3, 5, 5))), jnp.asarray(draw((2, 5), 1))

    class Layer(nnx.Module):
        def __init__(self, kernel: jax.Array):
            self.kernel = nnx.Param(quantise(kernel, (2, 4)))

    graphdef, params = nnx.split(nnx.vmap(Layer)(kernels))

    def step(x: jax.Array, one: Any) -> tuple[jax.Array, None]:
        return matmul(x, nnx.merge(graphdef, one, copy=True).kernel[...]), None

    scanned, _ = jax.lax.scan(step, x, params)
    for kernel in kernels:
        x = matmul(x, quantise(kernel, (2, 4)))
    np.testing.assert_allclose(scanned, x, rtol=1e-5)


def test_other_numbers_compile_nothing_and_another_block_does():
    traced = []

    @jax.jit
    def product(x: jax.Array, kernel: BlockScaled) -> jax.Array:
        traced.append(kernel.block)
        return matmul_w8a8(x, kernel)

    for seed in range(3):
        product(jnp.asarray(draw((2, 7), seed)), quantised((7, 13), (3, 5), seed))
    assert traced == [(3, 5)]
    product(jnp.ones((2, 7)), quantised((7, 13), (3, 6)))  # of the same shapes
    assert traced == [(3, 5), (3, 6)]


def test_shapes_without_arrays_have_the_same_form():
    shapes = jax.eval_shape(lambda x: quantise(x, (3, 5)), jax.ShapeDtypeStruct((2, 7, 13), "f4"))
    assert isinstance(shapes, BlockScaled)
    assert shapes.block == (3, 5) and shapes.shape == (2, 7, 13)
    assert shapes.scales.shape == (2, 3, 3) and shapes.values.dtype == jnp.float8_e4m3fn
    assert jax.tree.structure(shapes) == jax.tree.structure(quantised((2, 7, 13), (3, 5)))


def test_values_and_scales_are_sharded_alike():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    scaled, x = quantised((4, 8 * 6), (4, 3)), jnp.asarray(draw((2, 4), 1))
    spread = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(None, "model")), scaled)
    assert isinstance(spread, BlockScaled)
    compiled = jax.jit(matmul).lower(x, jax.device_put(scaled, spread)).compile()
    assert "all-" not in str(compiled.as_text())  # blocks are whole, so no weight moves
    ours = compiled(x, jax.device_put(scaled, spread))
    np.testing.assert_allclose(ours, matmul(x, scaled), rtol=1e-5, atol=1e-6)
