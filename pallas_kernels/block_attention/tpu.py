"""Block attention on a TPU: the context is read once, as far as it is filled, tile by tile."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dspark_jax.pallas_kernels import tiles
from dspark_jax.pallas_kernels.tiles import Layout, Place, Streams

HEADS_AT_ONCE = 2
"""Heads whose steps overlap, for one waits for its products; of more the registers run out."""


def block_attention(
    query: Float[Array, "B K H d"],
    key: Float[Array, "B K Hk d"],
    value: Float[Array, "B K Hk d"],
    context_key: Float[Array, "N Hk size wide"],
    context_value: Float[Array, "N Hk size wide"],
    pages: Int[Array, "B P"],
    length: Int[Array, "B"],
    *,
    window: int | None,
    causal: bool,
    interpret: Any = False,
) -> Float[Array, "B K H d"]:
    """What every slot takes from its context and its block; see the reference."""
    (B, K, H, d), (_, Hk, size, wide), dtype = query.shape, context_key.shape, query.dtype
    ratio, sublanes = H // Hk, tiles.sublanes(dtype)
    layout = tiles.lay_out(pages, (context_key, context_value), window)
    # The query heads of a key head are rows of one product: [B Hk K*ratio d].
    grouped = jnp.moveaxis(query.reshape(B, K, Hk, ratio, d), 1, 2).reshape(B, Hk, K * ratio, d)
    grouped = _pad(grouped, sublanes, wide)
    key, value = (_pad(jnp.moveaxis(x, 1, 2), sublanes, wide) for x in (key, value))
    rows = grouped.shape[2]
    own = [pl.BlockSpec((1, Hk, x.shape[2], wide), _own_block) for x in (grouped, key, value)]
    tile = pltpu.VMEM((2, Hk, layout.tile, wide), dtype)
    read = layout.pages * size if window is None else min(layout.pages * size, window)
    out = pl.pallas_call(
        functools.partial(_kernel, layout, K, ratio, causal, d**-0.5),
        name="block_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B,),
            in_specs=[*own, *[pl.BlockSpec(memory_space=pltpu.HBM)] * 2],
            out_specs=own[0],
            scratch_shapes=[
                tile,
                tile,
                pltpu.VMEM((Hk, rows, 1), jnp.float32),
                pltpu.VMEM((Hk, rows, 1), jnp.float32),
                pltpu.VMEM((Hk, rows, wide), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, dtype),
        compiler_params=tiles.PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=4 * B * H * K * (read + K) * d,
            transcendentals=B * H * K * (read + K),
            bytes_accessed=dtype.itemsize * B * 2 * (Hk * (read * wide + K * d) + H * K * d),
        ),
        interpret=interpret,
    )(length, pages.reshape(-1), grouped, key, value, context_key, context_value)
    out = out[:, :, : K * ratio, :d].reshape(B, Hk, K, ratio, d)
    return jnp.moveaxis(out, 2, 1).reshape(B, K, H, d)


def unsupported(
    query: Any,
    key: Any,
    value: Any,
    context_key: Any,
    context_value: Any,
    pages: Any,
    length: Any,
    *,
    window: int | None,
    causal: bool,
) -> str | None:
    """Why this kernel cannot run these shapes and types, None if it can."""
    kinds = {jnp.dtype(x.dtype) for x in (query, key, value, context_key, context_value)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(kind.name for kind in kinds))
        return f"queries and keys of {names} are not all bfloat16 or all float32"
    (_, _, size, wide) = context_key.shape
    if wide % 32 or wide > 256:
        return f"heads of {wide} numbers are not a multiple of 32 up to 256"
    if window is not None and window < 1:
        return f"a window of {window} rows is empty"
    return tiles.refused(pages, size, query.dtype)


def _own_block(b: Any, *_: Any) -> tuple[Any, ...]:
    return b, 0, 0, 0


def _pad(x: Float[Array, "B Hk rows d"], multiple: int, wide: int) -> Float[Array, "B Hk M wide"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, wide - x.shape[3])))


def _kernel(
    layout: Layout,
    K: int,
    ratio: int,
    causal: bool,
    scale: float,
    length: Any,
    pages: Any,
    query: Any,
    key: Any,
    value: Any,
    context_key: Any,
    context_value: Any,
    out: Any,
    keys: Any,
    values: Any,
    top: Any,
    total: Any,
    mixed: Any,
    turn: Any,
    arrived: Any,
) -> None:
    Hk = query.shape[1]
    at_once = math.gcd(Hk, HEADS_AT_ONCE)
    paged = ((context_key, keys), (context_value, values))
    streams = Streams(layout, pages, paged, (), turn, arrived)

    def over_block(h: Any, carry: Any) -> Any:
        scores = _scores(query[0, h], key[0, h], scale)
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = (slot < K) & (slot * ratio <= row) if causal else slot < K
        scores = jnp.where(seen, scores, -jnp.inf)
        top[h] = jnp.max(scores, axis=-1, keepdims=True)
        weight = jnp.exp(scores - top[h])
        total[h] = jnp.sum(weight, axis=-1, keepdims=True)
        mixed[h] = _mix(weight, value[0, h])
        return carry

    jax.lax.fori_loop(0, Hk, over_block, None)

    def visit(side: Any, place: Place, begin: Any, end: Any) -> None:
        tiles.clear(values.at[side], begin, end)

        def over_heads(number: Any, carry: Any) -> Any:
            # Everything is loaded before anything is stored: the steps of several heads overlap.
            some = [number * at_once + i for i in range(at_once)]
            before = [(top[h], total[h], mixed[h]) for h in some]
            scores = [_scores(query[0, h], keys[side, h], scale) for h in some]
            row = jax.lax.broadcasted_iota(jnp.int32, scores[0].shape, 1)
            seen = (row >= begin) & (row < end)
            after = [
                _mix_in(old, jnp.where(seen, one, -jnp.inf), values[side, h])
                for h, old, one in zip(some, before, scores, strict=True)
            ]
            for h, new in zip(some, after, strict=True):
                top[h], total[h], mixed[h] = new
            return carry

        jax.lax.fori_loop(0, Hk // at_once, over_heads, None)

    tiles.walk(streams, lambda b: tiles.sight_of(layout, length[b]), visit)

    def finish(h: Any, carry: Any) -> Any:
        out[0, h] = (mixed[h] / total[h]).astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, Hk, finish, None)


def _scores(query: Any, key: Any, scale: float) -> Any:
    dims = (((1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(query, key, dims, preferred_element_type=jnp.float32)
    return scores * scale


def _mix_in(before: tuple[Any, Any, Any], scores: Any, value: Any) -> tuple[Any, Any, Any]:
    """(highest score, sum of weights, mixed values) with those of a tile."""
    top, total, mixed = before
    highest = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weight, old = jnp.exp(scores - highest), jnp.exp(top - highest)
    total = total * old + jnp.sum(weight, axis=-1, keepdims=True)
    return highest, total, mixed * old + _mix(weight, value)


def _mix(weight: Any, value: Any) -> Any:
    return jnp.dot(weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
