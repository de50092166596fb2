"""Block attention on Hopper (wgmma) and Blackwell (tcgen05): paged context, online softmax.

The query heads that share a key head, times the slots of the block, are the rows of one product.
One warpgroup fetches tiles of keys and values (page by page, only those a sequence has and its
window reaches), the other multiplies. With few sequences several blocks of the grid share one
context; each leaves its sum, maximum and weight, which XLA merges.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.gpu_softmax import (
    load,
    merged,
    release,
    scale_rows,
    splits_of,
    start,
    weigh,
    wgmma,
)
from dspark_jax.pallas_kernels.gpu_target import plgpu

TILE = 64
"""Context rows multiplied at once."""
STAGES_BYTES = 128 * 1024
"""Of shared memory for tiles in flight."""
MOST_HEAD = 128
MOST_ROWS = {True: 64, False: 128}
"""Slots times heads, on Hopper and on Blackwell: the tall side of the tensor core's tile."""
CHUNK = 32
"""Columns of the sum that pass through registers at once on Blackwell."""


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
    arch: gpu_target.Arch | None = None,
) -> str | None:
    """Why the kernel cannot run these, or None."""
    (_, K, H, d), (_, shared, size, _), P = query.shape, context_key.shape, pages.shape[1]
    if reason := gpu_target.missing():
        return reason
    if {x.dtype for x in (query, key, value, context_key, context_value)} != {
        jnp.dtype(jnp.bfloat16)
    }:
        return f"queries are {query.dtype}, the context {context_key.dtype}; only bfloat16 is run."
    if d % 32 or d > MOST_HEAD:
        return f"heads have {d} dimensions; the kernel takes multiples of 32 up to {MOST_HEAD}."
    if K * (H // shared) > (most := MOST_ROWS[arch == "sm_90a" or arch is None]):
        return f"{K} slots of {H // shared} heads that share a key are more than {most} rows."
    if size % 8 or (size % TILE and TILE % size and (P > 1 or size < TILE)):
        return f"pages have {size} rows, which neither divide {TILE} nor are a multiple of it."
    return None


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
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Float[Array, "B K H d"]:
    """The reference's result; weights are rounded to bfloat16 before their sum divides them."""
    (B, K, H, d), (_, shared, size, _) = query.shape, context_key.shape
    arch, ratio, P = gpu_target.chosen(arch, interpret), H // shared, pages.shape[1]
    hopper = arch == "sm_90a"
    rows, used = MOST_ROWS[hopper], gpu_target.multiple(K * ratio, 8)
    capacity = P * size if window is None else min(P * size, window + TILE)
    splits = splits_of(B * shared, pl.cdiv(capacity, TILE), gpu_target.CORES[arch])
    asked = jnp.moveaxis(query.reshape(B, K, shared, ratio, d), 1, 2).reshape(B, shared, -1, d)
    asked, own_key, own_value = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 8), (0, 0)))
        for x in (asked, jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2))
    )
    grid = (splits, B, shared)
    sums, tops, weights = plgpu.kernel(
        functools.partial(
            _kernel, slots=K, ratio=ratio, window=window, causal=causal, splits=splits
        ),
        out_type=[
            jax.ShapeDtypeStruct((*grid, used, d), jnp.float32),
            jax.ShapeDtypeStruct((*grid, rows), jnp.float32),
            jax.ShapeDtypeStruct((*grid, rows), jnp.float32),
        ],
        scratch_types=_scratch(rows, d, min(size, TILE), hopper),
        grid=grid,
        grid_names=("split", "sequence", "head"),
        num_threads=2,
        thread_name="warpgroup",
        # The hardware's power of two as it is, within 2 units of the last place.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(length, pages, asked, own_key, own_value, context_key, context_value)
    out = merged(sums, tops[..., :used], weights[..., :used])[:, :, : K * ratio]
    out = jnp.moveaxis(out.reshape(B, shared, K, ratio, d), 2, 1)
    return out.reshape(B, K, H, d).astype(query.dtype)


def _scratch(rows: int, d: int, piece: int, hopper: bool) -> dict[str, Any]:
    columns = 64 if d % 64 == 0 else 32  # of all alike: wgmma takes operands swizzled alike

    def tiled(*shape: int) -> Any:
        return gpu_target.tiled(shape, jnp.bfloat16, columns)

    stages = STAGES_BYTES // (2 * TILE * d * 2)
    pieces = TILE // piece
    scratch = {
        "asked_tile": tiled(rows, d),
        "keys": tiled(stages, TILE, d),
        "values": tiled(stages, TILE, d),
        "shares": tiled(2 if hopper else 1, rows, TILE),
        "sums_out": plgpu.SMEM((rows, CHUNK), jnp.float32),
        "tops_out": plgpu.SMEM((rows,), jnp.float32),
        "weights_out": plgpu.SMEM((rows,), jnp.float32),
        "asked_arrived": plgpu.Barrier(),
        "arrived": plgpu.Barrier(num_arrivals=2 * pieces, num_barriers=stages),
        "consumed": plgpu.Barrier(num_barriers=stages),
    }
    if not hopper:
        scratch["scores"] = plgpu.TMEM((rows, TILE), jnp.float32)
        scratch["total"] = plgpu.TMEM((rows, d), jnp.float32)
        scratch["multiplied"] = plgpu.Barrier(num_barriers=2, orders_tensor_core=True)
    return scratch


def _kernel(
    length,
    pages,
    asked,
    own_key,
    own_value,
    context_key,
    context_value,
    sums,
    tops,
    weights,
    *,
    slots: int,
    ratio: int,
    window: int | None,
    causal: bool,
    splits: int,
    **scratch: Any,
):
    """One split of one sequence's context, for the heads that share one key head.

    Its first step is the block itself, in split 0; the others are tiles of the context.
    """
    split, b, h = map(lax.axis_index, ("split", "sequence", "head"))
    # What a length says beyond the table, as of a row that is nobody's, is not there.
    end = jnp.minimum(length[b], pages.shape[1] * context_key.shape[2])
    begin = jnp.int32(0) if window is None else jnp.maximum(end - window, 0)
    first_tile = begin // TILE
    share = pl.cdiv(pl.cdiv(end, TILE) - first_tile, splits)
    first = first_tile + split * share
    own = jnp.where(split == 0, 1, 0)
    steps = own + jnp.clip(pl.cdiv(end, TILE) - first, 0, share)
    at = (split, b, h)

    @pl.when(lax.axis_index("warpgroup") == 0)
    def multiply():
        all_rows = _reaching(0, scratch["asked_tile"].shape[0])
        plgpu.copy_gmem_to_smem(
            asked.at[b, h, all_rows], scratch["asked_tile"], scratch["asked_arrived"]
        )

        def visible(step: Any, shape: tuple[int, int], layout: Any) -> Any:
            tile = (first + step - own) * TILE
            is_own = step < own
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout) for axis in (0, 1)
            )
            low = jnp.where(is_own, 0, begin - tile)
            high = jnp.where(is_own, slots, end - tile)
            seen = (column >= low) & (column < high)
            if causal:  # slot `column` is not after slot `row // ratio`
                seen = seen & (column * jnp.where(is_own, ratio, 0) <= row)
            return seen

        plgpu.barrier_wait(scratch["asked_arrived"])
        sides = _hopper if "scores" not in scratch else _blackwell
        top, weight = sides(steps, visible, scratch, sums.at[at])
        scratch["tops_out"][...] = top
        scratch["weights_out"][...] = weight
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["tops_out"], tops.at[at])
        plgpu.copy_smem_to_gmem(scratch["weights_out"], weights.at[at])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def fetch():
        _fetch(
            (own, first, steps, end),
            pages,
            b,
            h,
            (own_key, own_value),
            (context_key, context_value),
            scratch,
        )


