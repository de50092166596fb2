"""Block attention on a TPU: the context is read once, as far as it is filled, tile by tile.

One program per sequence. The next tile is on its way while one is computed with, across the border
between sequences too: a short context would otherwise be all latency.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

TILE_ROWS = 512
TILES_BYTES = 8 << 20
"""What the four tiles (two of keys, two of values) may hold of the vector memory."""
TABLE_BYTES = 512 << 10
"""Of the scalar memory, for page numbers."""


class Layout(NamedTuple):
    """How a context is cut: `tile` rows are several whole pages, or a part of one."""

    pages: int  # P, of a sequence
    size: int
    tile: int
    window: int | None

    @property
    def parts(self) -> int:
        """Tiles of a page; the last begins early where they do not divide it."""
        return pl.cdiv(self.size, self.tile)


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
    ratio, sublanes = H // Hk, _sublanes(dtype)
    layout = Layout(pages.shape[1], size, _tile_rows(context_key, pages.shape[1]), window)
    # The query heads of a key head are rows of one product: [B Hk K*ratio d].
    grouped = jnp.moveaxis(query.reshape(B, K, Hk, ratio, d), 1, 2).reshape(B, Hk, K * ratio, d)
    grouped = _pad(grouped, sublanes, wide)
    key, value = (_pad(jnp.moveaxis(x, 1, 2), sublanes, wide) for x in (key, value))
    rows = grouped.shape[2]
    own = [pl.BlockSpec((1, Hk, x.shape[2], wide), _own_block) for x in (grouped, key, value)]
    tiles = pltpu.VMEM((2, Hk, layout.tile, wide), dtype)
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
                tiles,
                tiles,
                pltpu.VMEM((Hk, rows, 1), jnp.float32),
                pltpu.VMEM((Hk, rows, 1), jnp.float32),
                pltpu.VMEM((Hk, rows, wide), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
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
    (_, _, size, wide), sublanes = context_key.shape, _sublanes(query.dtype)
    if wide % 32 or wide > 256:
        return f"heads of {wide} numbers are not a multiple of 32 up to 256"
    if size % sublanes:
        return f"pages of {size} rows are not a multiple of {sublanes}"
    if 4 * pages.size > TABLE_BYTES:
        return f"a table of {pages.size} pages is larger than the scalar memory"
    if window is not None and window < 1:
        return f"a window of {window} rows is empty"
    return None


def _sublanes(dtype: Any) -> int:
    """Rows of one register tile."""
    return 32 // jnp.dtype(dtype).itemsize


def _tile_rows(context: Any, pages: int) -> int:
    """Rows of a tile: several pages where they are small."""
    _, Hk, size, d = context.shape
    sublanes, row = _sublanes(context.dtype), Hk * pl.cdiv(d, 128) * 128 * context.dtype.itemsize
    most = max(min(TILE_ROWS, TILES_BYTES // (4 * row)) // sublanes * sublanes, sublanes)
    return most if size > most else min(most // size, pages) * size


def _own_block(b: Any, *_: Any) -> tuple[Any, ...]:
    return b, 0, 0, 0


def _pad(x: Float[Array, "B Hk rows d"], multiple: int, wide: int) -> Float[Array, "B Hk M wide"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, wide - x.shape[3])))


class Sight(NamedTuple):
    """The rows [begin, end) of its context that a sequence sees, in tiles [first, beyond)."""

    begin: Any
    end: Any
    first: Any
    beyond: Any


class Place(NamedTuple):
    """Where a tile begins in the context; of its rows those before `new` were in the one before."""

    page: Any
    start: Any  # within the page
    row: Any
    new: Any


def sight_of(layout: Layout, length: Any) -> Sight:
    """What a sequence of `length` context rows sees."""
    begin = 0 if layout.window is None else jnp.maximum(length - layout.window, 0)
    end = jnp.minimum(length, layout.pages * layout.size)

    def tile(row: Any) -> Any:
        if layout.size <= layout.tile:
            return row // layout.tile
        return row // layout.size * layout.parts + row % layout.size // layout.tile

    first = tile(begin)
    return Sight(begin, end, first, jnp.where(begin < end, tile(end - 1) + 1, first))


def place_of(layout: Layout, tile: Any) -> Place:
    """Where a tile stands."""
    if layout.size <= layout.tile:
        row = tile * layout.tile
        return Place(row // layout.size, 0, row, row)
    page, part = tile // layout.parts, tile % layout.parts
    start = jnp.minimum(part * layout.tile, layout.size - layout.tile)
    new = page * layout.size + part * layout.tile
    return Place(page, start, page * layout.size + start, new)


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
    b, Hk = pl.program_id(0), query.shape[1]
    sight = sight_of(layout, length[b])

    def copies(b: Any, sight: Sight, tile: Any, side: Any, act: Any) -> None:
        copy = functools.partial(_copies, layout, (context_key, context_value), (keys, values))
        copy(pages, b, sight, tile, side, arrived.at[side], act)

    def fetch_first(b: Any, side: Any) -> None:
        sight = sight_of(layout, length[b])

        @pl.when(sight.first < sight.beyond)
        def _() -> None:
            copies(b, sight, sight.first, side, _start)

    @pl.when(b == 0)
    def _() -> None:
        turn[0] = 0
        fetch_first(0, 0)

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

    def over_tile(tile: Any, side: Any) -> Any:
        @pl.when(tile + 1 < sight.beyond)
        def _() -> None:
            copies(b, sight, tile + 1, 1 - side, _start)

        @pl.when((tile + 1 == sight.beyond) & (b + 1 < pl.num_programs(0)))
        def _() -> None:
            fetch_first(b + 1, 1 - side)

        copies(b, sight, tile, side, _wait)
        place = place_of(layout, tile)
        begin = jnp.maximum(sight.begin, place.new) - place.row
        end = sight.end - place.row

        @pl.when((begin > 0) | (end < layout.tile))
        def _() -> None:
            _clear(values.at[side], begin, end)

        def over_head(h: Any, carry: Any) -> Any:
            scores = _scores(query[0, h], keys[side, h], scale)
            row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where((row >= begin) & (row < end), scores, -jnp.inf)
            highest = jnp.maximum(top[h], jnp.max(scores, axis=-1, keepdims=True))
            weight, old = jnp.exp(scores - highest), jnp.exp(top[h] - highest)
            total[h] = total[h] * old + jnp.sum(weight, axis=-1, keepdims=True)
            mixed[h] = mixed[h] * old + _mix(weight, values[side, h])
            top[h] = highest
            return carry

        jax.lax.fori_loop(0, Hk, over_head, None)
        return 1 - side

    side = jax.lax.fori_loop(sight.first, sight.beyond, over_tile, turn[0])
    turn[0] = side

    @pl.when((sight.first == sight.beyond) & (b + 1 < pl.num_programs(0)))
    def _() -> None:
        fetch_first(b + 1, side)

    def finish(h: Any, carry: Any) -> Any:
        out[0, h] = (mixed[h] / total[h]).astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, Hk, finish, None)


def _copies(
    layout: Layout,
    contexts: tuple[Any, Any],
    tiles: tuple[Any, Any],
    pages: Any,
    b: Any,
    sight: Sight,
    tile: Any,
    side: Any,
    arrived: Any,
    act: Any,
) -> None:
    """`act` on every copy that fills a tile: of its seen pages only."""
    place, size = place_of(layout, tile), layout.size

    def page(number: Any, carry: Any) -> Any:
        found = pages[b * layout.pages + number]
        for context, held in zip(contexts, tiles, strict=True):
            if size > layout.tile:
                source = context.at[found, :, pl.ds(place.start, layout.tile)]
                act(pltpu.make_async_copy(source, held.at[side], arrived))
            else:
                to = held.at[side, :, pl.ds((number - place.page) * size, size)]
                act(pltpu.make_async_copy(context.at[found], to, arrived))
        return carry

    if size > layout.tile:
        page(place.page, None)
    else:
        begin = jnp.maximum(sight.begin // size, place.page)
        beyond = jnp.minimum(pl.cdiv(sight.end, size), place.page + layout.tile // size)
        jax.lax.fori_loop(begin, beyond, page, None)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()


def _clear(values: Any, begin: Any, end: Any) -> None:
    """Zeros where no row is seen: what lies there may be no number, and 0 * nan is one's end."""

    def head(h: Any, carry: Any) -> Any:
        held = values[h].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, held.shape, 0)
        kept = jnp.where((row >= begin) & (row < end), held, 0.0)
        values[h] = kept.astype(values.dtype)
        return carry

    jax.lax.fori_loop(0, values.shape[0], head, None)


def _scores(query: Any, key: Any, scale: float) -> Any:
    dims = (((1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(query, key, dims, preferred_element_type=jnp.float32)
    return scores * scale


def _mix(weight: Any, value: Any) -> Any:
    return jnp.dot(weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
