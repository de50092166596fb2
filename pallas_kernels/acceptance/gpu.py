"""What rejection sampling needs of a vocabulary, on GPUs: every logit is read once.

Rows of logits are the rows of a tile, whose columns pass through registers; what is kept of them
are maxima and sums. Where there are few rows, one row's vocabulary is folded into several, and
blocks of the grid share the rest; XLA joins what they found. No probabilities, no noise and no
scaled logits are ever written.

One body serves Hopper and Blackwell: nothing here is multiplied.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.acceptance.reference import RowStatistics, in_target
from dspark_jax.pallas_kernels.gpu_target import plgpu
from dspark_jax.pallas_kernels.markov.gpu import NOTHING, signed_gumbel
from dspark_jax.pallas_kernels.markov.reference import LOWEST

ROWS = 64
"""Of a tile, so that a warp has whole rows of it."""
STATISTICS_TILE, DRAW_TILE = 64, 32
"""Columns at once: 16 KiB of float32 logits, of one array or of two."""
STAGES = 3
BLOCKS = 3
"""That a core has registers for at a time: one waits for copies while others count."""
NARROWEST = 32
"""Bytes of a row that a swizzled copy is made of."""
FLOATS = (jnp.bfloat16, jnp.float32)


class Cut(NamedTuple):
    """How rows of a vocabulary are laid over the grid: `fold` consecutive parts of each row are
    rows of the kernel, `columns` wide, and block `part` has `share` consecutive tiles of them."""

    rows: int
    fold: int
    columns: int
    tile: int
    share: int
    parts: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.parts, pl.cdiv(self.rows * self.fold, ROWS)


def unsupported_row_statistics(logits: Any, tokens: Any, temperature: Any) -> str | None:
    """Why `row_statistics` of these shapes and types cannot be run here; None if it can."""
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or 0 in logits.shape:
        return f"Logits {logits.shape} and tokens {tokens.shape} are not rows of sequences."
    rows = logits.shape[0] * logits.shape[1]
    return _unsupported(rows, logits.shape[-1], logits.dtype)


def unsupported_residual_draw(p_logits: Any, q_logits: Any, *others: Any) -> str | None:
    """Why `residual_draw` of these shapes and types cannot be run here; None if it can."""
    del others
    if p_logits.ndim != 2 or q_logits.ndim != 2 or 0 in (*p_logits.shape, *q_logits.shape):
        return f"Logits {p_logits.shape} and {q_logits.shape} are not one row per sequence."
    kinds = p_logits.dtype, q_logits.dtype
    return next(filter(None, (_unsupported(*p_logits.shape, kind) for kind in kinds)), None)


def _unsupported(rows: int, V: int, dtype: Any) -> str | None:
    if reason := gpu_target.missing():
        return reason
    if dtype not in FLOATS:
        return f"Logits are {dtype}, neither bfloat16 nor float32."
    if _fold(rows, V, dtype) is None:
        return (
            f"{rows} rows of {V} {dtype} do not fold into rows by 8 of {NARROWEST} bytes by many."
        )
    return None


def row_statistics(
    logits: Float[Array, "B S V"],
    tokens: Int[Array, "B S"],
    temperature: Float[Array, "B"],
    *,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> RowStatistics:
    """Of softmax(logits / temperature), or of temperature 1 where it is 0."""
    B, S, V = logits.shape
    cut = _cut(B * S, V, STATISTICS_TILE, logits.dtype, gpu_target.chosen(arch, interpret))
    inverse = jnp.repeat(1 / jnp.where(temperature == 0, 1.0, temperature), S)
    # Of every part of a row, the column in it that is the row's own; elsewhere there is none.
    column = _folded(tokens.reshape(-1), cut) - _first_entries(cut)
    of_rows = _folded(inverse.astype(jnp.float32), cut), column.astype(jnp.float32)
    entry, top, own, total = _run(_statistics, cut, (logits,), of_rows, interpret)
    most = jnp.max(top, axis=-1)
    lse = most + jnp.log(jnp.sum(total * jnp.exp(top - most[:, None]), axis=-1))
    numbers = _first_largest_of(entry, top, cut), jnp.max(own, axis=-1) - lse, lse
    return RowStatistics(*(x.reshape(B, S) for x in numbers))


def residual_draw(
    p_logits: Float[Array, "B V"],
    q_logits: Float[Array, "B Vd"],
    p_lse: Float[Array, "B"],
    q_lse: Float[Array, "B"],
    refused: Bool[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    target_id: Int[Array, "Vd"] | None = None,
    *,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Int[Array, "B"]:
    """A draw from max(p - q, 0) renormalised where a draft was `refused`, from p elsewhere.

    XLA brings q of a reduced vocabulary to the target's first.
    """
    B, V = p_logits.shape
    q_logits = in_target(q_logits, target_id, V)
    narrow = min(p_logits.dtype, q_logits.dtype, key=lambda kind: jnp.dtype(kind).itemsize)
    cut = _cut(B, V, DRAW_TILE, narrow, gpu_target.chosen(arch, interpret))
    numbers = (*lax.bitcast_convert_type(words, jnp.int32).T, temperature, p_lse, q_lse)
    of_rows = [_folded(x if i < 2 else x.astype(jnp.float32), cut) for i, x in enumerate(numbers)]
    of_rows = (*of_rows, _first_entries(cut))
    found = _run(_draw, cut, (p_logits, q_logits), of_rows, interpret)
    from_p, top_p, residual, top_left = found
    chosen = refused & (temperature > 0) & (jnp.max(top_left, axis=-1) > NOTHING)
    drawn = (_first_largest_of(*x, cut) for x in ((residual, top_left), (from_p, top_p)))
    return jnp.where(chosen, *drawn)


def _cut(rows: int, V: int, tile: int, dtype: Any, arch: str) -> Cut:
    """As few idle rows as the vocabulary's divisors allow, and blocks for every core."""
    fold = _fold(rows, V, dtype)
    assert fold is not None, "unsupported"
    columns = V // fold
    tiles, row_tiles = pl.cdiv(columns, tile), pl.cdiv(rows * fold, ROWS)
    share = pl.cdiv(tiles * row_tiles, BLOCKS * gpu_target.CORES[arch])
    return Cut(rows, fold, columns, tile, share, pl.cdiv(tiles, share))


