"""Products of rows with their experts' FP8 matrices on TPUs, which read each expert hit once.

A grid over tiles of rows, of columns, experts and tiles of the sum. The experts that a tile of rows
hits come as a list, and grid steps past its end neither copy nor compute. An expert's rows begin
anywhere: windows of rows that begin at a whole tile are multiplied, and others' rows masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dspark_jax.pallas_kernels.fp8_matmul.tpu import (
    LANES,
    MOST_COLUMNS,
    MOST_SUMMED,
    VMEM_BYTES,
    X_BYTES,
    largest_divisor,
    multiplies,
    prepared,
    scale_bytes,
    spread_scales,
)

ALIGNED = 16
"""Rows at which a window may begin: bfloat16 lies in tiles of so many."""
MOST_ROWS = 1024
"""Of a tile; an expert whose rows lie in two tiles is read twice."""
FEW, MANY = 32, 128
"""Rows of a window: experts of a decode step have sixteen rows or so."""


class Visits(NamedTuple):
    """Which experts a grid visits, all int32 and known before it starts."""

    layer: Int[Array, "1"]
    start: Int[Array, "E"]
    end: Int[Array, "E"]
    """An expert's rows."""
    hit: Int[Array, "tiles steps"]
    """Experts with rows in a tile, in order; the last is repeated."""
    hits: Int[Array, "tiles"]
    """How many there are."""


