"""What appending to a draft's context is: one projection, key norms, rotary, and a scatter."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Fresh(NamedTuple):
    """New rows of every layer, in the type that they were computed in."""

    keys: tuple[Float[Array, "R Hk d"], ...]
    values: tuple[Float[Array, "R Hk d"], ...]


def context_append(
    hidden: Float[Array, "R D"],
    kernel: Float[Array, "D n"],
    key_norm: Float[Array, "L d"],
    position: Int[Array, "R"],
    cell_page: Int[Array, "R"],
    cell_place: Int[Array, "R"],
    context_keys: tuple[Float[Array, "N Hk size wide"], ...],
    context_values: tuple[Float[Array, "N Hk size wide"], ...],
    *,
    eps: float,
    theta: float,
) -> tuple[tuple[Float[Array, "N Hk size wide"], ...], tuple[Float[Array, "N Hk size wide"], ...]]:
    """The contexts of every layer with the keys and values of new rows, (keys, values).

    `hidden` is the fused and normed target state of every row; `kernel` gives [keys | values] of
    layer after layer. Row r goes to `context[cell_page[r], :, cell_place[r]]`, nowhere if either is
    out of range; no two rows share a cell. Contexts may be wider than a head, as in block
    attention; what lies behind the head's d numbers stays.
    """
    N, _, size, _ = context_keys[0].shape
    d = key_norm.shape[1]
    fresh = keys_values(hidden, kernel, key_norm, position, eps=eps, theta=theta)
    inside = (cell_page >= 0) & (cell_page < N) & (cell_place >= 0) & (cell_place < size)
    page = jnp.where(inside, cell_page, N)

    def put(old: Array, rows: Array) -> Array:
        # Indices apart from one another put what they index in front: [R Hk d].
        return old.at[page, :, cell_place, :d].set(rows.astype(old.dtype), mode="drop")

    return (
        tuple(map(put, context_keys, fresh.keys)),
        tuple(map(put, context_values, fresh.values)),
    )


def keys_values(
    hidden: Float[Array, "R D"],
    kernel: Float[Array, "D n"],
    key_norm: Float[Array, "L d"],
    position: Int[Array, "R"],
    *,
    eps: float,
    theta: float,
) -> Fresh:
    """Keys, normed per head and rotated to their positions (NeoX halves), and values."""
    layers, d = key_norm.shape
    both = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32).astype(hidden.dtype)
    both = both.reshape(len(hidden), layers, 2, -1, d)
    rate = 1.0 / theta ** (jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle = position[:, None].astype(jnp.float32) * rate
    keys = [_rotated(_normed(both[:, i, 0], key_norm[i], eps), angle) for i in range(layers)]
    return Fresh(tuple(keys), tuple(both[:, i, 1] for i in range(layers)))


def _normed(x: Float[Array, "R Hk d"], weight: Float[Array, "d"], eps: float) -> Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def _rotated(x: Float[Array, "R Hk d"], angle: Float[Array, "R half"]) -> Array:
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
