"""Products with block-scaled FP8 matrices on Hopper (wgmma) and Blackwell (tcgen05).

Matrices lie [in, out] here, and tensor cores multiply 8-bit operands only if both are contiguous
along the summed axis. So a tile of the matrix is widened to bfloat16 on its way through shared
memory (exact, as bfloat16 holds every e4m3 number) and multiplied in that type, which tensor cores
do transpose. Nothing has to be stored in another order, the weights cross HBM once, in FP8, and
quantised activations take the same path: their products are as exact as an 8-bit unit's, whose
higher peak is out of reach of the few rows of a decode step anyway.

Few rows are the narrow side of the tensor core's tile: it computes the transposed product, 128
outputs by 8 to 64 rows. The summed axis is split among blocks of the grid until they fill the chip;
XLA adds the parts while it transposes and rounds them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.fp8_matmul.reference import quantise_tokens
from dspark_jax.pallas_kernels.gpu_target import plgpu

TILE = 128
"""Inputs and outputs of a tile of the matrix: one block, so one scale."""
HALF = TILE // 2
"""Of its inputs: one half is widened while the other is multiplied."""
MOST_ROWS = 64
"""Of a tile; both accumulators of more would not fit the registers of a warpgroup."""
STAGES_BYTES = 72 * 1024
"""Of shared memory for tiles in flight: leaves room for two blocks of the grid on a core."""


def unsupported(
    x: Any, values: Any, scales: Any, layer: Any = None, *, block: tuple[int, int]
) -> str | None:
    """Why the kernel cannot run these, or None."""
    if reason := gpu_target.missing():
        return reason
    if x.ndim != 2 or values.ndim != (2 if layer is None else 3) or not x.shape[0]:
        return f"x {x.shape} and the matrix {values.shape} are not rows and one matrix or a stack."
    return refused(x, values, scales, block)


def refused(x: Any, values: Any, scales: Any, block: tuple[int, int]) -> str | None:
    """Why matrices of these types and sizes cannot be multiplied, stacked or not."""
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}; the kernel multiplies bfloat16."
    if values.dtype != jnp.float8_e4m3fn or scales.dtype != jnp.float32:
        return f"values are {values.dtype} and scales {scales.dtype}, not e4m3fn and float32."
    if block != (TILE, TILE):
        return f"blocks are {block}; the kernel scales {TILE} x {TILE}."
    size_in, size_out = values.shape[-2:]
    if size_in % HALF or size_out % HALF:
        return f"the matrix is {size_in} x {size_out}; both must be multiples of {HALF}."
    return None


def fp8_matmul(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A16: `x @ kernel`, accumulated in float32 and returned in x's type."""
    assert not (reason := unsupported(x, values, scales, layer, block=block)), reason
    return _product(x, None, values, scales, layer, arch, interpret).astype(x.dtype)


