"""Products with one block-scaled FP8 matrix in plain JAX: the specification, and what a CPU runs.

Kernels are [in, out]: element i, o is `values[i, o] * scales[i // rows, o // columns]`, where
`block = (rows, columns)` and the last block of either axis may be cut short. `layer` names one
matrix of arrays stacked along a first axis, which are read in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int

LARGEST = 448.0
"""Of e4m3fn, which has no infinity: JAX turns what exceeds 464 into NaN."""
SMALLEST_MAXIMUM = 1e-10
"""A group of smaller numbers is scaled as if this were its largest, so no scale is zero."""

FEW_ROWS = 1024
"""Up to so many rows a product is bound by the bytes of its kernel."""


def fp8_matmul(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """W8A16: `x @ kernel`, accumulated in float32 and returned in x's type.

    For many rows the kernel is dequantised to x's type once. For few, which cost no more than the
    bytes of the kernel, blocks of rows are multiplied as they are stored, and the products scaled
    in float32.
    """
    if len(x) > FEW_ROWS:
        plain = dequantise(*alone(values, scales, layer), block, x.dtype)
        return jnp.matmul(x, plain, preferred_element_type=jnp.float32).astype(x.dtype)

    def product(x: Array, part: Array) -> Array:
        return jnp.matmul(x, part.astype(x.dtype), preferred_element_type=jnp.float32)

    return by_blocks(x, values, scales, layer, block, product, lambda row: row).astype(x.dtype)


def fp8_matmul_w8a8(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """W8A8: the same with x quantised too, every token by itself in groups of `block[0]` channels.

    Each block's products are exact and summed in float32, then scaled and summed in float32. Holds
    ceil(i / rows) partial results at a time.
    """
    values, scales = alone(values, scales, layer)
    (size_in, size_out), (rows, columns) = values.shape, block
    tokens, token_scales = quantise_tokens(x, rows)
    filling = (0, -size_in % rows)
    left = jnp.pad(tokens, ((0, 0), filling)).reshape(len(x), -1, rows).astype(jnp.bfloat16)
    right = jnp.pad(values, (filling, (0, 0))).reshape(-1, rows, size_out).astype(jnp.bfloat16)
    # bfloat16 holds every e4m3 number, and every accelerator multiplies it exactly.
    partial = jnp.einsum("mkc,kcn->kmn", left, right, preferred_element_type=jnp.float32)
    spread = jnp.repeat(scales, columns, axis=-1)[:, :size_out]
    y = jnp.sum(partial * token_scales.T[:, :, None] * spread[:, None], axis=0)
    return y.astype(x.dtype)


def quantise_tokens(
    x: Float[Array, "R i"], group: int
) -> tuple[Float8e4m3fn[Array, "R i"], Float[Array, "R k"]]:
    """Each `group` consecutive channels of a token divided by their scale: (values, scales)."""
    R, size_in = x.shape
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -size_in % group))).reshape(R, -1, group)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scales = jnp.maximum(largest, SMALLEST_MAXIMUM) / LARGEST
    spread = jnp.repeat(scales, group, axis=-1)[:, :size_in]
    scaled = x.astype(jnp.float32) / spread
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn), scales


def alone(values: Any, scales: Any, layer: Any) -> tuple[Any, Any]:
    """The matrix meant and its scales, taken out of their stack."""
    if layer is None:
        return values, scales
    return tuple(
        jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (values, scales)
    )


def dequantise(
    values: Float8e4m3fn[Array, "*lead i o"],
    scales: Float[Array, "*lead k n"],
    block: tuple[int, int],
    dtype: Any,
) -> Float[Array, "*lead i o"]:
    """The matrices themselves, multiplied in float32 and rounded once to `dtype`."""
    (rows, columns), (i, o) = block, values.shape[-2:]
    spread = jnp.repeat(jnp.repeat(scales, rows, axis=-2), columns, axis=-1)[..., :i, :o]
    return (values.astype(jnp.float32) * spread).astype(dtype)


def by_blocks(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*lead i o"],
    scales: Float[Array, "*lead k n"],
    layer: Int[Array, ""] | None,
    block: tuple[int, int],
    product: Callable[[Array, Array], Array],
    spread_rows: Callable[[Array], Array],
) -> Float[Array, "R o"]:
    """The sum over blocks of rows of `product(x's columns, kernel's rows)` times its scales.

    Axes before `i` belong to every product; only `layer` takes one of them away.
    """
    *lead, size_in, size_out = values.shape if layer is None else values.shape[1:]
    (rows, columns), axis = block, len(lead)
    count = -(-size_in // rows)
    if size_in % rows:
        (values, scales), layer = alone(values, scales, layer), None
        filling = (0, count * rows - size_in)
        values = jnp.pad(values, ((0, 0),) * axis + (filling, (0, 0)))
        x = jnp.pad(x, ((0, 0), filling))

    def cut(array: Array, start: Any, size: int) -> Array:
        front, ones = ((), ()) if layer is None else ((layer,), (1,))
        shape = (*lead, size, array.shape[-1])
        begin = (*front, *(0,) * axis, start, 0)
        return jax.lax.dynamic_slice(array, begin, (*ones, *shape)).reshape(shape)

    def add(i: Any, total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * rows, rows, 1)
        own = spread_rows(cut(scales, i, 1)[..., 0, :])
        spread = jnp.repeat(own, columns, axis=-1)[..., :size_out]
        return total + product(part, cut(values, i * rows, rows)) * spread

    return jax.lax.fori_loop(0, count, add, jnp.zeros((len(x), size_out), jnp.float32))