def _fold(rows: int, V: int, dtype: Any) -> int | None:
    """Parts of a row: a tile is filled, and copies have rows by eight and columns by 32 bytes."""
    size = jnp.dtype(dtype).itemsize

    def whole(fold: int) -> bool:
        return V % fold == 0 and V // fold * size % NARROWEST == 0

    fold = 8 // math.gcd(rows, 8)
    if not whole(fold):
        return None
    while 2 * fold * rows <= ROWS and whole(2 * fold):
        fold *= 2
    return fold


def _folded(x: Array, cut: Cut) -> Array:
    """A number of every row, for every row of the kernel; zeros for those that fill a tile."""
    return jnp.pad(jnp.repeat(x, cut.fold), (0, -(cut.rows * cut.fold) % ROWS))


def _first_entries(cut: Cut) -> Array:
    """The number of the first entry that every row of the kernel has."""
    return jnp.arange(cut.grid[1] * ROWS, dtype=jnp.int32) % cut.fold * cut.columns


def _run(
    body: Callable[..., None],
    cut: Cut,
    logits: tuple[Array, ...],
    of_rows: tuple[Array, ...],
    interpret: Any,
) -> list[Float[Array, "R parts"]]:
    """Four numbers that every block kept of its rows, parts in the order of a row's vocabulary."""
    rows = cut.rows * cut.fold
    found = plgpu.kernel(
        functools.partial(body, cut=cut),
        out_type=[jax.ShapeDtypeStruct((cut.parts, cut.grid[1] * ROWS), jnp.float32)] * 4,
        scratch_types={
            "tiles": [_held(cut, x.dtype) for x in logits],
            "arrived": plgpu.Barrier(num_arrivals=len(logits), num_barriers=STAGES),
        },
        grid=cut.grid,
        grid_names=("part", "rows"),
        interpret=interpret or None,
    )(*(x.reshape(rows, cut.columns) for x in logits), *of_rows)
    return [x[:, :rows].T.reshape(cut.rows, -1) for x in found]


