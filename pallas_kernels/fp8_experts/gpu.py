"""Products of rows with their experts' FP8 matrices on GPUs: the kernel of `fp8_matmul`, sorted.

Every expert's rows are moved to tiles of their own, so a tile has one matrix, and an expert without
rows has no tile: its matrix is not read. An expert of several tiles is read for each of them, which
run together, so all but the first find it in the L2 cache.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.fp8_matmul import gpu as fp8_matmul

FEWEST_ROWS, MOST_ROWS = 16, 64
"""Of a tile."""


def unsupported(
    x: Any, values: Any, scales: Any, sizes: Any, layer: Any = None, *, block: tuple[int, int]
) -> str | None:
    """Why these shapes and types cannot be run here; None if they can."""
    if x.ndim != 2 or values.ndim != (3 if layer is None else 4) or not x.shape[0]:
        return f"x {x.shape} and the matrices {values.shape} are not rows and a set of experts."
    if sizes.shape != values.shape[-3:-2]:
        return f"sizes {sizes.shape} are not one for each expert of {values.shape}."
    return gpu_target.missing() or fp8_matmul.refused(x, values, scales, block)


def fp8_experts(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack E i o"],
    scales: Float[Array, "*stack E k n"],
    sizes: Int[Array, "E"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A16 of rows sorted by expert: the first `sizes[0]` by the first, and so on; in float32.

    Rows past the sum of `sizes` hold anything.
    """
    (R, _), E = x.shape, len(sizes)
    rows = tile_rows(R, E)
    # Of every expert the last tile may have one row only.
    tiles = min(E, R) + R // rows
    place, expert = places(sizes, R, rows, tiles)
    moved = jnp.zeros((tiles * rows, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
    first = jnp.zeros((), jnp.int32) if layer is None else layer * E
    y = fp8_matmul.product_of_tiles(
        moved,
        None,
        values.reshape(-1, *values.shape[-2:]),
        scales.reshape(-1, *scales.shape[-2:]),
        jnp.where(expert < E, first + expert, -1),
        rows,
        gpu_target.chosen(arch, interpret),
        interpret,
    )
    return jnp.take(y, place, axis=0, mode="clip")


def tile_rows(R: int, E: int) -> int:
    """As many as an expert has if all have alike."""
    return min(MOST_ROWS, max(FEWEST_ROWS, gpu_target.multiple(pl.cdiv(R, E), 16)))


def places(
    sizes: Int[Array, "E"], R: int, rows: int, tiles: int
) -> tuple[Int[Array, "R"], Int[Array, "tiles"]]:
    """(where every row goes, every tile's expert); what belongs to none is out of range."""
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // rows))
    row, tile = jnp.arange(R), jnp.arange(tiles)
    owner = jnp.sum(row[:, None] >= ends, axis=1)
    own = jnp.minimum(owner, len(sizes) - 1)
    begin = tile_ends[own] - -(-sizes[own] // rows)
    place = begin * rows + row - (ends[own] - sizes[own])
    place = jnp.where(owner < len(sizes), place, tiles * rows)
    return place, jnp.sum(tile[:, None] >= tile_ends, axis=1).astype(jnp.int32)
