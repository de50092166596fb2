"""Drafting through a Markov head on TPUs: a step reads its factor and its base logits once.

Tile after tile of the vocabulary, the bias, the noise and what is kept of them are computed where
the tile lies: no row of logits, and none of noise, is ever written. What survives a tile is five
numbers per sequence.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt32

from dspark_jax.pallas_kernels.markov import reference
from dspark_jax.pallas_kernels.markov.reference import (
    LOWEST,
    MarkovBlock,
    MarkovDraw,
    hashed_gumbel,
)

MOST_SEQUENCES = 1024
TILE_NUMBERS = 128 * 1024
"""Of a tile of logits, [B, tile]: half a megabyte, of which a dozen are alive."""
MOST_TILE, LANES = 2048, 128
FACTOR_BYTES = 4 * 2**20
"""Of a tile of the factor."""
VMEM_BYTES = 40 * 2**20
"""Of 64 MiB on the smallest of the chips meant, beyond what compilers take unasked."""


def markov_step(
    base: Float[Array, "G B Vd"],
    mixed: Float[Array, "B r"],
    w2: Float[Array, "r Vd"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    slot: Int[Array, ""],
    first_entry: Int[Array, ""],
    *,
    interpret: Any = False,
) -> MarkovDraw:
    """Draw the entry of one slot of every block, whose base logits are read in place."""
    (_, B, Vd), r = base.shape, mixed.shape[1]
    tile = tile_size(B, r, Vd, w2.dtype.itemsize)
    scalars = jnp.stack([slot, first_entry]).astype(jnp.int32)

    def whole(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((B, columns), lambda t, scalars: (0, 0))

    kept = [jnp.int32, *[jnp.float32] * 4]
    read = B * Vd * base.dtype.itemsize + w2.nbytes
    drawn = pl.pallas_call(
        functools.partial(_kernel, Vd=Vd),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(Vd, tile),),
            in_specs=[
                pl.BlockSpec((None, B, tile), lambda t, scalars: (scalars[0], 0, t)),
                whole(r),
                pl.BlockSpec((r, tile), lambda t, scalars: (0, t)),
                whole(2),
                whole(1),
            ],
            out_specs=[whole(1) for _ in kept],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, 1), dtype) for dtype in kept],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * r * Vd + 30 * B * Vd, bytes_accessed=read, transcendentals=3 * B * Vd
        ),
        interpret=interpret,
        name="markov_step",
    )(scalars, base, mixed.astype(w2.dtype), w2, words, temperature.astype(jnp.float32)[:, None])
    return MarkovDraw(*(x[:, 0] for x in drawn))


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
    interpret: Any = False,
) -> MarkovBlock:
    """Draft the G tokens that follow `anchor`, one kernel after another; XLA gathers and mixes."""

    def step(*arguments: Any) -> MarkovDraw:
        return markov_step(*arguments, interpret=interpret)

    return reference.run_block(
        step, base, hidden, anchor, state, words, temperature,
        (w1, w2, mix_kernel, mix_bias), target_id, head_type,
    )  # fmt: skip


def unsupported(
    base: Any, mixed: Any, w2: Any, words: Any, temperature: Any, slot: Any, first_entry: Any
) -> str | None:
    """Why a step of these shapes and types cannot be run here; None if it can."""
    if base.ndim != 3 or mixed.ndim != 2 or w2.ndim != 2 or 0 in (*base.shape, *mixed.shape):
        return f"Base {base.shape}, mixed {mixed.shape}, w2 {w2.shape}: not slots, rows, a factor."
    if base.dtype not in FLOATS or w2.dtype not in FLOATS or mixed.dtype not in FLOATS:
        kinds = f"{base.dtype}, mixed {mixed.dtype} and w2 {w2.dtype}"
        return f"Base is {kinds}; only bfloat16 and float32 can be multiplied."
    if base.shape[1] > MOST_SEQUENCES:
        return f"{base.shape[1]} sequences are more than the {MOST_SEQUENCES} that fit VMEM."
    if w2.shape[0] * LANES * w2.dtype.itemsize > FACTOR_BYTES:
        return f"A tile of {w2.shape[0]} rows of the factor does not fit VMEM."
    return None


FLOATS = (jnp.bfloat16, jnp.float32)
SEMANTICS = ("arbitrary",)
"""Of the grid: what is kept goes from tile to tile."""


def tile_size(B: int, r: int, Vd: int, width: int) -> int:
    """Columns of the vocabulary at a time."""
    tile = MOST_TILE
    while tile > LANES and (B * tile > TILE_NUMBERS or r * tile * width > FACTOR_BYTES):
        tile //= 2
    return min(tile, Vd)


def clear(entry: Any, score: Any, logit: Any, best: Any, others: Any) -> None:
    """Begin with nothing drawn: every real entry beats this one."""
    entry[...] = jnp.zeros_like(entry)
    score[...] = jnp.full_like(score, -jnp.inf)
    logit[...] = jnp.full_like(logit, LOWEST)
    best[...] = jnp.full_like(best, -jnp.inf)
    others[...] = jnp.zeros_like(others)


def _kernel(
    scalars: Any,
    base: Any,
    mixed: Any,
    w2: Any,
    words: Any,
    temperature: Any,
    entry: Any,
    score: Any,
    logit: Any,
    best: Any,
    others: Any,
    *,
    Vd: int,
) -> None:
    """Draw from one tile of the vocabulary, and keep it where it beats what was drawn before."""
    t, tile = pl.program_id(0), w2.shape[1]
    pl.when(t == 0)(lambda: clear(entry, score, logit, best, others))
    logits = base[...].astype(jnp.float32)
    logits += jnp.dot(mixed[...], w2[...], preferred_element_type=jnp.float32)
    column = t * tile + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # Past the vocabulary's end a tile holds anything, and not only numbers.
    logits = jnp.where(column < Vd, jnp.maximum(logits, LOWEST), -jnp.inf)

    number = (scalars[1] + column).astype(jnp.uint32)
    noise = hashed_gumbel(words[:, :1], words[:, 1:], number)
    sums = logits + temperature[...] * noise
    scaled = logits / jnp.where(temperature[...] == 0, 1.0, temperature[...])
    top, drawn = first_largest(sums, column)
    high, likeliest = first_largest(scaled, column)

    better = top > score[...]
    own = jnp.sum(jnp.where(column == drawn, scaled, 0.0), axis=1, keepdims=True)
    entry[...] = jnp.where(better, drawn, entry[...])
    logit[...] = jnp.where(better, own, logit[...])
    score[...] = jnp.maximum(top, score[...])

    rivals = jnp.where(column == likeliest, 0.0, jnp.exp(scaled - high))
    ahead, whole = high > best[...], jnp.maximum(high, best[...])
    # The largest of all is left out; the largest of the tiles before or of this one is a rival.
    before = (others[...] + ahead.astype(jnp.float32)) * jnp.exp(best[...] - whole)
    here = jnp.sum(rivals, axis=1, keepdims=True) + (1.0 - ahead.astype(jnp.float32))
    others[...] = before + here * jnp.exp(high - whole)
    best[...] = whole


def first_largest(x: Any, column: Any) -> tuple[Any, Any]:
    """Each row's largest number and the first column that has it, the last axis kept.

    Columns are compared as float32, exact up to 2^24.
    """
    most = jnp.max(x, axis=-1, keepdims=True)
    place = jnp.where(x == most, column.astype(jnp.float32), 2.0**24)
    return most, jnp.min(place, axis=-1, keepdims=True).astype(jnp.int32)
