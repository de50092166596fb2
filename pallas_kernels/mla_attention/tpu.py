"""Latent attention on a TPU: every latent is read once, and is key and value where it lies."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.pallas_kernels import tiles
from dspark_jax.pallas_kernels.tiles import Layout, Place, Sight, Streams

PRODUCT_ROWS = 256
"""Query rows (slots times heads) of a product: a tile is put into the matrix unit for each of them
again, and of more rows than that the scores go through memory more often."""
QUERY_ROWS = 1024
"""Query rows of a program, which lie in the vector memory: more are several programs, each of which
reads what its own rows see."""
LOWEST = float(jnp.finfo(jnp.float32).min)


def mla_attention(
    latent: Float[Array, "B S H r"],
    rope: Float[Array, "B S H p"],
    context_latent: Float[Array, "N size r"],
    context_rope: Float[Array, "N size wide"],
    pages: Int[Array, "B P"],
    position: Int[Array, "B S"],
    selected: Bool[Array, "B S C"] | None = None,
    *,
    scale: float,
    interpret: Any = False,
) -> Float[Array, "B S H r"]:
    """What every head's query takes from the cached latents; see the reference."""
    (B, asking, H, r), (_, size, wide), dtype = latent.shape, context_rope.shape, latent.dtype
    S = slots_of(asking, H, dtype)
    heads, slots = grouping(S, H, dtype)
    sharing = pl.cdiv(asking, S)
    latent, rope = _parts(latent, S), _parts(rope, S)
    asked = _rows(latent, heads, r), _rows(rope, heads, wide)
    contexts = context_latent[:, None], context_rope[:, None]
    layout = tiles.lay_out(pages, contexts)
    capacity = layout.pages * size
    position = _parts(jnp.where(position < capacity, position, -1), S, -1)
    length = jnp.max(position, axis=1) + 1
    own = [pl.BlockSpec((1, S * heads, n), lambda b, *_: (b, 0, 0)) for n in (r, wide)]
    held = [pltpu.VMEM((2, 1, layout.tile, n), dtype) for n in (r, wide)]
    scalars, arrays, chosen = [length, pages.reshape(-1)], [*contexts], []
    if selected is not None:
        cut, order, count = chosen_tiles(layout, _parts(selected, S), position)
        scalars += [order.reshape(-1), count]
        arrays.append(cut)
        chosen.append(pltpu.VMEM((2, S, layout.tile), cut.dtype))
    out = pl.pallas_call(
        functools.partial(_kernel, layout, heads, slots, sharing, scale, selected is not None),
        name="mla_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B * sharing,),
            in_specs=[
                *own,
                pl.BlockSpec((1, S, 1), lambda b, *_: (b, 0, 0)),
                *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in arrays],
            ],
            out_specs=own[0],
            scratch_shapes=[
                *held,
                *chosen,
                pltpu.VMEM((S, layout.tile), jnp.float32),
                pltpu.VMEM((S * heads, 1), jnp.float32),
                pltpu.VMEM((S * heads, 1), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B * sharing, S * heads, r), jnp.float32),
        compiler_params=tiles.PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=2 * B * asking * H * capacity * (2 * r + rope.shape[-1]),
            transcendentals=B * asking * H * capacity,
            bytes_accessed=B * sharing * capacity * (r + wide) * dtype.itemsize
            + B * asking * H * ((r + wide) * dtype.itemsize + 4 * r)
            + (0 if selected is None else B * asking * capacity),
        ),
        interpret=interpret,
    )(*scalars, *asked, position[:, :, None], *arrays)
    return out.reshape(B, sharing * S, heads, r)[:, :asking, :H]


def unsupported(
    latent: Any,
    rope: Any,
    context_latent: Any,
    context_rope: Any,
    pages: Any,
    position: Any,
    selected: Any = None,
    *,
    scale: float,
) -> str | None:
    """Why this kernel cannot run these shapes and types, None if it can."""
    kinds = {jnp.dtype(x.dtype) for x in (latent, rope, context_latent, context_rope)}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(kind.name for kind in kinds))
        return f"queries and latents of {names} are not all bfloat16 or all float32"
    (B, S, H, r), (_, size, wide) = latent.shape, context_rope.shape
    if r % 128 or wide % 32:
        return f"latents of {r} numbers and {wide} rotated are not multiples of 128 and 32"
    if H > QUERY_ROWS or r > 1024:
        return f"{H} heads of {r} numbers are larger than the vector memory"
    contexts = (jax.ShapeDtypeStruct((1, 1, size, n), latent.dtype) for n in (r, wide))
    programs = B * pl.cdiv(S, slots_of(S, H, latent.dtype))
    lists = 0 if selected is None else programs * tiles.lay_out(pages, tuple(contexts)).tiles
    return tiles.refused(pages, size, latent.dtype, lists)


