"""Drafting through a Markov head on Hopper (wgmma) and Blackwell (tcgen05), no logits in memory.

Sequences are the rows of a product with one tile of the vocabulary at a time. Every block of the
grid has some consecutive tiles: one warpgroup fetches them, the other multiplies, adds the noise
and keeps what a draw is made of. XLA joins the blocks' draws as it joins those of devices that
share a vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt32

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.gpu_softmax import load, release, wgmma
from dspark_jax.pallas_kernels.gpu_target import plgpu
from dspark_jax.pallas_kernels.markov import reference
from dspark_jax.pallas_kernels.markov.reference import LOWEST, MarkovBlock, MarkovDraw

TILE = {True: 64, False: 32}
"""Entries of the vocabulary at once, on Hopper and on Blackwell: 32 for each thread."""
ROWS = {True: 64, False: 128}
"""Sequences of a tile."""
STAGES = {True: 3, False: 4}
MOST_RANK = 256
"""What shared memory has room for."""
NOTHING = float(jnp.finfo(jnp.float32).min)
"""Below every sum."""


def unsupported(
    base: Any, mixed: Any, w2: Any, words: Any, temperature: Any, slot: Any, first_entry: Any
) -> str | None:
    """Why a step of these shapes and types cannot be run here; None if it can."""
    if reason := gpu_target.missing():
        return reason
    if base.ndim != 3 or mixed.ndim != 2 or w2.ndim != 2 or 0 in (*base.shape, *mixed.shape):
        return f"Base {base.shape}, mixed {mixed.shape}, w2 {w2.shape}: not slots, rows, a factor."
    if (mixed.dtype, w2.dtype) != (jnp.bfloat16, jnp.bfloat16):
        return f"mixed is {mixed.dtype} and w2 {w2.dtype}; the kernel multiplies bfloat16."
    if base.dtype not in (jnp.float32, jnp.bfloat16):
        return f"base is {base.dtype}, not float32 or bfloat16."
    r, Vd = w2.shape
    if Vd % 16 or r % 16 or r > MOST_RANK:
        return f"w2 is {r} x {Vd}; the kernel takes multiples of 16, and ranks up to {MOST_RANK}."
    return None


def markov_block(
    base: Float[Array, "B G Vd"],
    hidden: Float[Array, "B G D"],
    anchor: Int[Array, "B"],
    state: Float[Array, "B r"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    w1: Float[Array, "V r"],
    w2: Float[Array, "r Vd"],
    mix_kernel: Float[Array, "m n"] | None,
    mix_bias: Float[Array, "n"] | None,
    target_id: Int[Array, "Vd"],
    *,
    head_type: str,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> MarkovBlock:
    """Draft the G tokens that follow `anchor`, one kernel after another; XLA gathers and mixes."""
    return reference.run_block(
        functools.partial(markov_step, arch=arch, interpret=interpret),
        *(base, hidden, anchor, state, words, temperature),
        (w1, w2, mix_kernel, mix_bias),
        *(target_id, head_type),
    )


def markov_step(
    base: Float[Array, "G B Vd"],
    mixed: Float[Array, "B r"],
    w2: Float[Array, "r Vd"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    slot: Int[Array, ""],
    first_entry: Int[Array, ""],
    *,
    arch: gpu_target.Arch | None = None,
    interpret: Any = False,
) -> MarkovDraw:
    """Draw the entry of one slot of every block, whose base logits are read in place."""
    (_, B, Vd), r = base.shape, mixed.shape[1]
    arch = gpu_target.chosen(arch, interpret)
    hopper = arch == "sm_90a"
    rows, tiles = ROWS[hopper], pl.cdiv(Vd, TILE[hopper])
    row_tiles = pl.cdiv(B, rows)
    share = pl.cdiv(tiles * row_tiles, gpu_target.CORES[arch])
    parts, padded = pl.cdiv(tiles, share), row_tiles * rows

    def padded_rows(x: Array, value: float = 0) -> Array:
        return jnp.pad(x, ((0, padded - B), *((0, 0),) * (x.ndim - 1)), constant_values=value)

    seeds = padded_rows(lax.bitcast_convert_type(words, jnp.int32))
    drawn = plgpu.kernel(
        functools.partial(_kernel, tiles=tiles, share=share, Vd=Vd),
        out_type=[jax.ShapeDtypeStruct((parts, padded), jnp.float32)] * 5,
        scratch_types=_scratch(rows, r, Vd, base.dtype, hopper),
        grid=(parts, row_tiles),
        grid_names=("part", "rows"),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret or None,
    )(
        jnp.stack([slot, first_entry]).astype(jnp.int32),
        *(base, jnp.pad(mixed, ((0, -B % 8), (0, 0))), w2),
        *(seeds[:, 0], seeds[:, 1], padded_rows(temperature)),
    )
    entry, *others = (x[:, :B] for x in drawn)
    # Entries are numbers of the whole vocabulary here, exact in float32.
    whole = MarkovDraw(entry.astype(jnp.int32), *others)
    return reference.joined(whole, jnp.zeros(parts, jnp.int32))


def _scratch(rows: int, r: int, Vd: int, dtype: Any, hopper: bool) -> dict[str, Any]:
    # As wide as both extents allow: wgmma takes operands swizzled alike.
    tile, stages = TILE[hopper], STAGES[hopper]
    columns = next(n for n in (64, 32, 16) if n <= tile and not Vd % n and not r % n)
    scratch = {
        "mixed_tile": gpu_target.tiled((rows, r), jnp.bfloat16, columns),
        "factors": gpu_target.tiled((stages, r, tile), jnp.bfloat16, columns),
        "bases": plgpu.SMEM((stages, rows, tile), dtype),
        "mixed_arrived": plgpu.Barrier(),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "consumed": plgpu.Barrier(num_barriers=stages),
    }
    if not hopper:
        scratch["product"] = plgpu.TMEM((rows, tile), jnp.float32)
        scratch["multiplied"] = plgpu.Barrier(orders_tensor_core=True)
    return scratch


def _kernel(
    scalars, base, mixed, w2, low, high, temperature, *outputs, tiles: int, share: int, Vd: int,
    **scratch: Any,
):  # fmt: skip
    """The draw of some sequences from `share` tiles of the vocabulary."""
    part, row_tile = lax.axis_index("part"), lax.axis_index("rows")
    hopper, (stages, rows, tile) = "product" not in scratch, scratch["bases"].shape
    layout = plgpu.Layout.WGMMA if hopper else plgpu.Layout.TCGEN05
    some_rows, first = pl.ds(row_tile * rows, rows), part * share
    steps = jnp.minimum(share, tiles - first)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def fetch():
        slot = scalars[0]
        plgpu.copy_gmem_to_smem(
            mixed.at[some_rows], scratch["mixed_tile"], scratch["mixed_arrived"]
        )

        @pl.loop(0, steps)
        def _(step):
            place, entries = lax.rem(step, stages), pl.ds((first + step) * tile, tile)
            arrived, consumed = scratch["arrived"].at[place], scratch["consumed"].at[place]
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed))
            plgpu.copy_gmem_to_smem(w2.at[:, entries], scratch["factors"].at[place], arrived)
            plgpu.copy_gmem_to_smem(
                base.at[slot, some_rows, entries], scratch["bases"].at[place], arrived
            )

    @pl.when(lax.axis_index("warpgroup") == 0)
    def draw():
        def of_rows(source: Any) -> Any:
            return plgpu.load(source.at[some_rows], layout=layout.reduce(1), optimized=False)

        seeds, heat, offset = (of_rows(low), of_rows(high)), of_rows(temperature), scalars[1]
        plgpu.barrier_wait(scratch["mixed_arrived"])

        def add(step: Any, kept: Any) -> Any:
            place = lax.rem(step, stages)
            plgpu.barrier_wait(scratch["arrived"].at[place])
            logits = _product(place, scratch) + plgpu.load(
                scratch["bases"].at[place], layout=layout, optimized=False
            ).astype(jnp.float32)
            plgpu.commit_smem()  # orders what was read here before the copy that overwrites it
            release(scratch["consumed"].at[place], step + stages < steps)
            entry = (first + step) * tile + plgpu.broadcasted_iota(
                jnp.int32, logits.shape, 1, layout=layout
            )
            noise = signed_gumbel(entry + offset, *seeds)
            drawn = _draw(jnp.maximum(logits, LOWEST), noise, heat, entry, entry < Vd)
            return _both(kept, drawn)

        def start(value: float) -> Any:
            return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout.reduce(1))

        kept = (start(0.0), start(NOTHING), start(0.0), start(NOTHING), start(0.0))
        kept = lax.fori_loop(0, steps, add, kept)
        for output, value in zip(outputs, kept, strict=True):
            output[part, some_rows] = value


def _product(place: Any, scratch: dict[str, Any]) -> Any:
    """The bias of one tile."""
    mixed, factor = scratch["mixed_tile"], scratch["factors"].at[place]
    if "product" not in scratch:
        return wgmma((mixed, factor))
    plgpu.tcgen05_mma(scratch["product"], mixed, factor, scratch["multiplied"], accumulate=False)
    plgpu.barrier_wait(scratch["multiplied"])
    return load(scratch["product"])


def signed_gumbel(number: Any, low: Any, high: Any) -> Any:
    """`reference.hashed_gumbel` in signed integers, which wrap alike."""

    def spread(x: Any) -> Any:
        return lax.broadcast_in_dim(x, number.shape, (0,))

    bits = _mixed(_mixed(number * _signed(0x9E3779B9) + spread(low)) ^ spread(high))
    uniform = (lax.shift_right_logical(bits, 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def _mixed(x: Any) -> Any:
    """murmur3's finaliser."""
    x = (x ^ lax.shift_right_logical(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ lax.shift_right_logical(x, 13)) * _signed(0xC2B2AE35)
    return x ^ lax.shift_right_logical(x, 16)


def _signed(bits: int) -> Any:
    return jnp.int32(bits - (bits >> 31 << 32))


def _draw(logits: Any, noise: Any, heat: Any, entry: Any, real: Any) -> tuple[Any, ...]:
    """Of one tile, in MarkovDraw's order: (entry, score, logit, best, others), in float32."""

    def spread(x: Any) -> Any:
        return lax.broadcast_in_dim(x, logits.shape, (0,))

    def first_where(found: Any) -> Any:
        return -jnp.max(jnp.where(found, -number, NOTHING), axis=1)

    number = entry.astype(jnp.float32)
    sums = jnp.where(real, logits + spread(heat) * noise, NOTHING)
    score = jnp.max(sums, axis=1)
    drawn = first_where(sums == spread(score))
    scaled = jnp.where(real, logits / spread(jnp.where(heat == 0, 1.0, heat)), NOTHING)
    logit = jnp.max(jnp.where(number == spread(drawn), scaled, NOTHING), axis=1)
    best = jnp.max(scaled, axis=1)
    likeliest = first_where(scaled == spread(best))
    rival = real & (number != spread(likeliest))
    others = jnp.sum(jnp.where(rival, jnp.exp(scaled - spread(best)), 0.0), axis=1)
    return drawn, score, logit, best, others


def _both(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """One draw from those of two parts, the first of which has the lower entries."""
    (entry, score, logit, best, others), (entry_b, score_b, logit_b, best_b, others_b) = a, b
    later, top = score_b > score, jnp.maximum(best, best_b)
    wins = jnp.where(best >= best_b, 1.0, 0.0)
    rivals = (others + 1 - wins) * jnp.exp(best - top) + (others_b + wins) * jnp.exp(best_b - top)
    return (
        jnp.where(later, entry_b, entry),
        jnp.maximum(score, score_b),
        jnp.where(later, logit_b, logit),
        top,
        rivals,
    )
