"""Latent attention on Hopper (wgmma) and Blackwell (tcgen05): the latents cross memory once.

A tile of the context, 32 latents and their rotary parts, lies in shared memory once and is read as
keys and as values. The sum, 512 numbers for each of a tile's rows, is too wide for the registers of
one warpgroup and for tensor memory beside the scores, so it is halved: on Hopper two warpgroups
share the tile in shared memory, on Blackwell two blocks of the grid read it at about the same time,
the second from the L2 cache. Both halves compute the scores. Rows are the heads of all slots of one
sequence. With few sequences several blocks share one context; XLA merges their parts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

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

TILE = 32
"""Context rows multiplied at once: as many as the bits of a word, which say what is selected."""
STAGES = {True: 3, False: 2}
"""Tiles in flight, on Hopper and on Blackwell, whose taller rows leave less shared memory."""
ROWS = {True: 64, False: 128}
"""Slots times heads of a tile."""
MOST_COLUMNS = 256
"""Of the sum, for one half."""
CHUNK = {False: 64, True: 32}
"""Columns of the sum multiplied at once, and where rows are selected: so that nothing spills."""
REGISTERS = {"multiplying": 224, "fetching": 56}
"""Of a thread, where two warpgroups multiply and one fetches: 65536 in all."""
MOST_LATENT, MOST_ROPE = 512, 64
"""What shared memory has room for."""


def unsupported(
    latent: Any,
    rope: Any,
    context_latent: Any,
    context_rope: Any,
    pages: Any,
    position: Any,
    selected: Any = None,
    *,
    scale: float,
) -> str | None:
    """Why the kernel cannot run these, or None."""
    (r, p), (_, size, _), P = (
        (latent.shape[-1], rope.shape[-1]),
        context_latent.shape,
        pages.shape[1],
    )
    if reason := gpu_target.missing():
        return reason
    if {x.dtype for x in (latent, rope, context_latent, context_rope)} != {jnp.dtype("bfloat16")}:
        return f"rows are {latent.dtype}, latents {context_latent.dtype}; only bfloat16 is run."
    if r % 64 or r > MOST_LATENT or (r > MOST_COLUMNS and r % 128):
        return f"latents have {r} numbers; the kernel takes multiples of 64 up to {MOST_LATENT}."
    if p % 32 or p > MOST_ROPE:
        return f"{p} numbers are rotated; the kernel takes 32 or {MOST_ROPE}."
    if size % 8 or (size % TILE and TILE % size and (P > 1 or size < TILE)):
        return f"pages have {size} rows, which neither divide {TILE} nor are a multiple of it."
    return None


def mla_attention(
    latent: Float[Array, "B S H r"],
    rope: Float[Array, "B S H p"],
    context_latent: Float[Array, "N size r"],
    context_rope: Float[Array, "N size wide"],
    pages: Int[Array, "B P"],
    position: Int[Array, "B S"],
    selected: Bool[Array, "B S C"] | None = None,
    *,
    scale: float,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> Float[Array, "B S H r"]:
    """What every head's query takes from the latents up to its row's position, in float32."""
    (B, S, H, r), size = latent.shape, context_latent.shape[1]
    arch, capacity = gpu_target.chosen(arch, interpret), pages.shape[1] * size
    hopper, halves = arch == "sm_90a", pl.cdiv(r, MOST_COLUMNS)
    rows, columns = ROWS[hopper], r // halves
    tall = gpu_target.multiple(S * H, rows)
    # The last row that a row of the product sees; padding sees none.
    last = jnp.where(position < capacity, position, -1)
    if selected is None:
        seen, nothing = last[:, :, None], -1
    else:
        selected = selected & (jnp.arange(capacity) <= last[:, :, None])
        seen, nothing = words_of(selected), 0
    seen = jnp.moveaxis(jnp.repeat(seen, H, axis=1), 1, 2)
    visible_rows = jnp.pad(seen, ((0, 0), (0, 0), (0, tall - S * H)), constant_values=nothing)
    arrays = [
        jnp.max(last, axis=1) + 1,
        pages,
        visible_rows,
        *(_rows_of(x) for x in (latent, rope)),
        *(context_latent, context_rope),
    ]
    own_halves = 1 if hopper else halves
    splits = splits_of(
        B * (tall // rows) * own_halves, pl.cdiv(capacity, TILE), gpu_target.CORES[arch]
    )
    by_half = jax.ShapeDtypeStruct((halves, splits, B, tall), jnp.float32)
    sums, tops, weights = plgpu.kernel(
        functools.partial(_kernel, splits=splits, sparse=selected is not None, scale=scale),
        out_type=[jax.ShapeDtypeStruct((splits, B, tall, r), jnp.float32), by_half, by_half],
        scratch_types=_scratch(rows, r, rope.shape[-1], columns, min(size, TILE), hopper),
        # Halves last: blocks of the grid that follow one another run together.
        grid=(splits, B, tall // rows, own_halves),
        grid_names=("split", "sequence", "rows", "half"),
        num_threads=1 + (halves if hopper else 1),
        thread_name="warpgroup",
        # The hardware's power of two as it is, within 2 units of the last place.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(*arrays)
    return merged(sums, tops[0], weights[0])[:, : S * H].reshape(B, S, H, r)


def _rows_of(x: Float[Array, "B S H n"]) -> Float[Array, "B rows n"]:
    """Heads of all slots, a multiple of 8 of them, as copies in tiles need."""
    B, S, H, n = x.shape
    return jnp.pad(x.reshape(B, S * H, n), ((0, 0), (0, -(S * H) % 8), (0, 0)))


def words_of(selected: Bool[Array, "B S C"]) -> Int[Array, "B S words"]:
    """32 rows of the context in a word, the first as its lowest bit."""
    B, S, C = selected.shape
    bits = jnp.pad(selected, ((0, 0), (0, 0), (0, -C % TILE))).reshape(B, S, -1, TILE)
    words = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(TILE, dtype=jnp.uint32), axis=-1)
    return lax.bitcast_convert_type(words.astype(jnp.uint32), jnp.int32)


def _scratch(rows: int, r: int, p: int, columns: int, piece: int, hopper: bool) -> dict[str, Any]:
    def tiled(*shape: int) -> Any:
        # Tiles of 32 columns for all: wgmma takes operands swizzled alike, and shares are 32 wide.
        return gpu_target.tiled(shape, jnp.bfloat16, 32)

    stages, readers = STAGES[hopper], r // columns if hopper else 1
    scratch = {
        "asked": tiled(rows, r),
        "asked_turned": tiled(rows, p),
        "latents": tiled(stages, TILE, r),
        "turned": tiled(stages, TILE, p),
        # Two for each warpgroup of Hopper, whose warps may still read the last tile's.
        "shares": tiled(2 * readers if hopper else 1, rows, TILE),
        "asked_arrived": plgpu.Barrier(num_arrivals=2),
        "arrived": plgpu.Barrier(num_arrivals=2 * (TILE // piece), num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    }
    if not hopper:
        scratch["scores"] = plgpu.TMEM((rows, TILE), jnp.float32)
        scratch["total"] = plgpu.TMEM((rows, columns), jnp.float32)
        scratch["multiplied"] = plgpu.Barrier(num_barriers=2, orders_tensor_core=True)
    return scratch


def _kernel(
    end,
    pages,
    visible_rows,
    latent,
    rope,
    context_latent,
    context_rope,
    sums,
    tops,
    weights,
    *,
    splits: int,
    sparse: bool,
    scale: float,
    **scratch: Any,
):
    """Some rows of one sequence over one split of its context."""
    split, b, row_tile = map(lax.axis_index, ("split", "sequence", "rows"))
    warpgroup, hopper = lax.axis_index("warpgroup"), "total" not in scratch
    layout = plgpu.Layout.WGMMA if hopper else plgpu.Layout.TCGEN05
    rows = scratch["asked"].shape[0]
    some_rows = pl.ds(row_tile * rows, rows)
    fetching = r_halves(sums, scratch) if hopper else 1

    def span() -> tuple[Any, Any]:
        """First tile and how many; computed by every warpgroup once it has its registers."""
        tiles = pl.cdiv(end[b], TILE)
        share = pl.cdiv(tiles, splits)
        first = split * share
        return first, jnp.clip(tiles - first, 0, share)

    @pl.when(warpgroup < fetching)
    def multiply():
        if hopper and fetching == 2:
            plgpu.set_max_registers(REGISTERS["multiplying"], action="increase")
        half = warpgroup if hopper else lax.axis_index("half")
        first, steps = span()

        def visible(step: Any, shape: tuple[int, int]) -> Any:
            tile = first + step
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
            source = visible_rows.at[b, tile if sparse else 0, some_rows]
            by_row = plgpu.load(source, layout=layout.reduce(1), optimized=False)
            if sparse:
                # Or the bits that columns stand for would keep registers for the whole loop.
                column = lax.optimization_barrier(column)
                bits = lax.broadcast_in_dim(by_row, shape, (0,)) >> column
                return (bits & 1) != 0
            return column <= lax.broadcast_in_dim(by_row - tile * TILE, shape, (0,))

        plgpu.barrier_wait(scratch["asked_arrived"])
        sides = _hopper if hopper else _blackwell
        written = sums.at[split, b, some_rows]
        chunk = CHUNK[sparse]
        top, weight = sides(steps, (half, chunk), scale, visible, scratch, written)
        tops[half, split, b, some_rows] = top
        weights[half, split, b, some_rows] = weight

    @pl.when(warpgroup == fetching)
    def fetch():
        if hopper and fetching == 2:
            plgpu.set_max_registers(REGISTERS["fetching"], action="decrease")
        for source, target in ((latent, "asked"), (rope, "asked_turned")):
            plgpu.copy_gmem_to_smem(
                source.at[b, some_rows], scratch[target], scratch["asked_arrived"]
            )
        _fetch((*span(), end[b]), pages, b, (context_latent, context_rope), scratch)


def r_halves(sums: Any, scratch: dict[str, Any]) -> int:
    """Warpgroups that multiply on Hopper: each has two buffers of shares."""
    return scratch["shares"].shape[0] // 2


def _fetch(span: Any, pages: Any, b: Any, context: Any, scratch: dict[str, Any]) -> None:
    """Every tile's latents and rotary parts, as slots become free."""
    first, steps, end = span
    targets = (scratch["latents"], scratch["turned"])
    stages, size = targets[0].shape[0], context[0].shape[1]
    piece = min(size, TILE)

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, stages)
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(scratch["consumed"].at[slot]))
        for i in range(TILE // piece):
            # Rows past the last page are masked; they come from a page that was read anyway.
            row = (first + step) * TILE + i * piece
            page, place = pages[b, jnp.minimum(row, end - 1) // size], lax.rem(row, size)
            for source, target in zip(context, targets, strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at[page, pl.ds(place, piece), pl.ds(0, target.shape[2])],
                    target.at[slot, pl.ds(i * piece, piece)],
                    scratch["arrived"].at[slot],
                )


def _hopper(
    steps: Any, cut: Any, scale: float, visible: Any, scratch: dict[str, Any], sums: Any
) -> tuple[Any, Any]:
    """All steps with half the sum in registers; writes it and returns (maximum, weight).

    `cut` is which half, and how many of its columns are multiplied at once.
    """
    half, chunk = cut
    asked, latents, layout = scratch["asked"], scratch["latents"], plgpu.Layout.WGMMA
    (stages, _, r), rows = latents.shape, asked.shape[0]
    columns = r // r_halves(sums, scratch)

    def add(step: Any, carry: Any) -> Any:
        totals, top, weight = carry
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(scratch["arrived"].at[slot])
        scores = wgmma(
            (asked, latents.at[slot].T),
            (scratch["asked_turned"], scratch["turned"].at[slot].T),
        )
        seen = visible(step, scores.shape)
        shares, top, weight, old = weigh(scores, seen, scale, top, weight)
        side = scratch["shares"].at[2 * half + lax.rem(step, 2)]
        side[...] = shares.astype(jnp.bfloat16)
        plgpu.commit_smem()
        by_row = lax.broadcast_in_dim(old, (rows, chunk), (0,))
        totals = tuple(
            total * by_row
            + wgmma((side, latents.at[slot, :, pl.ds(half * columns + i * chunk, chunk)]))
            for i, total in enumerate(totals)
        )
        release(scratch["consumed"].at[slot], step + stages < steps)
        return totals, top, weight

    def zeros() -> Any:
        return plgpu.layout_cast(jnp.zeros((rows, chunk), jnp.float32), layout)

    totals = tuple(zeros() for _ in range(columns // chunk))
    totals, top, weight = lax.fori_loop(0, steps, add, (totals, *start(rows, layout)))
    for i, total in enumerate(totals):
        sums[:, pl.ds(half * columns + i * chunk, chunk)] = total
    return top, weight


def _blackwell(
    steps: Any, cut: Any, scale: float, visible: Any, scratch: dict[str, Any], sums: Any
) -> tuple[Any, Any]:
    """All steps with half the sum in tensor memory; writes it and returns (maximum, weight)."""
    half, chunk = cut
    asked, latents, layout = scratch["asked"], scratch["latents"], plgpu.Layout.TCGEN05
    multiplied, total = scratch["multiplied"], scratch["total"]
    stages, rows, columns = latents.shape[0], asked.shape[0], total.shape[1]

    def add(step: Any, carry: Any) -> Any:
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(scratch["arrived"].at[slot])
        plgpu.tcgen05_mma(scratch["scores"], asked, latents.at[slot].T, accumulate=False)
        plgpu.tcgen05_mma(
            *(scratch["scores"], scratch["asked_turned"], scratch["turned"].at[slot].T),
            multiplied.at[0],
        )
        plgpu.barrier_wait(multiplied.at[0])
        scores = load(scratch["scores"])
        shares, top, weight, old = weigh(scores, visible(step, scores.shape), scale, *carry)
        scratch["shares"][0] = shares.astype(jnp.bfloat16)
        plgpu.commit_smem()
        pl.when(step > 0)(lambda: scale_rows(total, old, chunk))
        plgpu.tcgen05_mma(
            *(total, scratch["shares"].at[0]),
            latents.at[slot, :, pl.ds(half * columns, columns)],
            multiplied.at[1],
            accumulate=step > 0,
        )
        plgpu.barrier_wait(multiplied.at[1])
        release(scratch["consumed"].at[slot], step + stages < steps)
        return top, weight

    top, weight = lax.fori_loop(0, steps, add, start(rows, layout))
    for i in range(0, columns, chunk):
        sums[:, pl.ds(half * columns + i, chunk)] = load(total.at[:, pl.ds(i, chunk)])
    return top, weight
