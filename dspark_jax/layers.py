"""Building blocks shared by drafts and targets: linear maps, norms, rotary positions, SwiGLU.

Kernels are stored [in, out], the transpose of a published checkpoint's `weight`: on a CPU a
one-row product with that layout is three times as fast. Products accumulate in float32 and norms
run in float32 whatever the activations' type.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax import fp8
from dspark_jax.fp8 import BlockScaled


def init_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float = 0.02) -> nnx.Param:
    """A parameter drawn from N(0, std²)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape))


Kernel = Float[Array, "i o"] | BlockScaled


def matmul(x: Float[Array, "*rows i"], kernel: Kernel) -> Float[Array, "*rows o"]:
    """`x @ kernel` accumulated in float32 and returned in x's type."""
    if isinstance(kernel, BlockScaled):
        return fp8.matmul(x, kernel)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def exact_matmul(x: Float[Array, "*rows i"], kernel: Kernel) -> Float[Array, "*rows o"]:
    """`x @ kernel` in float32 on every device: accelerators round float32 factors by default.

    For what a choice hangs on: a rounded router picks other experts.
    """
    if isinstance(kernel, BlockScaled):
        kernel = fp8.dequantise(kernel, jnp.float32)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)


def product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum accumulated and returned in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """`x @ kernel (+ bias)`."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = init_normal(rngs, (size_in, size_out))
        self.bias = nnx.Param(jnp.zeros(size_out)) if bias else None

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        y = matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm: float32 statistics, cast back, then the scale."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        return rms_norm(x, self.weight[...], self.eps)


def rms_norm(
    x: Float[Array, "*rows n"], weight: Float[Array, "n"], eps: float
) -> Float[Array, "*rows n"]:
    """What `RMSNorm` computes, for weights that live outside a module."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean-and-variance norm with scale and bias."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        return layer_norm(x, self.weight[...], self.bias[...], self.eps)


def layer_norm(
    x: Float[Array, "*rows n"], weight: Float[Array, "n"], bias: Float[Array, "n"], eps: float
) -> Float[Array, "*rows n"]:
    """What `LayerNorm` computes, for weights that live outside a module."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    return (normed * weight + bias).astype(x.dtype)


def masked_softmax(
    scores: Float[Array, "*rows C"], visible: Bool[Array, "*seen C"]
) -> Float[Array, "*rows C"]:
    """Softmax over the visible columns; a row that sees nothing (padding) gives zeros."""
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(scores.dtype).min)
    weight = jnp.exp(scores - jax.lax.stop_gradient(top))
    return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(size, hidden, rngs=rngs)
        self.up_proj = Linear(size, hidden, rngs=rngs)
        self.down_proj = Linear(hidden, size, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_angles(
    position: Int[Array, "*rows"], dim: int, theta: float
) -> Float[Array, "*rows half"]:
    """Rotation angles `position * theta^(-2j/dim)` for j < dim / 2, in float32."""
    rate = 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return position[..., None].astype(jnp.float32) * rate


def rotate_half(
    x: Float[Array, "*rows heads n"], angle: Float[Array, "*rows half"]
) -> Float[Array, "*rows heads n"]:
    """NeoX rotary embedding: element j pairs with j + n/2 (Qwen3 and the draft)."""
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_interleaved(
    x: Float[Array, "*rows heads n"], angle: Float[Array, "*rows half"]
) -> Float[Array, "*rows heads n"]:
    """Rotary embedding of neighbouring pairs (0,1), (2,3), … written as [evens | odds] (GLM).

    Only products of two such vectors are ever used, so the de-interleaved order is free; every
    cache holds this one.
    """
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