def fp8_experts(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack E i o"],
    scales: Float[Array, "*stack E k n"],
    sizes: Int[Array, "E"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A16 of rows sorted by expert: the first `sizes[0]` by the first, and so on; in float32.

    Rows past the sum of `sizes` are zero here.
    """
    if layer is None:
        values, scales = values[None], scales[None]
    (R, size_in), (_, E, _, size_out), (rows, columns) = x.shape, values.shape, block
    summed = rows * largest_divisor(pl.cdiv(size_in, rows), MOST_SUMMED // rows)
    wide = columns * largest_divisor(pl.cdiv(size_out, columns), MOST_COLUMNS // columns)
    wide, steps = min(size_out, wide), pl.cdiv(size_in, summed)
    high = tile_rows(R, size_in, x.dtype.itemsize)
    tiles = pl.cdiv(R, high)
    # What a cut block's last rows are multiplied by must be zero, and not whatever VMEM holds.
    x = jnp.pad(x, ((0, tiles * high - R), (0, steps * summed - size_in)))
    visits = visited(sizes, layer, tiles, high)
    experts = visits.hit.shape[1]

    def matrix(m: Any, n: Any, e: Any, k: Any, layer: Any, _s: Any, _e: Any, hit: Any, hits: Any):
        # Past the last expert the last tile stays: nothing is copied.
        return layer[0], hit[m, e], jnp.where(e < hits[m], k, steps - 1), n

    def all_scales(m: Any, n: Any, e: Any, k: Any, layer: Any, _s: Any, _e: Any, hit: Any, _c: Any):
        return layer[0], hit[m, e], 0, 0

    once, across = pl.Buffered(buffer_count=1), pl.cdiv(size_out, wide)
    # Every tile of columns copies its experts' scales again.
    expert_bytes = size_in * size_out + across * scale_bytes(scales)
    y = pl.pallas_call(
        functools.partial(
            _kernel,
            block=block,
            size_in=size_in,
            window=min(high, FEW if R <= FEW * E else MANY),
            direct=multiplies(x.dtype, interpret),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(tiles, across, experts, steps),
            in_specs=[
                pl.BlockSpec((high, x.shape[1]), lambda m, *_: (m, 0), pipeline_mode=once),
                pl.BlockSpec((None, None, summed, wide), matrix),
                pl.BlockSpec((None, None, *scales.shape[2:]), all_scales, memory_space=pltpu.SMEM),
            ],
            out_specs=pl.BlockSpec((high, wide), lambda m, n, *_: (m, n)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(x), size_out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * size_in * size_out,
            bytes_accessed=x.nbytes + min(E, R) * expert_bytes + 4 * R * size_out,
            transcendentals=0,
        ),
        interpret=interpret,
        name="fp8_experts",
    )(*visits, x, values, scales)
    return y[:R]


def unsupported(
    x: Any, values: Any, scales: Any, sizes: Any, layer: Any = None, *, block: tuple[int, int]
) -> str | None:
    """Why these shapes and types cannot be run here; None if they can."""
    if x.ndim != 2 or values.ndim != (3 if layer is None else 4) or not x.shape[0]:
        return f"x {x.shape} and the matrices {values.shape} are not rows and a set of experts."
    if x.dtype not in (jnp.bfloat16, jnp.float32) or values.dtype != jnp.float8_e4m3fn:
        return f"x is {x.dtype}, matrices {values.dtype}; only bfloat16 or float32 by e4m3fn."
    if scales.dtype != jnp.float32 or sizes.shape != values.shape[-3:-2]:
        return f"Scales are {scales.dtype}, not float32, or sizes {sizes.shape} not one an expert."
    if block[0] % LANES or block[1] % LANES or block[0] > MOST_SUMMED or block[1] > MOST_COLUMNS:
        return f"Blocks of {block} are no multiples of {LANES} that fit a tile."
    if x.shape[1] * x.dtype.itemsize * ALIGNED > X_BYTES:
        return f"Sixteen rows of {x.shape[1]} numbers do not fit VMEM."
    return None


SEMANTICS = ("parallel", "parallel", "arbitrary", "arbitrary")
"""Of the grid: a tile's sums must be finished by the core that began them."""


def tile_rows(R: int, size_in: int, width: int) -> int:
    """Rows of x at a time, of which `width` is the bytes of one number."""
    fitting = X_BYTES // (size_in * width) // ALIGNED * ALIGNED
    return min(-(-R // ALIGNED) * ALIGNED, MOST_ROWS, max(ALIGNED, fitting))


def visited(sizes: Array, layer: Array | None, tiles: int, high: int) -> Visits:
    """The experts that every tile of `high` rows hits."""
    end = jnp.cumsum(sizes)
    start, first = end - sizes, high * jnp.arange(tiles)[:, None]
    meets = (sizes > 0) & (start < first + high) & (end > first)
    reached = jnp.cumsum(meets, axis=1)
    hits = reached[:, -1]
    step = jnp.arange(min(len(sizes), high))
    wanted = jnp.minimum(step, hits[:, None] - 1)
    # The expert that is number `wanted` comes after all where fewer were reached.
    hit = jnp.sum(reached[:, None, :] <= wanted[..., None], axis=-1)
    chosen = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1)
    return Visits(*(x.astype(jnp.int32) for x in (chosen, start, end, hit, hits)))


def clear(y: Any) -> None:
    """Begin a tile's sums."""
    y[...] = jnp.zeros_like(y)


def _kernel(
    layer: Any,
    start: Any,
    end: Any,
    hit: Any,
    hits: Any,
    x: Any,
    values: Any,
    scales: Any,
    y: Any,
    *,
    block: tuple[int, int],
    size_in: int,
    window: int,
    direct: bool,
) -> None:
    """Add what one tile of one expert's matrix gives its rows, a block of rows at a time."""
    del layer  # only the index maps read it
    m, n, e, k = (pl.program_id(axis) for axis in range(4))
    (summed, wide), (rows, columns), high = values.shape, block, x.shape[0]
    pl.when((e == 0) & (k == 0))(lambda: clear(y))
    expert = hit[m, e]
    first = jnp.maximum(start[expert] - m * high, 0)
    last = jnp.minimum(end[expert] - m * high, high)
    begin = first // ALIGNED * ALIGNED

    def multiply(j: int) -> None:
        number = k * (summed // rows) + j
        right = values[j * rows : (j + 1) * rows]
        if size_in % summed:
            row = jax.lax.broadcasted_iota(jnp.int32, right.shape, 0)
            right = jnp.where(row < size_in - number * rows, right, jnp.zeros_like(right))
        right, factor = prepared(right, x.dtype, direct)
        scale = factor * spread_scales(scales, number, n, wide, columns)
        channels = pl.ds(pl.multiple_of(number * rows, rows), rows)

        def add(i: Any, _: None) -> None:
            meant = begin + i * window
            # The last window is moved up to end with the tile, and its first rows are masked.
            here = pl.ds(pl.multiple_of(jnp.minimum(meant, high - window), ALIGNED), window)
            part = jnp.dot(x[here, channels], right, preferred_element_type=jnp.float32)
            row = here.start + jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
            own = (row >= jnp.maximum(first, meant)) & (row < last)
            y[here, :] += jnp.where(own, part * scale, 0.0)

        jax.lax.fori_loop(0, pl.cdiv(last - begin, window), add, None)

    @pl.when(e < hits[m])
    def _() -> None:
        for j in range(summed // rows):
            multiply(j)
