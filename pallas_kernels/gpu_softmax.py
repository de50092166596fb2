"""What attention kernels on GPUs share: a softmax kept up to date over tiles, and its parts merged.

Exponents are of two: scores come in multiplied by log2(e), and maxima leave so.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from dspark_jax.pallas_kernels.gpu_target import plgpu

LOG2_E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)
"""Stands for a maximum of -inf, from which nothing could be subtracted."""


def splits_of(independent: int, tiles: int, cores: int) -> int:
    """Blocks of the grid that share a context: enough to fill the chip, each with eight tiles."""
    return max(1, min(cores // independent, tiles // 8))


def merged(
    sums: Float[Array, "splits *rows d"],
    tops: Float[Array, "splits *rows"],
    weights: Float[Array, "splits *rows"],
) -> Float[Array, "*rows d"]:
    """One softmax of parts that each know their weighted sum, maximum and weight.

    A part that sees nothing has maximum -inf, and anything as its sum; if all do, zeros.
    """
    share = jnp.exp2(tops - jnp.maximum(jnp.max(tops, axis=0), LOWEST))
    total = jnp.sum(jnp.where((share > 0)[..., None], sums * share[..., None], 0), axis=0)
    return total / jnp.maximum(jnp.sum(weights * share, axis=0), 1e-30)[..., None]


def start(rows: int, layout: Any) -> tuple[Any, Any]:
    """Of a kernel's rows: (maximum, weight) before the first tile."""
    top = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), layout.reduce(1))
    return top, plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), layout.reduce(1))


def weigh(scores: Any, seen: Any, scale: float, top: Any, weight: Any) -> tuple[Any, ...]:
    """One tile more: (its weights, maximum, weight, what earlier sums are multiplied by)."""
    scores = jnp.where(seen, scores * (scale * LOG2_E), -jnp.inf)
    new = jnp.maximum(top, jnp.max(scores, axis=1))
    finite = jnp.maximum(new, LOWEST)
    shares = jnp.exp2(scores - lax.broadcast_in_dim(finite, scores.shape, (0,)))
    old = jnp.exp2(top - finite)
    return shares, new, weight * old + jnp.sum(shares, axis=1), old


def release(consumed: Any, awaited: Any) -> None:
    """A slot's tile has been used; said only if another will be fetched into it."""
    pl.when(awaited)(lambda: plgpu.barrier_arrive(consumed))


def wgmma(*factors: tuple[Any, Any]) -> Any:
    """The sum of products of operands in shared memory, awaited, in registers."""

    def multiply(sum_ref: Any) -> Any:
        for left, right in factors:
            plgpu.wgmma(sum_ref, left, right)
        return sum_ref[...]

    (left, right), *_ = factors
    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def load(part: Any) -> Any:
    """Some of tensor memory, read before anything else may be written there."""
    held = plgpu.async_load_tmem(part)
    plgpu.wait_load_tmem()
    return held


def scale_rows(total: Any, old: Any, chunk: int) -> None:
    """Every row of a sum in tensor memory times its number, some columns at a time."""
    for i in range(0, total.shape[1], chunk):
        part = total.at[:, pl.ds(i, chunk)]
        held = load(part)
        plgpu.async_store_tmem(part, held * lax.broadcast_in_dim(old, held.shape, (0,)))
    plgpu.commit_tmem()
