"""Appending to a draft's context on a GPU: only the cells of new rows are touched, in place.

The projection is XLA's: a plain product, which cuBLAS does as well as any kernel. One kernel then
does the rest for all layers, where XLA would scatter into every context of its own. A block of its
grid has 64 rows of one layer's head, norms and rotates their keys in registers and copies keys and
values row by row into their pages.

One body serves Hopper and Blackwell: nothing here is multiplied.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.gpu_target import plgpu

ROWS = 64
"""Of a tile: what the layout of a product's result takes, whose rows are summed within a warp."""
LINE = 128
"""Bytes that shared memory is aligned to where a copy may begin."""
MOST_HEAD = 256
"""Numbers that one copy moves."""
TYPES = ("bfloat16", "float32")
NOWHERE = -1


def unsupported(
    hidden: Any,
    kernel: Any,
    key_norm: Any,
    position: Any,
    cell_page: Any,
    cell_place: Any,
    context_keys: tuple[Any, ...],
    context_values: tuple[Any, ...],
    *,
    eps: float,
    theta: float,
) -> str | None:
    """Why the kernel cannot run these shapes and types, or None."""
    if reason := gpu_target.missing():
        return reason
    contexts = (*context_keys, *context_values)
    kinds = {jnp.dtype(x.dtype).name for x in (hidden, *contexts)}
    if len(kinds) > 1 or not kinds <= set(TYPES):
        return f"rows and contexts of {', '.join(sorted(kinds))} are not all bfloat16 or float32."
    d, (N, _, size, wide) = key_norm.shape[1], contexts[0].shape
    if d % 16 or d > MOST_HEAD:
        return f"heads have {d} numbers; the kernel takes multiples of 16 up to {MOST_HEAD}."
    if wide * jnp.dtype(hidden.dtype).itemsize % 16:
        return f"contexts are {wide} wide, no multiple of 16 bytes."
    if N * size > jnp.iinfo(jnp.int32).max:
        return f"{N} pages of {size} rows are more cells than 32 bits count."
    return None


def context_append(
    hidden: Float[Array, "R D"],
    kernel: Float[Array, "D n"],
    key_norm: Float[Array, "L d"],
    position: Int[Array, "R"],
    cell_page: Int[Array, "R"],
    cell_place: Int[Array, "R"],
    context_keys: tuple[Float[Array, "N Hk size wide"], ...],
    context_values: tuple[Float[Array, "N Hk size wide"], ...],
    *,
    eps: float,
    theta: float,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> tuple[tuple[Float[Array, "N Hk size wide"], ...], tuple[Float[Array, "N Hk size wide"], ...]]:
    """The contexts of every layer with the keys and values of new rows; see the reference."""
    gpu_target.chosen(arch, interpret)
    (R, _), (L, d), (N, Hk, size, _) = hidden.shape, key_norm.shape, context_keys[0].shape
    tiles, dtype = pl.cdiv(R, ROWS), hidden.dtype
    # Halves of a head begin where copies may, whatever a head's size.
    half = gpu_target.multiple(d // 2, LINE // dtype.itemsize)
    if R == 0:
        return context_keys, context_values

    def body(fresh, turns, norm, cells, *contexts, **scratch):
        _append(fresh, turns, norm, cells, contexts, scratch, rows=R, d=d, eps=eps)

    # Contexts that a kernel is given as references are its results too, where they lie.
    contexts = [jax.new_ref(x) for x in (*context_keys, *context_values)]
    plgpu.kernel(
        body,
        out_type=(),
        scratch_types={
            "key": plgpu.SMEM((ROWS, 2 * half), dtype),
            "value": plgpu.SMEM((ROWS, 2 * half), dtype),
            "turned": plgpu.SMEM((ROWS, 2 * half), dtype),
            "cell": plgpu.SMEM((ROWS,), jnp.int32),
            "key_arrived": plgpu.Barrier(),
            "others_arrived": plgpu.Barrier(num_arrivals=2),
        },
        grid=(tiles, L, Hk),
        grid_names=("tile", "layer", "head"),
        interpret=interpret or None,
    )(
        _projected(hidden, kernel, 2 * L * Hk, half),
        _turns(position, tiles * ROWS, d, half, theta),
        _halves(key_norm.astype(dtype).astype(jnp.float32), half),
        _cells(cell_page, cell_place, tiles * ROWS, N, size),
        *contexts,
    )
    appended = [jax.freeze(x) for x in contexts]
    return tuple(appended[:L]), tuple(appended[L:])


def _projected(
    hidden: Float[Array, "R D"], kernel: Float[Array, "D n"], heads: int, half: int
) -> Float[Array, "R heads twice_half"]:
    """[keys | values] of layer after layer, head by head."""
    both = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32).astype(hidden.dtype)
    return _halves(both.reshape(len(hidden), heads, -1), half)


def _halves(x: Float[Array, "*some d"], half: int) -> Float[Array, "*some twice_half"]:
    """With zeros behind either half of every head; as it is where nothing lacks."""
    x = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, half - x.shape[-1])))
    return x.reshape(*x.shape[:-2], 2 * half)