def _reaching(begin: int, size: int) -> Any:
    """Rows of which some may be beyond their array: copies read zeros there, and write nothing.

    The start is a number of the program's, or jax 0.12 would not have it.
    """
    return pl.ds(begin + 0 * lax.axis_index("split"), size)


def _fetch(span: Any, pages: Any, b: Any, h: Any, own: Any, context: Any, scratch: Any) -> None:
    """Every step's keys and values, as slots become free."""
    own_steps, first, steps, end = span
    arrived, consumed = scratch["arrived"], scratch["consumed"]
    targets = (scratch["keys"], scratch["values"])
    stages, size = targets[0].shape[0], context[0].shape[2]
    piece, columns = min(size, TILE), pl.ds(0, targets[0].shape[2])

    def copy(step: Any, source: Any) -> None:
        slot = lax.rem(step, stages)
        for which in range(2):
            for i in range(TILE // piece):
                target = targets[which].at[slot, pl.ds(i * piece, piece)]
                plgpu.copy_gmem_to_smem(source(which, i), target, arrived.at[slot])

    @pl.loop(0, steps)
    def _(step):
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[lax.rem(step, stages)]))

        @pl.when(step < own_steps)
        def _():
            def rows(which: int, i: int) -> Any:
                # Pieces beyond the block are masked; they are the first once more.
                row = i * piece if i * piece < own[which].shape[2] else 0
                return own[which].at[b, h, _reaching(row, piece)]

            copy(step, rows)

        @pl.when(step >= own_steps)
        def _():
            def rows(which: int, i: int) -> Any:
                # Rows past the last page are masked; they come from a page that was read anyway.
                row = (first + step - own_steps) * TILE + i * piece
                page = pages[b, jnp.minimum(row, end - 1) // size]
                return context[which].at[page, h, pl.ds(lax.rem(row, size), piece), columns]

            copy(step, rows)


def _hopper(steps: Any, visible: Any, scratch: dict[str, Any], sums: Any) -> tuple[Any, Any]:
    """All steps with the sum in registers; writes it and returns (maximum, weight)."""
    asked, keys, values = (scratch[name] for name in ("asked_tile", "keys", "values"))
    (rows, d), stages, layout = asked.shape, keys.shape[0], plgpu.Layout.WGMMA

    def add(step: Any, carry: Any) -> Any:
        total, top, weight = carry
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(scratch["arrived"].at[slot])

        scores = wgmma((asked, keys.at[slot].T))
        seen = visible(step, scores.shape, layout)
        shares, top, weight, old = weigh(scores, seen, d**-0.5, top, weight)
        # Warps await their own products only: the last step's may still be read by another's.
        side = scratch["shares"].at[lax.rem(step, 2)]
        side[...] = shares.astype(jnp.bfloat16)
        plgpu.commit_smem()
        mixed = wgmma((side, values.at[slot]))
        total = total * lax.broadcast_in_dim(old, total.shape, (0,)) + mixed
        release(scratch["consumed"].at[slot], step + stages < steps)
        return total, top, weight

    total = plgpu.layout_cast(jnp.zeros((rows, d), jnp.float32), layout)
    total, top, weight = lax.fori_loop(0, steps, add, (total, *start(rows, layout)))
    for i in range(0, d, CHUNK):
        _write(total[:, i : i + CHUNK], sums, i, scratch)
    return top, weight


def _write(part: Any, sums: Any, column: int, scratch: dict[str, Any]) -> None:
    """Some columns of the sum; rows beyond those of `sums` are cut off by the copy."""
    out = scratch["sums_out"]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out[...] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, sums.at[_reaching(0, out.shape[0]), pl.ds(column, CHUNK)])


