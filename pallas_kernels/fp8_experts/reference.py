"""Products of rows with their experts' FP8 matrices in plain JAX: the specification.

Kernels are [experts, in, out], each scaled by block as in `fp8_matmul`; `layer` names one set of
experts of arrays stacked along a first axis, which are read in place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dspark_jax.pallas_kernels.fp8_matmul.reference import FEW_ROWS, alone, by_blocks, dequantise


def fp8_experts(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack E i o"],
    scales: Float[Array, "*stack E k n"],
    sizes: Int[Array, "E"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
) -> Float[Array, "R o"]:
    """W8A16 of rows sorted by expert: the first `sizes[0]` by the first, and so on; in float32.

    Rows past the sum of `sizes` hold anything.
    """
    if len(x) > FEW_ROWS:
        plain = dequantise(*alone(values, scales, layer), block, x.dtype)
        return jax.lax.ragged_dot(x, plain, sizes, preferred_element_type=jnp.float32)
    owner = jnp.sum(jnp.arange(len(x))[:, None] >= jnp.cumsum(sizes), axis=1)
    owner = jnp.minimum(owner, len(sizes) - 1)

    def product(x: Array, part: Array) -> Array:
        part = part.astype(x.dtype)
        return jax.lax.ragged_dot(x, part, sizes, preferred_element_type=jnp.float32)

    return by_blocks(x, values, scales, layer, block, product, lambda row: row[owner])
