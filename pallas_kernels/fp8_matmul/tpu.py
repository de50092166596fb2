"""Products with one block-scaled FP8 matrix on TPUs, which read every byte of it once.

A grid over tiles of rows, of columns and of the sum. x stays in VMEM for as long as its rows do;
the matrix streams past in tiles as it is stored, of a stack only the layer meant. Each block of
rows is multiplied as eight-bit numbers wherever the matrix unit takes them, and added to a float32
total times its scales, which are scalars in SMEM.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dspark_jax.pallas_kernels.fp8_matmul.reference import quantise_tokens

LANES = 128
MOST_ROWS = 512
"""Of x at once: more rows would not make the matrix's bytes any cheaper."""
MOST_SUMMED, MOST_COLUMNS = 2048, 1024
"""Of a tile of the matrix, 2 MiB: its copy takes longer than a grid step's fixed cost."""
X_BYTES = 16 * 2**20
"""Of x that stay in VMEM."""
VMEM_BYTES = 48 * 2**20
"""Of 64 MiB on the smallest of the chips meant, beyond what compilers take unasked."""


class Tiles(NamedTuple):
    """A tile's rows of x, numbers summed and columns."""

    rows: int
    summed: int
    columns: int


def fp8_matmul(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A16: `x @ kernel`, accumulated in float32 and returned in x's type."""
    return _run(x, None, values, scales, layer, block, x.dtype, interpret)


def fp8_matmul_w8a8(
    x: Float[Array, "R i"],
    values: Float8e4m3fn[Array, "*stack i o"],
    scales: Float[Array, "*stack k n"],
    layer: Int[Array, ""] | None = None,
    *,
    block: tuple[int, int],
    interpret: Any = False,
) -> Float[Array, "R o"]:
    """W8A8: the same with x quantised too, every token by itself in groups of `block[0]` channels.

    XLA quantises; only the product is here.
    """
    tokens, token_scales = quantise_tokens(x, block[0])
    return _run(tokens, token_scales, values, scales, layer, block, x.dtype, interpret)


def unsupported(
    x: Any, values: Any, scales: Any, layer: Any = None, *, block: tuple[int, int]
) -> str | None:
    """Why these shapes and types cannot be run here; None if they can."""
    if x.ndim != 2 or values.ndim != (2 if layer is None else 3) or not x.shape[0]:
        return f"x {x.shape} and the matrix {values.shape} are not rows and one matrix or a stack."
    if x.dtype not in (jnp.bfloat16, jnp.float32) or values.dtype != jnp.float8_e4m3fn:
        return f"x is {x.dtype} and the matrix {values.dtype}; only bfloat16 or float32 by e4m3fn."
    if scales.dtype != jnp.float32:
        return f"Scales are {scales.dtype}, not float32."
    if block[0] % LANES or block[1] % LANES or block[0] > MOST_SUMMED or block[1] > MOST_COLUMNS:
        return f"Blocks of {block} are no multiples of {LANES} that fit a tile."
    if x.shape[1] * x.dtype.itemsize * 16 > X_BYTES:
        return f"Sixteen rows of {x.shape[1]} numbers do not fit VMEM."
    return None


def multiplies(left: Any, interpret: Any) -> bool:
    """Whether the matrix unit of the device compiled for takes `left` by e4m3 as they are."""
    if interpret is not False or not pltpu.is_tpu_device():
        return False
    return pltpu.get_tpu_info().is_matmul_supported(left, jnp.float8_e4m3fn)


def largest_divisor(count: int, most: int) -> int:
    """Into how many blocks to cut `count` of them, so that if possible no tile is cut short."""
    best = max(n for n in range(1, most + 1) if count % n == 0)
    return best if 2 * best > min(count, most) else min(count, most)


def _tiles(R: int, size_in: int, size_out: int, block: tuple[int, int], width: int) -> Tiles:
    """Tiles that fit: `width` is the bytes of one number of x."""
    (rows, columns), fitting = block, X_BYTES // (size_in * width)
    most = max(16, min(MOST_ROWS, fitting // 32 * 32))
    summed = rows * largest_divisor(-(-size_in // rows), MOST_SUMMED // rows)
    wide = columns * largest_divisor(-(-size_out // columns), MOST_COLUMNS // columns)
    return Tiles(min(R, most), summed, min(size_out, wide))


def _run(
    x: Array,
    token_scales: Array | None,
    values: Array,
    scales: Array,
    layer: Array | None,
    block: tuple[int, int],
    dtype: Any,
    interpret: Any,
) -> Array:
    """The product, tile by tile; with `token_scales` of x that is quantised."""
    if layer is None:
        values, scales = values[None], scales[None]
    (R, size_in), size_out = x.shape, values.shape[-1]
    tiles = _tiles(R, size_in, size_out, block, x.dtype.itemsize)
    steps = pl.cdiv(size_in, tiles.summed)
    # Columns that do not fill lanes are stored along sublanes by XLA; read so, nothing is copied.
    turned = size_out % LANES != 0 and size_in % LANES == 0
    tile = (tiles.columns, tiles.summed) if turned else (tiles.summed, tiles.columns)
    if turned:
        values = jnp.swapaxes(values, 1, 2)
    # What a cut block's last rows are multiplied by must be zero, and not whatever VMEM holds.
    x = jnp.pad(x, ((0, 0), (0, steps * tiles.summed - size_in)))
    grid = (pl.cdiv(R, tiles.rows), pl.cdiv(size_out, tiles.columns), steps)

    def own_rows(array: Array) -> pl.BlockSpec:
        shape, once = (tiles.rows, array.shape[1]), pl.Buffered(buffer_count=1)
        return pl.BlockSpec(shape, lambda m, n, k, layer: (m, 0), pipeline_mode=once)

    specs = [
        own_rows(x),
        pl.BlockSpec(
            (None, *tile),
            lambda m, n, k, layer: (layer[0], n, k) if turned else (layer[0], k, n),
        ),
        pl.BlockSpec(
            (None, *scales.shape[1:]),
            lambda m, n, k, layer: (layer[0], 0, 0),
            memory_space=pltpu.SMEM,
        ),
    ]
    arrays = [x, values, scales]
    if token_scales is not None:
        specs, arrays = [*specs, own_rows(token_scales)], [*arrays, token_scales]
    body = functools.partial(
        _kernel,
        tiles=tiles,
        block=block,
        size_in=size_in,
        turned=turned,
        direct=multiplies(x.dtype, interpret),
    )
    read = x.nbytes + grid[0] * size_in * size_out + scale_bytes(scales)
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec(tiles[::2], lambda m, n, k, layer: (m, n)),
            scratch_shapes=[pltpu.VMEM(tiles[::2], jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((R, size_out), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * size_in * size_out,
            bytes_accessed=read + R * size_out * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="fp8_matmul" if token_scales is None else "fp8_matmul_w8a8",
    )
    chosen = jnp.zeros(1, jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    return call(chosen, *arrays)


SEMANTICS = ("parallel", "parallel", "arbitrary")
"""Of the grid: sums must be finished by the core that began them."""


def clear(total: Any) -> None:
    """Begin a tile's sum."""
    total[...] = jnp.zeros_like(total)


def _kernel(
    layer: Any,
    x: Any,
    values: Any,
    scales: Any,
    *rest: Any,
    tiles: Tiles,
    block: tuple[int, int],
    size_in: int,
    turned: bool,
    direct: bool,
) -> None:
    """Add one tile of the matrix, a block of rows at a time: `total += (x @ block) * scales`."""
    del layer  # only the index maps read it
    *token_scales, out, total = rest
    rows, columns = block
    n, k = pl.program_id(1), pl.program_id(2)
    pl.when(k == 0)(lambda: clear(total))
    for j in range(tiles.summed // rows):
        number = k * (tiles.summed // rows) + j
        left = x[:, pl.ds(pl.multiple_of(number * rows, rows), rows)]
        here = slice(j * rows, (j + 1) * rows)
        right = values[:, here] if turned else values[here]
        left = left if direct or not token_scales else left.astype(jnp.bfloat16)
        if size_in % tiles.summed:
            row = jax.lax.broadcasted_iota(jnp.int32, right.shape, int(turned))
            right = jnp.where(row < size_in - number * rows, right, jnp.zeros_like(right))
        right, factor = prepared(right, left.dtype, direct)
        contracted = (((1,), (int(turned),)), ((), ()))
        part = jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)
        if token_scales:
            part = part * column(token_scales[0][...], number)
        total[...] += part * (factor * spread_scales(scales, number, n, tiles.columns, columns))

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def prepared(values: Any, left: Any, direct: bool) -> tuple[Any, float]:
    """What a matrix unit multiplies numbers of type `left` by, and how much too small that is.

    v5 and v6 take e4m3b11fnuz as it is. That is e4m3fn with another bias of the exponent, so 16
    times smaller, and without what fn calls -0, which becomes 0 here, four numbers to a word.
    Converted to bfloat16 one by one, a tile would take longer than its copy. A NaN, of which a
    sound checkpoint has none, becomes a number.
    """
    if direct:
        return values, 1.0
    if left != jnp.bfloat16 or values.shape[0] % 32:
        return values.astype(left), 1.0
    sign, rest = jnp.uint32(0x80808080), jnp.uint32(0x7F7F7F7F)
    words = pltpu.bitcast(values, jnp.uint32)
    other = words ^ sign
    zeros = ~(((other & rest) + rest) | other | rest)
    return pltpu.bitcast(words ^ zeros, jnp.float8_e4m3b11fnuz), 16.0


def scale_bytes(scales: Any) -> int:
    """Of one matrix's scales, which are copied by whole tiles."""
    rows, columns = scales.shape[-2:]
    return 4 * (pl.cdiv(rows, 8) * 8) * (pl.cdiv(columns, LANES) * LANES)


def column(x: Any, number: Any) -> Any:
    """One column of x, [rows, 1]: no index can name a lane that is only known at run time."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(lane == number, x, 0.0), axis=1, keepdims=True)


def spread_scales(scales: Any, number: Any, n: Any, wide: int, columns: int) -> Any:
    """The scales of a block of rows over the columns of tile n, [1, wide]."""
    parts, last = [], scales.shape[1] - 1
    for first in range(0, wide, columns):
        at = jnp.minimum(n * pl.cdiv(wide, columns) + first // columns, last)
        scale = scales[jnp.minimum(number, scales.shape[0] - 1), at]
        parts.append(jnp.full((1, min(columns, wide - first)), scale, jnp.float32))
    return jnp.concatenate(parts, axis=1)