def _blackwell(steps: Any, visible: Any, scratch: dict[str, Any], sums: Any) -> tuple[Any, Any]:
    """All steps with the sum in tensor memory; writes it and returns (maximum, weight)."""
    asked, keys, values = (scratch[name] for name in ("asked_tile", "keys", "values"))
    (rows, d), stages, layout = asked.shape, keys.shape[0], plgpu.Layout.TCGEN05
    multiplied, total = scratch["multiplied"], scratch["total"]

    def add(step: Any, carry: Any) -> Any:
        top, weight = carry
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(scratch["arrived"].at[slot])
        plgpu.tcgen05_mma(
            scratch["scores"], asked, keys.at[slot].T, multiplied.at[0], accumulate=False
        )
        plgpu.barrier_wait(multiplied.at[0])
        scores = load(scratch["scores"])
        seen = visible(step, scores.shape, layout)
        shares, top, weight, old = weigh(scores, seen, d**-0.5, top, weight)
        scratch["shares"][0] = shares.astype(jnp.bfloat16)
        plgpu.commit_smem()

        pl.when(step > 0)(lambda: scale_rows(total, old, CHUNK))
        plgpu.tcgen05_mma(
            total, scratch["shares"].at[0], values.at[slot], multiplied.at[1], accumulate=step > 0
        )
        plgpu.barrier_wait(multiplied.at[1])
        release(scratch["consumed"].at[slot], step + stages < steps)
        return top, weight

    top, weight = lax.fori_loop(0, steps, add, start(rows, layout))
    for i in range(0, d, CHUNK):
        _write(load(total.at[:, pl.ds(i, CHUNK)]), sums, i, scratch)
    return top, weight
