"""Appending to a draft's context on a TPU: only register tiles with new rows are touched, in place.

The projection, norms and rotary are XLA's. A row of a page cannot be written alone, because rows
share the words of a register tile: each tile with new rows is read, filled and written back, once,
for all layers at a time, while the next ones are on their way.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dspark_jax.pallas_kernels.context_append.reference import keys_values
from dspark_jax.pallas_kernels.tiles import (
    PARAMETERS,
    TABLE_BYTES,
    TILES_BYTES,
    start,
    sublanes,
    wait,
)

MOST_SLOTS = 8
"""Tiles in flight: half are read, half are written."""


class Runs(NamedTuple):
    """New rows in the order of their cells: run t is rows [begin[t], begin[t + 1]) of one tile."""

    total: Int[Array, "one"]
    begin: Int[Array, "R_and_one"]
    row: Int[Array, "R"]
    page: Int[Array, "R"]
    place: Int[Array, "R"]


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
    interpret: Any = False,
) -> tuple[tuple[Float[Array, "N Hk size wide"], ...], tuple[Float[Array, "N Hk size wide"], ...]]:
    """The contexts of every layer with the keys and values of new rows; see the reference."""
    (N, Hk, size, wide), dtype = context_keys[0].shape, context_keys[0].dtype
    R, (L, d), step = len(hidden), key_norm.shape, sublanes(dtype)
    contexts = (*context_keys, *context_values)
    fresh = keys_values(hidden, kernel, key_norm, position, eps=eps, theta=theta)
    # Whole words per row, so that a row can be moved alone: [R 2L Hk wide] in float32.
    new = jnp.stack([*fresh.keys, *fresh.values], axis=1).astype(dtype).astype(jnp.float32)
    new = jnp.pad(new, ((0, 0), (0, 0), (0, 0), (0, wide - d)))
    runs = find_runs(cell_page, cell_place, N, size, step)
    touched = 3 * pl.cdiv(R, step)  # about: a sequence's rows lie in one or two tiles
    tile = 2 * L * Hk * step * wide * dtype.itemsize
    slots = slot_count(contexts)
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    out = pl.pallas_call(
        functools.partial(_kernel, slots, step, len(contexts)),
        name="context_append",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            grid=(1,),
            in_specs=[anywhere] * (1 + len(contexts)),
            out_specs=[anywhere] * len(contexts),
            scratch_shapes=[
                pltpu.VMEM((slots, 2 * L, Hk, step, wide), dtype),
                pltpu.VMEM((slots, step, 2 * L, Hk, wide), jnp.float32),
                pltpu.VMEM((2 * L, Hk, step, wide), jnp.float32),
                pltpu.SemaphoreType.DMA((slots,)),
                pltpu.SemaphoreType.DMA((slots,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in contexts],
        input_output_aliases={len(runs) + 1 + i: i for i in range(len(contexts))},
        compiler_params=PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * touched * tile + new.size * 4
        ),
        interpret=interpret,
    )(*runs, new, *contexts)
    return tuple(out[:L]), tuple(out[L:])


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
    """Why this kernel cannot run these shapes and types, None if it can."""
    contexts = (*context_keys, *context_values)
    kinds = {jnp.dtype(x.dtype) for x in contexts}
    if len(kinds) > 1 or not kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        names = ", ".join(sorted(kind.name for kind in kinds))
        return f"contexts of {names} are not all bfloat16 or all float32"
    (_, _, size, wide), step = contexts[0].shape, sublanes(contexts[0].dtype)
    if size % step:
        return f"pages of {size} rows are not a multiple of {step}"
    if wide % 32:
        return f"heads of {wide} numbers are not a multiple of 32"
    if slot_count(contexts) < 2:
        return f"{len(contexts)} contexts of {contexts[0].shape[1]} heads exceed the vector memory"
    if 16 * position.size > TABLE_BYTES:
        return f"{position.size} rows are more than the scalar memory holds"
    return None


def slot_count(contexts: tuple[Any, ...]) -> int:
    """How many tiles of all layers, and rows for them, the vector memory holds."""
    _, Hk, _, wide = contexts[0].shape
    size = jnp.dtype(contexts[0].dtype).itemsize
    one = len(contexts) * pl.cdiv(wide, 128) * 128 * sublanes(contexts[0].dtype)
    return min(MOST_SLOTS, (TILES_BYTES + TILES_BYTES // 4) // (one * (Hk * size + max(Hk, 8) * 4)))


def find_runs(
    page: Int[Array, "R"], place: Int[Array, "R"], pages: int, size: int, step: int
) -> Runs:
    """Rows by the register tile that they go to; those that go nowhere come last, in no run."""
    R = len(page)
    inside = (page >= 0) & (page < pages) & (place >= 0) & (place < size)
    cell = jnp.where(inside, page * (size // step) + place // step, jnp.iinfo(jnp.int32).max)
    row = jnp.argsort(cell).astype(jnp.int32)
    cell, written = cell[row], jnp.sum(inside, dtype=jnp.int32)
    number = jnp.arange(R, dtype=jnp.int32)
    first = (number < written) & ((number == 0) | (cell != jnp.roll(cell, 1)))
    begin = jnp.sort(jnp.where(first, number, written))
    count = jnp.sum(first, dtype=jnp.int32)
    return Runs(count[None], jnp.append(begin, written), row, page[row], place[row])


def _kernel(slots: int, step: int, arrays: int, *refs: Any) -> None:
    total, begin, row, page, place, new, *rest = refs
    contexts, (tiles, rows, opened, arrived, left) = rest[arrays:-5], rest[-5:]
    ahead, jobs = slots // 2, total[0]

    def tile_copies(job: Any, back: bool, act: Any) -> None:
        slot, one = job % slots, begin[job]
        there = pl.ds(pl.multiple_of(place[one] // step * step, step), step)
        for i, context in enumerate(contexts):
            outside, inside = context.at[page[one], :, there], tiles.at[slot, i]
            pair = (inside, outside, left) if back else (outside, inside, arrived)
            act(pltpu.make_async_copy(*pair[:2], pair[2].at[slot]))

    def fetch(job: Any, act: Any) -> None:
        slot = job % slots
        tile_copies(job, False, act)

        def one(number: Any, carry: Any) -> Any:
            to = rows.at[slot, number - begin[job]]
            act(pltpu.make_async_copy(new.at[row[number]], to, arrived.at[slot]))
            return carry

        jax.lax.fori_loop(begin[job], begin[job + 1], one, None)

    def finish(job: Any) -> None:
        @pl.when((job >= 0) & (job < jobs))
        def _() -> None:
            tile_copies(job, True, wait)

    def do(job: Any, carry: Any) -> Any:
        slot = job % slots
        finish(job - (slots - ahead))

        @pl.when(job + ahead < jobs)
        def _() -> None:
            fetch(job + ahead, start)

        fetch(job, wait)

        def widen(i: Any, carry: Any) -> Any:
            opened[i] = tiles[slot, i].astype(jnp.float32)
            return carry

        def put(number: Any, carry: Any) -> Any:
            to = pl.ds(place[number] % step, 1)
            for i in range(arrays):
                heads = range(opened.shape[1])
                # Everything is loaded before anything is stored, so that nothing waits.
                new = [rows[slot, number - begin[job], i, pl.ds(h, 1)] for h in heads]
                for h in heads:
                    opened[i, h, to] = new[h]
            return carry

        def narrow(i: Any, carry: Any) -> Any:
            tiles[slot, i] = opened[i].astype(tiles.dtype)
            return carry

        jax.lax.fori_loop(0, arrays, widen, None)
        jax.lax.fori_loop(begin[job], begin[job + 1], put, None)
        jax.lax.fori_loop(0, arrays, narrow, None)
        tile_copies(job, True, start)
        return carry

    for job in range(ahead):

        @pl.when(job < jobs)
        def _(job: int = job) -> None:
            fetch(job, start)

    jax.lax.fori_loop(0, jobs, do, None)
    for i in range(slots - ahead, 0, -1):
        finish(jobs - i)
