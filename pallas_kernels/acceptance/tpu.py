"""What rejection sampling needs of a vocabulary, on TPUs: every logit is read once.

Tile after tile of the vocabulary, maxima and sums are kept in VMEM; no probabilities, no noise and
no scaled logits are ever written.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax.pallas_kernels.acceptance.reference import RowStatistics, in_target
from dspark_jax.pallas_kernels.markov.reference import LOWEST, hashed_gumbel
from dspark_jax.pallas_kernels.markov.tpu import first_largest

MOST_ROWS = 64
"""Rows of a tile of logits."""
MOST_TILE = 2048
"""Its columns: with 64 rows half a megabyte, of which a dozen are alive."""
VMEM_BYTES = 40 * 2**20
"""Of 64 MiB on the smallest of the chips meant, beyond what compilers take unasked."""
FLOATS = (jnp.bfloat16, jnp.float32)
SEMANTICS = ("parallel", "arbitrary")
"""Of both grids: what is kept goes from tile to tile of the vocabulary."""


def row_statistics(
    logits: Float[Array, "B S V"],
    tokens: Int[Array, "B S"],
    temperature: Float[Array, "B"],
    *,
    interpret: Any = False,
) -> RowStatistics:
    """Of softmax(logits / temperature), or of temperature 1 where it is 0."""
    B, S, V = logits.shape
    tokens, temperature = tokens[..., None], temperature.astype(jnp.float32)[:, None, None]
    # Eight rows lie together: sequences where slots would not fill them, as XLA has it too.
    turned = S % 8 != 0 and B % 8 == 0 and B <= MOST_ROWS
    if turned:
        logits, tokens, temperature = (jnp.swapaxes(x, 0, 1) for x in (logits, tokens, temperature))
    many, together = logits.shape[:2]
    here, tile = min(many, max(1, MOST_ROWS // (-(-together // 8) * 8))), min(V, MOST_TILE)
    rows = pl.BlockSpec((here, together, 1), lambda b, t: (b, 0, 0))
    if turned:
        scales = pl.BlockSpec((1, together, 1), lambda b, t: (0, 0, 0))
    else:
        scales = pl.BlockSpec((here, 1, 1), lambda b, t: (b, 0, 0))

    kinds = [jnp.int32, *[jnp.float32] * 3]
    best, own, most, total = pl.pallas_call(
        functools.partial(_statistics, V=V),
        grid=(pl.cdiv(many, here), pl.cdiv(V, tile)),
        in_specs=[pl.BlockSpec((here, together, tile), lambda b, t: (b, 0, t)), rows, scales],
        out_specs=[rows] * 4,
        out_shape=[jax.ShapeDtypeStruct((many, together, 1), kind) for kind in kinds],
        compiler_params=_parameters(),
        cost_estimate=pl.CostEstimate(
            flops=8 * logits.size, bytes_accessed=logits.nbytes, transcendentals=logits.size
        ),
        interpret=interpret,
        name="row_statistics",
    )(logits, tokens, temperature)
    lse = most + jnp.log(total)
    found = [x[..., 0] for x in (best, own - lse, lse)]
    return RowStatistics(*(x.T if turned else x for x in found))


def residual_draw(
    p_logits: Float[Array, "B V"],
    q_logits: Float[Array, "B Vd"],
    p_lse: Float[Array, "B"],
    q_lse: Float[Array, "B"],
    refused: Bool[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    target_id: Int[Array, "Vd"] | None = None,
    *,
    interpret: Any = False,
) -> Int[Array, "B"]:
    """A draw from max(p - q, 0) renormalised where a draft was `refused`, from p elsewhere.

    XLA brings q of a reduced vocabulary to the target's first.
    """
    B, V = p_logits.shape
    q_logits, here, tile = in_target(q_logits, target_id, V), min(B, MOST_ROWS), min(V, MOST_TILE)

    def whole(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((here, columns), lambda b, t: (b, 0))

    logits = pl.BlockSpec((here, tile), lambda b, t: (b, t))
    numbers = [temperature, p_lse, q_lse]
    columns = [x.astype(jnp.float32)[:, None] for x in numbers]
    from_p, residual, _, left = pl.pallas_call(
        functools.partial(_draw, V=V),
        grid=(pl.cdiv(B, here), pl.cdiv(V, tile)),
        in_specs=[logits, logits, whole(2), *(whole(1) for _ in columns)],
        out_specs=[whole(1) for _ in range(4)],
        out_shape=[
            jax.ShapeDtypeStruct((B, 1), kind)
            for kind in (jnp.int32, jnp.int32, jnp.float32, jnp.float32)
        ],
        compiler_params=_parameters(),
        cost_estimate=pl.CostEstimate(
            flops=40 * B * V,
            bytes_accessed=p_logits.nbytes + q_logits.nbytes,
            transcendentals=5 * B * V,
        ),
        interpret=interpret,
        name="residual_draw",
    )(p_logits, q_logits, words, *columns)
    chosen = refused & (temperature > 0) & (left[:, 0] > -jnp.inf)
    return jnp.where(chosen, residual[:, 0], from_p[:, 0])


def unsupported_row_statistics(logits: Any, tokens: Any, temperature: Any) -> str | None:
    """Why `row_statistics` of these shapes and types cannot be run here; None if it can."""
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or 0 in logits.shape:
        return f"Logits {logits.shape} and tokens {tokens.shape} are not rows of sequences."
    if logits.dtype not in FLOATS:
        return f"Logits are {logits.dtype}, neither bfloat16 nor float32."
    if logits.shape[1] > MOST_ROWS:
        return f"{logits.shape[1]} rows of a sequence are more than the {MOST_ROWS} of a tile."
    return None


def unsupported_residual_draw(p_logits: Any, q_logits: Any, *others: Any) -> str | None:
    """Why `residual_draw` of these shapes and types cannot be run here; None if it can."""
    del others
    if p_logits.ndim != 2 or q_logits.ndim != 2 or 0 in (*p_logits.shape, *q_logits.shape):
        return f"Logits {p_logits.shape} and {q_logits.shape} are not one row per sequence."
    if p_logits.dtype not in FLOATS or q_logits.dtype not in FLOATS:
        return f"Logits are {p_logits.dtype} and {q_logits.dtype}, not bfloat16 or float32."
    return None


def _parameters() -> Any:
    """What both kernels are compiled with."""
    return pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=VMEM_BYTES)


def clear(*kept: Any) -> None:
    """Begin with nothing seen: every real entry beats this one."""
    for one in kept:
        nothing = -jnp.inf if one.dtype == jnp.float32 else 0
        one[...] = jnp.full(one.shape, nothing, one.dtype)


def _statistics(
    logits: Any,
    tokens: Any,
    temperature: Any,
    best: Any,
    own: Any,
    most: Any,
    total: Any,
    *,
    V: int,
) -> None:
    """Add one tile of the vocabulary to what is kept of every row, [rows, slots, 1]."""
    t, tile = pl.program_id(1), logits.shape[-1]

    @pl.when(t == 0)
    def _() -> None:
        clear(best, most)
        own[...] = jnp.full_like(own, LOWEST)
        total[...] = jnp.zeros_like(total)

    scale = jnp.where(temperature[...] == 0, 1.0, temperature[...])
    scaled = jnp.maximum(logits[...].astype(jnp.float32) / scale, LOWEST)
    column = t * tile + jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 2)
    # Past the vocabulary's end a tile holds anything, and not only numbers.
    scaled = jnp.where(column < V, scaled, -jnp.inf)
    high, first = first_largest(scaled, column)
    whole = jnp.maximum(high, most[...])
    here = jnp.sum(jnp.exp(scaled - whole), axis=-1, keepdims=True)
    total[...] = total[...] * jnp.exp(most[...] - whole) + here
    best[...] = jnp.where(high > most[...], first, best[...])
    most[...] = whole
    is_own = (column == tokens[...]) & (column < V)
    mine = jnp.max(jnp.where(is_own, scaled, LOWEST), axis=-1, keepdims=True)
    own[...] = jnp.maximum(own[...], mine)


def _draw(
    p_logits: Any,
    q_logits: Any,
    words: Any,
    temperature: Any,
    p_lse: Any,
    q_lse: Any,
    from_p: Any,
    residual: Any,
    top_p: Any,
    top_left: Any,
    *,
    V: int,
) -> None:
    """Draw both from p and from p - q in one tile, and keep what beats the tiles before."""
    t, tile = pl.program_id(1), p_logits.shape[1]
    pl.when(t == 0)(lambda: clear(from_p, residual, top_p, top_left))
    scale = jnp.where(temperature[...] == 0, 1.0, temperature[...])
    wide = jnp.maximum(p_logits[...].astype(jnp.float32), LOWEST)
    column = t * tile + jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    noise = hashed_gumbel(words[:, :1], words[:, 1:], column.astype(jnp.uint32))
    p = jnp.exp(wide / scale - p_lse[...])
    q = jnp.exp(q_logits[...].astype(jnp.float32) / scale - q_lse[...])
    # Past the vocabulary's end a tile holds anything, and not only numbers.
    sums = jnp.where(column < V, wide + temperature[...] * noise, -jnp.inf)
    real = (column < V) & (p > q)
    left = jnp.where(real, jnp.log(jnp.where(real, p - q, 1.0)) + noise, -jnp.inf)
    for drawn, most, values in ((from_p, top_p, sums), (residual, top_left, left)):
        high, first = first_largest(values, column)
        drawn[...] = jnp.where(high > most[...], first, drawn[...])
        most[...] = jnp.maximum(high, most[...])
