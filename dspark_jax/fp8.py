"""Matrices in FP8 with one float32 scale per block, and products with them.

A published checkpoint stores `weight` [out, in] in e4m3 beside `weight_scale_inv`, one number per
128 x 128 block, and a weight is their product ("inv" notwithstanding). Kernels here are [in, out],
so values, scales and block are all transposed once, when loaded (reference: glm-5.2.md §3).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int
from numpy.typing import DTypeLike

from dspark_jax import ops

LARGEST = 448.0
"""Of e4m3fn, which has no infinity: JAX turns what exceeds 464 into NaN."""
SMALLEST_MAXIMUM = 1e-10
"""A block of smaller numbers is scaled as if this were its largest, so no scale is zero."""

Block = tuple[int, int]
"""Rows and columns that share a scale; the last blocks of a matrix may be cut short."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BlockScaled:
    """Matrices [*lead, in, out]: element i, o is `values[i, o] * scales[i // rows, o // columns]`.

    A pytree of two arrays, with `block` in its structure: 576 rows in 5 blocks of 128 look like 5
    blocks of 116, so shapes alone do not tell, and a traced number could not cut anything. A
    dataclass, not a NamedTuple as elsewhere, for it stands where an array may: it is indexed along
    the leading axes, and `param[...]` gives it whole, which on a tuple is an error. Its fields are
    unchecked because trees of shardings and of shapes have the same form.
    """

    values: Any
    """float8_e4m3fn [*lead, in, out]."""
    scales: Any
    """float32 [*lead, ceil(in / rows), ceil(out / columns)]."""
    block: Block = field(metadata={"static": True})
    layer: Any = None
    """The one meant of matrices stacked along a first axis that is not counted in `shape`.

    A scan over layers keeps its stack and changes this number: a part of the stack that an inner
    loop reads block by block would be copied out of it first.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices that this stands for."""
        return self.values.shape if self.layer is None else self.values.shape[1:]

    def __getitem__(self, index: Any) -> "BlockScaled":
        """Some of the stacked matrices; `...` is all of them."""
        if index is ...:
            return self
        own = alone(self)
        return BlockScaled(own.values[index], own.scales[index], self.block)


def alone(scaled: BlockScaled) -> BlockScaled:
    """The matrices meant, taken out of their stack."""
    if scaled.layer is None:
        return scaled

    def own(stack: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(stack, scaled.layer, keepdims=False)

    return BlockScaled(own(scaled.values), own(scaled.scales), scaled.block)


def saturate(x: Float[Array, "*shape"]) -> Float8e4m3fn[Array, "*shape"]:
    """The nearest e4m3 number; ±448 beyond that, infinities included."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def quantise(kernel: Float[Array, "*lead i o"], block: Block) -> BlockScaled:
    """The nearest block-scaled matrix: every block's largest magnitude becomes 448."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(_cut(wide, block)), axis=(-3, -1))
    # XLA multiplies by 1 / 448: a scale may be one unit in the last place off torch's.
    scales = jnp.maximum(largest, SMALLEST_MAXIMUM) / LARGEST
    return BlockScaled(saturate(wide / _spread(scales, block, kernel.shape)), scales, block)


def dequantise(scaled: BlockScaled, dtype: DTypeLike) -> Float[Array, "*lead i o"]:
    """The matrices themselves, multiplied in float32 and rounded once to `dtype`."""
    scaled = alone(scaled)
    scales = _spread(scaled.scales, scaled.block, scaled.shape)
    return (scaled.values.astype(jnp.float32) * scales).astype(dtype)


def quantise_activations(x: Float[Array, "*lead T i"], group: int = 128) -> BlockScaled:
    """Every token by itself, each `group` consecutive channels with their own scale."""
    return quantise(x, (1, group))


def matmul(x: Float[Array, "*rows i"], kernel: BlockScaled) -> Float[Array, "*rows o"]:
    """W8A16: `x @ kernel`, accumulated in float32 and returned in x's type."""
    flat = x.reshape(-1, x.shape[-1])
    y = ops.fp8_matmul(flat, kernel.values, kernel.scales, kernel.layer, block=kernel.block)
    return y.reshape(*x.shape[:-1], -1)


def ragged_matmul(
    x: Float[Array, "R i"], kernels: BlockScaled, sizes: Int[Array, "E"]
) -> Float[Array, "R o"]:
    """W8A16 of rows sorted by matrix: the first `sizes[0]` by the first, and so on; in float32.

    Rows past the sum of `sizes` hold anything.
    """
    given = (x, kernels.values, kernels.scales, sizes, kernels.layer)
    return ops.fp8_experts(*given, block=kernels.block)


def matmul_w8a8(x: Float[Array, "*rows i"], kernel: BlockScaled) -> Float[Array, "*rows o"]:
    """W8A8: `x @ kernel`, x quantised too, in groups as long as the kernel's blocks are high."""
    flat = x.reshape(-1, x.shape[-1])
    y = ops.fp8_matmul_w8a8(flat, kernel.values, kernel.scales, kernel.layer, block=kernel.block)
    return y.reshape(*x.shape[:-1], -1)


def _cut(x: Float[Array, "*lead i o"], block: Block) -> Float[Array, "*lead k r n c"]:
    """Blocks in rows and columns of blocks, the last ones filled up with zeros."""
    (*lead, i, o), (rows, columns) = x.shape, block
    filled = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -i % rows), (0, -o % columns)])
    return filled.reshape(*lead, -(-i // rows), rows, -(-o // columns), columns)


def _spread(
    scales: Float[Array, "*lead k n"], block: Block, shape: tuple[int, ...]
) -> Float[Array, "*lead i o"]:
    """Every element's scale."""
    (rows, columns), (i, o) = block, shape[-2:]
    return jnp.repeat(jnp.repeat(scales, rows, axis=-2), columns, axis=-1)[..., :i, :o]