def _first_largest_of(
    column: Float[Array, "R parts"], top: Float[Array, "R parts"], cut: Cut
) -> Int[Array, "R"]:
    """The entry of the whole vocabulary that the first of the largest parts has as a column."""
    best = jnp.argmax(top, axis=-1)[:, None]
    own = jnp.take_along_axis(column, best, axis=-1).astype(jnp.int32)
    return (best // cut.parts * cut.columns + own)[:, 0].astype(jnp.int32)


def _held(cut: Cut, dtype: Any) -> Any:
    """Shared memory for tiles in flight, swizzled as far as the vocabulary's divisors allow."""
    size = jnp.dtype(dtype).itemsize
    swizzles = (n // size for n in (128, 64, NARROWEST) if n // size <= cut.tile)
    wide = next(n for n in swizzles if cut.columns % n == 0)
    return gpu_target.tiled((STAGES, ROWS, cut.tile), dtype, wide)


def _each_tile(
    add: Callable[..., Any], start: Any, sources: Any, scratch: dict[str, Any], cut: Cut
) -> Any:
    """`start` after `add(kept, column, real, *tiles)` of every tile of this block."""
    some_rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    first = lax.axis_index("part") * cut.share
    steps = jnp.minimum(cut.share, pl.cdiv(cut.columns, cut.tile) - first)

    def fetch(step: Any) -> None:
        place = lax.rem(step, STAGES)
        columns = pl.ds((first + step) * cut.tile, cut.tile)
        for source, tiles in zip(sources, scratch["tiles"], strict=True):
            plgpu.copy_gmem_to_smem(
                source.at[some_rows, columns], tiles.at[place], scratch["arrived"].at[place]
            )

    for step in range(STAGES):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))

    def one(step: Any, kept: Any) -> Any:
        place = lax.rem(step, STAGES)
        plgpu.barrier_wait(scratch["arrived"].at[place])
        tiles = [
            plgpu.load(x.at[place], layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            for x in scratch["tiles"]
        ]
        plgpu.commit_smem()  # orders what was read here before the copy that overwrites it
        pl.when(step + STAGES < steps)(lambda: fetch(step + STAGES))
        column = (first + step) * cut.tile + plgpu.broadcasted_iota(
            jnp.int32, (ROWS, cut.tile), 1, layout=plgpu.Layout.WGMMA
        )
        return add(kept, column, column < cut.columns, *tiles)

    return lax.fori_loop(0, steps, one, start)


def _of_rows(*sources: Any) -> list[Any]:
    """Numbers of the rows of this block."""
    some_rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    return [
        plgpu.load(x.at[some_rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        for x in sources
    ]


def _write(outputs: Any, values: Any) -> None:
    part, some_rows = lax.axis_index("part"), pl.ds(lax.axis_index("rows") * ROWS, ROWS)
    for output, value in zip(outputs, values, strict=True):
        output[part, some_rows] = value


def _full(value: float) -> Any:
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _spread(x: Any, like: Any) -> Any:
    return lax.broadcast_in_dim(x, like.shape, (0,))


def _first_largest(values: Any, number: Any) -> tuple[Any, Any]:
    """(largest, its first column) of every row."""
    high = jnp.max(values, axis=1)
    found = values == _spread(high, values)
    return high, -jnp.max(jnp.where(found, -number, NOTHING), axis=1)


def _statistics(logits, inverse, token, *outputs, cut: Cut, **scratch: Any) -> None:
    """What is kept of some rows: (best entry, its logit, the token's logit, sum)."""
    inverse, token = _of_rows(inverse, token)

    def add(kept: Any, column: Any, real: Any, tile: Any) -> Any:
        best, top, own, total = kept
        scaled = jnp.maximum(tile * _spread(inverse, tile), LOWEST)
        scaled, number = jnp.where(real, scaled, NOTHING), column.astype(jnp.float32)
        high, first = _first_largest(scaled, number)
        most = jnp.maximum(top, high)
        here = jnp.sum(jnp.exp(scaled - _spread(most, tile)), axis=1)
        mine = jnp.max(jnp.where(number == _spread(token, tile), scaled, LOWEST), axis=1)
        best = jnp.where(high > top, first, best)
        return best, most, jnp.maximum(own, mine), total * jnp.exp(top - most) + here

    start = (_full(0.0), _full(NOTHING), _full(LOWEST), _full(0.0))
    _write(outputs, _each_tile(add, start, [logits], scratch, cut))


def _draw(
    p_logits, q_logits, low, high, temperature, p_lse, q_lse, offset, *outputs, cut: Cut,
    **scratch: Any,
) -> None:  # fmt: skip
    """Draws of some rows from p, and from p - q: (entry, its sum) of either."""
    low, high, heat, p_lse, q_lse, offset = _of_rows(low, high, temperature, p_lse, q_lse, offset)
    scale = jnp.where(heat == 0, 1.0, heat)

    def add(kept: Any, column: Any, real: Any, p_tile: Any, q_tile: Any) -> Any:
        def spread(x: Any) -> Any:
            return _spread(x, p_tile)

        wide, number = jnp.maximum(p_tile, LOWEST), column.astype(jnp.float32)
        noise = signed_gumbel(column + spread(offset), low, high)
        p = jnp.exp(wide / spread(scale) - spread(p_lse))
        q = jnp.exp(q_tile / spread(scale) - spread(q_lse))
        sums = jnp.where(real, wide + spread(heat) * noise, NOTHING)
        more = real & (p > q)
        left = jnp.where(more, jnp.log(jnp.where(more, p - q, 1.0)) + noise, NOTHING)
        best = []
        for values, (entry, top) in zip((sums, left), (kept[:2], kept[2:]), strict=True):
            most, first = _first_largest(values, number)
            best += [jnp.where(most > top, first, entry), jnp.maximum(top, most)]
        return tuple(best)

    start = (_full(0.0), _full(NOTHING)) * 2
    _write(outputs, _each_tile(add, start, [p_logits, q_logits], scratch, cut))