def _turns(
    position: Int[Array, "R"], rows: int, d: int, half: int, theta: float
) -> Float[Array, "2 rows half"]:
    """Cosines and sines of every row's angles, by XLA, as the reference has them."""
    rate = 1.0 / theta ** (jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle = position[:, None].astype(jnp.float32) * rate
    turns = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return jnp.pad(turns, ((0, 0), (0, rows - len(position)), (0, half - d // 2)))


def _cells(
    page: Int[Array, "R"], place: Int[Array, "R"], rows: int, pages: int, size: int
) -> Int[Array, "rows"]:
    """The number of every row's cell among those of all pages, or NOWHERE."""
    inside = (page >= 0) & (page < pages) & (place >= 0) & (place < size)
    cell = jnp.where(inside, page * size + place, NOWHERE).astype(jnp.int32)
    return jnp.pad(cell, (0, rows - len(page)), constant_values=NOWHERE)


def _append(
    fresh: Any, turns: Any, norm: Any, cells: Any, contexts: Any, scratch: dict[str, Any], *,
    rows: int, d: int, eps: float,
) -> None:  # fmt: skip
    """Keys and values of one tile of rows, for one head of one layer."""
    tile, layer, head = map(lax.axis_index, ("tile", "layer", "head"))
    L, (_, heads, size, _) = len(contexts) // 2, contexts[0].shape
    first, column = tile * ROWS, layer * 2 * heads + head
    some_rows, other = pl.ds(first, ROWS), scratch["others_arrived"]
    plgpu.copy_gmem_to_smem(fresh.at[some_rows, column], scratch["key"], scratch["key_arrived"])
    plgpu.copy_gmem_to_smem(fresh.at[some_rows, column + heads], scratch["value"], other)
    plgpu.copy_gmem_to_smem(cells.at[some_rows], scratch["cell"], other)
    plgpu.barrier_wait(scratch["key_arrived"])
    _turn(scratch["key"], turns.at[:, some_rows], norm.at[layer], scratch["turned"], d, eps)
    plgpu.commit_smem()
    plgpu.barrier_wait(other)

    def write(key: Any, value: Any) -> None:
        @pl.loop(0, jnp.minimum(ROWS, rows - first))
        def _(row):
            cell = scratch["cell"][row]

            @pl.when(cell != NOWHERE)
            def _():
                place = pl.ds(cell % size, 1)
                for source, context in ((scratch["turned"], key), (scratch["value"], value)):
                    there = context.at[cell // size, head, place]
                    _copy_row(source.at[pl.ds(row, 1)], there, d)

    for i in range(L):
        pl.when(layer == i)(lambda i=i: write(contexts[i], contexts[L + i]))
    # Shared memory is another block's as soon as this one ends.
    plgpu.wait_smem_to_gmem(0)


def _copy_row(row: Any, there: Any, d: int) -> None:
    """A row's d numbers, at once if its halves lie side by side."""
    half = row.shape[1] // 2
    if 2 * half == d:
        plgpu.copy_smem_to_gmem(row, there.at[:, pl.ds(0, d)])
        return
    for i in range(2):
        numbers = row.at[:, pl.ds(i * half, d // 2)]
        plgpu.copy_smem_to_gmem(numbers, there.at[:, pl.ds(i * (d // 2), d // 2)])


def _turn(key: Any, turns: Any, norm: Any, out: Any, d: int, eps: float) -> None:
    """The keys normed and rotated (NeoX halves), rounded wherever the reference rounds."""
    layout, half, dtype = plgpu.Layout.WGMMA, key.shape[1] // 2, key.dtype
    halves = pl.ds(0, half), pl.ds(half, half)

    def load(source: Any, layout: Any = layout) -> Any:
        return plgpu.load(source, layout=layout, optimized=False).astype(jnp.float32)

    def rounded(x: Any) -> Any:
        return x.astype(dtype).astype(jnp.float32)

    a, b = (load(key.at[:, columns]) for columns in halves)
    squares = jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)
    scale = lax.broadcast_in_dim(lax.rsqrt(squares / d + eps), a.shape, (0,))

    def normed(x: Any, columns: Any) -> Any:
        weight = lax.broadcast_in_dim(load(norm.at[columns], layout.reduce(0)), x.shape, (1,))
        return rounded(rounded(x * scale) * weight)

    a, b = normed(a, halves[0]), normed(b, halves[1])
    cos, sin = load(turns.at[0]), load(turns.at[1])
    gpu_target.store(out.at[:, halves[0]], (a * cos - b * sin).astype(dtype))
    gpu_target.store(out.at[:, halves[1]], (b * cos + a * sin).astype(dtype))