def chosen_tiles(
    layout: Layout, selected: Bool[Array, "B S C"], position: Int[Array, "B S"]
) -> tuple[Any, Any, Any]:
    """Selected rows cut into tiles [B tiles S rows], which of those hold any, and how many."""
    places = [tiles.place_of(layout, tile) for tile in range(layout.tiles)]
    row = jnp.asarray([place.row for place in places])[:, None] + jnp.arange(layout.tile)
    visible = selected & (jnp.arange(selected.shape[2]) <= position[:, :, None])
    cut = jnp.take(visible, row, axis=2, mode="fill", fill_value=False)
    cut = jnp.moveaxis(cut, 1, 2)
    some = jnp.any(cut, axis=(2, 3))
    number = jnp.arange(layout.tiles)
    here = some[:, :, None] & (jnp.cumsum(some, axis=1)[:, :, None] == number + 1)
    order = jnp.sum(jnp.where(here, number[:, None], 0), axis=1, dtype=jnp.int32)
    return cut.astype(jnp.int8), order, jnp.sum(some, axis=1, dtype=jnp.int32)


def slots_of(S: int, H: int, dtype: Any) -> int:
    """Slots of one program: all, or as many as fit and are whole products, shared out evenly.

    Not all where they would be cut into many small products, as a prime number is.
    """
    heads, together = grouping(S, H, dtype)
    if S * heads <= QUERY_ROWS and 2 * together * heads > min(PRODUCT_ROWS, S * heads):
        return S
    for padding in (8, tiles.sublanes(dtype)):
        heads = H + -H % padding
        fitting = max(QUERY_ROWS // heads, 1)
        step = min(max(PRODUCT_ROWS // heads, 1), fitting)
        if step * heads % tiles.sublanes(dtype) == 0:
            break
    even = pl.cdiv(S, pl.cdiv(S, fitting // step * step))
    return even + -even % step


def _parts(x: Any, slots: int, fill: int = 0) -> Any:
    """[B S …] as [B * programs, slots …], with `fill` behind the last."""
    parts = pl.cdiv(x.shape[1], slots)
    behind = [(0, 0)] * x.ndim
    behind[1] = (0, parts * slots - x.shape[1])
    padded = jnp.pad(x, behind, constant_values=fill)
    return padded.reshape(-1, slots, *x.shape[2:])


def grouping(S: int, H: int, dtype: Any) -> tuple[int, int]:
    """To how many heads a slot is padded, and how many slots are rows of one product."""
    for step in (8, tiles.sublanes(dtype)):
        heads = H + -H % step
        fitting = [n for n in range(1, S + 1) if S % n == 0 and n * heads <= PRODUCT_ROWS]
        slots = max(fitting, default=1)
        if slots == S or slots * heads % tiles.sublanes(dtype) == 0:
            break
    return heads, slots


def _rows(x: Float[Array, "B S H n"], heads: int, wide: int) -> Float[Array, "B rows wide"]:
    """Queries as rows of one product, with zeros behind."""
    B, S, H, n = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, heads - H), (0, wide - n))).reshape(B, S * heads, wide)


def _kernel(
    layout: Layout,
    heads: int,
    slots: int,
    sharing: int,
    scale: float,
    sparse: bool,
    *refs: Any,
) -> None:
    length, pages, *rest = refs
    order = count = picked = None
    whole = ()
    if sparse:
        order, count, *rest = rest
    latent, rope, position, latents, ropes, *rest = rest
    if sparse:
        chosen, out, keys, turned, picked, *rest = rest
        whole = ((chosen, picked),)
    else:
        out, keys, turned, *rest = rest
    hidden, top, total, turn, arrived = rest
    paged = (latents, keys), (ropes, turned)
    streams = Streams(layout, pages, paged, whole, turn, arrived, sharing)
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    out[...] = jnp.zeros_like(out)

    def visit(side: Any, place: Place, begin: Any, end: Any) -> None:
        tiles.clear(keys.at[side], begin, end)
        tiles.clear(turned.at[side], begin, end)
        row = jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
        seen = (row >= begin) & (row <= position[0] - place.row)
        if picked is not None:
            seen = seen & (picked[side].astype(jnp.int32) > 0)
        hidden[...] = jnp.where(seen, 0.0, -jnp.inf)

        def over_rows(number: Any, carry: Any) -> Any:
            rows = pl.ds(pl.multiple_of(number * slots * heads, heads), slots * heads)
            scores = _scores(latent[0, rows], keys[side, 0]) + _scores(
                rope[0, rows], turned[side, 0]
            )
            masks = [
                jnp.broadcast_to(hidden[pl.ds(number * slots + i, 1)], (heads, layout.tile))
                for i in range(slots)
            ]
            scores = scores * scale + jnp.concatenate(masks)
            highest = jnp.maximum(top[rows], jnp.max(scores, axis=-1, keepdims=True))
            weight, old = jnp.exp(scores - highest), jnp.exp(top[rows] - highest)
            total[rows] = total[rows] * old + jnp.sum(weight, axis=-1, keepdims=True)
            mixed = jnp.dot(
                weight.astype(keys.dtype), keys[side, 0], preferred_element_type=jnp.float32
            )
            out[0, rows] = out[0, rows] * old + mixed
            top[rows] = highest
            return carry

        jax.lax.fori_loop(0, hidden.shape[0] // slots, over_rows, None)

    def sight(b: Any) -> Sight:
        seen = tiles.sight_of(layout, length[b])
        return seen._replace(first=0, beyond=count[b]) if count is not None else seen

    def tile(b: Any, number: Any) -> Any:
        return order[b * layout.tiles + number] if order is not None else number

    tiles.walk(streams, sight, visit, tile)
    out[0] = out[0] / jnp.maximum(total[...], 1e-30)


def _scores(query: Any, key: Any) -> Any:
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(query, key, dims, preferred_element_type=jnp.float32)
