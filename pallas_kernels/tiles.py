"""Walking over paged contexts on a TPU: only what is seen is copied, while the last is computed.

A context is an array [N heads size width] of pages that sequences own in any order. A tile is
several whole pages or a part of one. One program per sequence, or per part of its queries, walks
over the tiles it sees; the next tile is always on its way, across the border between programs too,
because a short context would otherwise be all latency.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE_ROWS = 512
TILES_BYTES = 8 << 20
"""What all tiles, two of each array, may hold of the vector memory."""
TABLE_BYTES = 512 << 10
"""Of the scalar memory, for numbers of pages and tiles."""

PAGES_AT_ONCE = 4
"""Copies that one turn of the loop sets off: a turn costs as much as a page."""
CLEARED = 64
"""Rows of a tile that are cleared at once: of more the registers run out."""
PARAMETERS = pltpu.CompilerParams(
    # A program prefetches for the one after it.
    dimension_semantics=("arbitrary",),
    # To check the addresses takes longer than to start the copy of a page.
    disable_bounds_checks=True,
)


class Layout(NamedTuple):
    """How the contexts of all sequences are cut."""

    pages: int  # P, of a sequence
    size: int  # rows of a page
    tile: int  # rows of a tile
    window: int | None = None  # rows that are seen before the end, None for all

    @property
    def parts(self) -> int:
        """Tiles of a page; the last begins early where they do not divide it. 0: pages are less."""
        return pl.cdiv(self.size, self.tile) if self.size > self.tile else 0

    @property
    def tiles(self) -> int:
        """Of a whole context."""
        return self.pages * self.parts or pl.cdiv(self.pages * self.size, self.tile)


class Sight(NamedTuple):
    """The rows [begin, end) of its context that a sequence sees: numbers [first, beyond)."""

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


class Streams(NamedTuple):
    """What is copied: `paged` and `whole` pair an array with its two tiles.

    `whole` arrays [programs tiles …] are cut into tiles already. `turn` holds which of two is next.
    """

    layout: Layout
    pages: Any  # [B * P]
    paged: tuple[tuple[Any, Any], ...]
    whole: tuple[tuple[Any, Any], ...]
    turn: Any
    arrived: Any
    sharing: int = 1  # programs in a row that walk over the same sequence


def sublanes(dtype: Any) -> int:
    """Rows of one register tile."""
    return 32 // jnp.dtype(dtype).itemsize


def lay_out(pages: Any, contexts: tuple[Any, ...], window: int | None = None) -> Layout:
    """Tiles as large as fit, for contexts [N heads size width] and a table [B P]."""
    size, dtype = contexts[0].shape[2], contexts[0].dtype
    width = sum(x.shape[1] * pl.cdiv(x.shape[3], 128) * 128 for x in contexts)
    fitting = TILES_BYTES // (2 * width * jnp.dtype(dtype).itemsize)
    step = sublanes(dtype)
    most = max(min(TILE_ROWS, fitting) // step * step, step)
    tile = most if size > most else min(most // size, pages.shape[1]) * size
    return Layout(pages.shape[1], size, tile, window)


def refused(pages: Any, size: int, dtype: Any, tiles: int = 0) -> str | None:
    """Why pages of `size` rows, and lists of so many tiles, cannot be walked over."""
    if size % sublanes(dtype):
        return f"pages of {size} rows are not a multiple of {sublanes(dtype)}"
    if 4 * (pages.size + tiles) > TABLE_BYTES:
        return f"a table of {pages.size} pages is larger than the scalar memory"
    return None


def sight_of(layout: Layout, length: Any) -> Sight:
    """What a sequence of `length` context rows sees."""
    begin = 0 if layout.window is None else jnp.maximum(length - layout.window, 0)
    end = jnp.minimum(length, layout.pages * layout.size)

    def tile(row: Any) -> Any:
        if not layout.parts:
            return row // layout.tile
        return row // layout.size * layout.parts + row % layout.size // layout.tile

    first = tile(begin)
    return Sight(begin, end, first, jnp.where(begin < end, tile(end - 1) + 1, first))


def place_of(layout: Layout, tile: Any) -> Place:
    """Where a tile stands."""
    if not layout.parts:
        row = tile * layout.tile
        return Place(row // layout.size, 0, row, row)
    page, part = tile // layout.parts, tile % layout.parts
    start = jnp.minimum(part * layout.tile, layout.size - layout.tile)
    front = page * layout.size
    return Place(page, start, front + start, front + part * layout.tile)


def walk(
    streams: Streams,
    sight: Callable[[Any], Sight],
    visit: Callable[[Any, Place, Any, Any], None],
    order: Callable[[Any, Any], Any] = lambda b, number: number,
) -> None:
    """`visit(side, place, begin, end)` every tile that this program sees.

    `side` of every pair of tiles holds it, and of its rows [begin, end) are seen for the first
    time; what lies in the others may be no number. `order(b, number)` is which tile is visited,
    and `b` the number of a program.
    """
    b, batch = pl.program_id(0), pl.num_programs(0)
    own, layout = sight(b), streams.layout

    def fetch_first(b: Any, side: Any) -> None:
        seen = sight(b)

        @pl.when(seen.first < seen.beyond)
        def _() -> None:
            _copies(streams, b, seen, order(b, seen.first), side, start)

    @pl.when(b == 0)
    def _() -> None:
        streams.turn[0] = 0
        fetch_first(0, 0)

    def over_tile(number: Any, side: Any) -> Any:
        @pl.when(number + 1 < own.beyond)
        def _() -> None:
            _copies(streams, b, own, order(b, number + 1), 1 - side, start)

        @pl.when((number + 1 == own.beyond) & (b + 1 < batch))
        def _() -> None:
            fetch_first(b + 1, 1 - side)

        tile = order(b, number)
        place = place_of(layout, tile)
        _arrive(streams, b, own, tile, side)
        visit(side, place, jnp.maximum(own.begin, place.new) - place.row, own.end - place.row)
        return 1 - side

    side = jax.lax.fori_loop(own.first, own.beyond, over_tile, streams.turn[0])
    streams.turn[0] = side

    @pl.when((own.first == own.beyond) & (b + 1 < batch))
    def _() -> None:
        fetch_first(b + 1, side)


def _copies(
    streams: Streams, b: Any, sight: Sight, tile: Any, side: Any, act: Callable[[Any], None]
) -> None:
    """`act` on every copy that fills a tile: of its seen pages only."""
    layout, arrived = streams.layout, streams.arrived.at[side]
    size, place = layout.size, place_of(layout, tile)
    for source, held in streams.whole:
        act(pltpu.make_async_copy(source.at[b, tile], held.at[side], arrived))

    def pages(begin: Any, many: int) -> None:
        for number in (begin + i for i in range(many)):
            page = streams.pages[b // streams.sharing * layout.pages + number]
            for source, held in streams.paged:
                if layout.parts:
                    rows = pl.ds(pl.multiple_of(place.start, sublanes(held.dtype)), layout.tile)
                    act(pltpu.make_async_copy(source.at[page, :, rows], held.at[side], arrived))
                else:
                    rows = pl.ds(pl.multiple_of((number - place.page) * size, size), size)
                    act(pltpu.make_async_copy(source.at[page], held.at[side, :, rows], arrived))

    if layout.parts:
        pages(place.page, 1)
    else:
        begin, beyond = _seen_pages(layout, sight, place)
        turns = (beyond - begin) // PAGES_AT_ONCE
        rest = begin + turns * PAGES_AT_ONCE
        _repeat(0, turns, lambda turn: pages(begin + turn * PAGES_AT_ONCE, PAGES_AT_ONCE))
        _repeat(rest, beyond, lambda number: pages(number, 1))


def _repeat(begin: Any, end: Any, act: Callable[[Any], None]) -> None:
    def turn(i: Any, carry: Any) -> Any:
        act(i)
        return carry

    jax.lax.fori_loop(begin, end, turn, None)


def _arrive(streams: Streams, b: Any, sight: Sight, tile: Any, side: Any) -> None:
    """Wait for a tile; where all its pages are seen, for their bytes at once."""
    layout = streams.layout
    begin, beyond = _seen_pages(layout, sight, place_of(layout, tile))
    full = jnp.logical_and(not layout.parts, beyond - begin == layout.tile // layout.size)

    @pl.when(full)
    def _() -> None:
        for _, held in (*streams.paged, *streams.whole):
            wait(pltpu.make_async_copy(held.at[side], held.at[side], streams.arrived.at[side]))

    @pl.when(jnp.logical_not(full))
    def _() -> None:
        _copies(streams, b, sight, tile, side, wait)


def _seen_pages(layout: Layout, sight: Sight, place: Place) -> tuple[Any, Any]:
    """The seen pages of a tile of whole pages: numbers [begin, beyond)."""
    begin = jnp.maximum(sight.begin // layout.size, place.page)
    beyond = jnp.minimum(pl.cdiv(sight.end, layout.size), place.page + layout.tile // layout.size)
    return begin, beyond


def start(copy: Any) -> None:
    """Set a copy off."""
    copy.start()


def wait(copy: Any) -> None:
    """Until a copy has arrived."""
    copy.wait()


def clear(held: Any, begin: Any, end: Any) -> None:
    """Zeros outside rows [begin, end) of a tile [heads rows width].

    What lies there may be no number, and a weight of zero does not hide that.
    """
    step = math.gcd(held.shape[1], CLEARED)
    parts = held.shape[1] // step

    @pl.when((begin > 0) | (end < held.shape[1]))
    def _() -> None:
        def part(number: Any) -> None:
            h, row = number // parts, number % parts * step
            rows = pl.ds(pl.multiple_of(row, step), step)
            value = held[h, rows].astype(jnp.float32)
            row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0) + row
            seen = (row >= begin) & (row < end)
            held[h, rows] = jnp.where(seen, value, 0.0).astype(held.dtype)

        _repeat(0, held.shape[0] * parts, part)