def fp8_matmul_w8a8(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A8: the same with x quantised too, every token by itself in groups of 128 channels.

    XLA quantises; only the product is here.
    """
    assert not (reason := unsupported(x, values, scales, layer, block=block)), reason
    tokens, token_scales = quantise_tokens(x, TILE)
    tokens = tokens.astype(jnp.bfloat16)
    return _product(tokens, token_scales, values, scales, layer, arch, interpret).astype(x.dtype)


def _product(
    x: Float[Array, "R i"],
    row_scales: Float[Array, "R k"] | None,
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None,
    arch: gpu_target.Arch | None,
    interpret: Any,
) -> Float[Array, "R o"]:
    """Every row times the one matrix meant, in float32."""
    R, arch = len(x), gpu_target.chosen(arch, interpret)
    if layer is None:
        values, scales, layer = values[None], scales[None], jnp.zeros((), jnp.int32)
    rows = min(gpu_target.multiple(R, 8 if arch == "sm_90a" else 16), MOST_ROWS)
    matrix = jnp.full(pl.cdiv(R, rows), layer, jnp.int32)
    return product_of_tiles(x, row_scales, values, scales, matrix, rows, arch, interpret)[:R]


def product_of_tiles(
    x: Float[Array, "R i"],
    row_scales: Float[Array, "R k"] | None,
    values: Float8e4m3fn[Array, "L i o"],
    scales: Float[Array, "L k n"],
    matrix: Int[Array, "tiles"],
    rows: int,
    arch: gpu_target.Arch,
    interpret: Any,
) -> Float[Array, "padded o"]:
    """Tiles of `rows` rows, each times a matrix of its own; where that is negative, anything."""
    (R, size_in), size_out, padded = x.shape, values.shape[-1], len(matrix) * rows
    # What copies bring into shared memory in tiles of 8 rows must have a multiple of them.
    arrays = [matrix, jnp.pad(x, ((0, -R % 8), (0, 0))), values, scales]
    if row_scales is not None:
        arrays.append(jnp.pad(row_scales, ((0, padded - R), (0, 0))).T)
    blocks, tiles = pl.cdiv(size_in, TILE), pl.cdiv(size_out, TILE)
    share = share_of(blocks, tiles * len(matrix), 2 * gpu_target.CORES[arch])
    stages = max(2, min(share, STAGES_BYTES // (TILE * (TILE + 2 * rows))))
    parts = plgpu.kernel(
        functools.partial(_kernel, blocks=blocks, share=share),
        out_type=jax.ShapeDtypeStruct((pl.cdiv(blocks, share), tiles * TILE, padded), jnp.float32),
        scratch_types=_scratch(rows, stages, size_out, arch == "sm_90a"),
        # Tiles of rows last: those that read the same part of a matrix run together.
        grid=(pl.cdiv(blocks, share), tiles, len(matrix)),
        grid_names=("share", "tile", "rows"),
        interpret=interpret or None,
    )(*arrays)
    return jnp.sum(parts, axis=0).T[:, :size_out]


def share_of(blocks: int, tiles: int, wanted: int) -> int:
    """Blocks along the summed axis for one block of the grid, so that `wanted` of these exist.

    Not fewer than four, which pay for the parts written and read again.
    """
    return min(blocks, max(4, pl.cdiv(blocks * tiles, wanted)))


def _scratch(rows: int, stages: int, size_out: int, hopper: bool) -> dict[str, Any]:
    columns = HALF if size_out % TILE else TILE
    scratch = {
        "x_tiles": gpu_target.tiled((stages, rows, TILE), jnp.bfloat16, 64),
        "tiles": gpu_target.tiled((stages, TILE, TILE), jnp.float8_e4m3fn, columns),
        "widened": gpu_target.tiled((2, HALF, TILE), jnp.bfloat16, 64),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }
    if not hopper:
        scratch["product"] = plgpu.TMEM((TILE, rows), jnp.float32)
        scratch["multiplied"] = plgpu.Barrier(num_barriers=2, orders_tensor_core=True)
    return scratch


def _kernel(matrix, x, values, scales, *refs, blocks: int, share: int, **scratch: Any):
    """One tile [128 outputs, rows] of one part, if its rows have a matrix."""
    index = matrix[lax.axis_index("rows")]

    @pl.when(index >= 0)
    def _():
        _part_of_tile(index, x, values, scales, refs, blocks, share, scratch)


def _part_of_tile(
    index: Any, x: Any, values: Any, scales: Any, refs: Any, blocks: int, share: int, scratch: Any
) -> None:
    """The sum over `share` blocks of inputs."""
    *row_scales, parts = refs
    part, tile, row_tile = map(lax.axis_index, ("share", "tile", "rows"))
    x_tiles, tiles, arrived = scratch["x_tiles"], scratch["tiles"], scratch["arrived"]
    (stages, rows, _), hopper = x_tiles.shape, "product" not in scratch
    multiply = _multiply_hopper if hopper else _multiply_blackwell
    layout = plgpu.Layout.WGMMA if hopper else plgpu.Layout.TCGEN05
    outputs, some_rows = pl.ds(tile * TILE, TILE), pl.ds(row_tile * rows, rows)
    first = part * share
    count = jnp.minimum(share, blocks - first)

    def fetch(i: Any) -> None:
        slot, inputs = lax.rem(i, stages), pl.ds((first + i) * TILE, TILE)
        plgpu.copy_gmem_to_smem(x.at[some_rows, inputs], x_tiles.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(values.at[index, inputs, outputs], tiles.at[slot], arrived.at[slot])

    for i in range(stages - 1):
        pl.when(i < count)(functools.partial(fetch, jnp.int32(i)))

    def add(i: Any, total: Any) -> Any:
        slot = lax.rem(i, stages)
        scale = scales[index, first + i, tile]
        plgpu.barrier_wait(arrived.at[slot])
        # A slot is filled again once every warp is past its last product, which `multiply` awaits.
        refill = pl.when(i + stages - 1 < count)
        product = multiply(slot, lambda: refill(lambda: fetch(i + stages - 1)), scratch)
        if row_scales:
            by_row = plgpu.load(
                row_scales[0].at[first + i, some_rows], layout=layout.reduce(0), optimized=False
            )
            product = product * lax.broadcast_in_dim(by_row, product.shape, (1,))
        return total + product * scale

    zero = plgpu.layout_cast(jnp.zeros((TILE, rows), jnp.float32), layout)
    total = lax.fori_loop(0, count, add, zero)
    gpu_target.store(parts.at[part, outputs, some_rows], total)


def _widen(slot: Any, half: int, scratch: dict[str, Any]) -> None:
    """Half a tile in bfloat16, where the tensor core reads it."""
    inputs = pl.ds(half * HALF, HALF)
    narrow = plgpu.load(scratch["tiles"].at[slot, inputs], layout=plgpu.Layout.WGMMA_UPCAST_2X)
    scratch["widened"][half] = narrow.astype(jnp.float32).astype(jnp.bfloat16)


def _multiply_hopper(slot: Any, refill: Any, scratch: dict[str, Any]) -> Any:
    """The tile's product [128 outputs, rows].

    Warps wait for their own products only. A half is overwritten, and a slot refilled, behind a
    `commit_smem` (a barrier of all warps) that comes after each has waited for its last reader.
    """
    widened, x_tile = scratch["widened"], scratch["x_tiles"].at[slot]

    def both(sum_ref: Any) -> Any:
        _widen(slot, 0, scratch)
        plgpu.commit_smem()
        refill()
        plgpu.wgmma(sum_ref, widened.at[0].T, x_tile.at[:, pl.ds(0, HALF)].T)
        _widen(slot, 1, scratch)
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()
        plgpu.wgmma(sum_ref, widened.at[1].T, x_tile.at[:, pl.ds(HALF, HALF)].T)
        return sum_ref[...]

    return pl.run_scoped(both, plgpu.ACC((TILE, x_tile.shape[0]), jnp.float32))


def _multiply_blackwell(slot: Any, refill: Any, scratch: dict[str, Any]) -> Any:
    """The tile's product [128 outputs, rows], through tensor memory."""
    widened, x_tile, product = scratch["widened"], scratch["x_tiles"].at[slot], scratch["product"]
    multiplied = scratch["multiplied"]
    for half in range(2):
        _widen(slot, half, scratch)
        plgpu.commit_smem()
        if not half:
            refill()
        plgpu.tcgen05_mma(
            product,
            widened.at[half].T,
            x_tile.at[:, pl.ds(half * HALF, HALF)].T,
            multiplied.at[half],
            accumulate=bool(half),
        )
    plgpu.barrier_wait(multiplied.at[0])
    plgpu.barrier_wait(multiplied.at[1])
    result = plgpu.async_load_tmem(product)
    plgpu.wait_load_tmem()
    return result
