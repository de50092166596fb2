"""What rejection sampling needs of a vocabulary, in plain JAX: the specification.

One read of the target's logits gives what every drafted token is judged by (Leviathan et al. 2023;
paper §2), one read of a single row per sequence the token that the target adds itself. Draws follow
the Gumbel-max rule with noise from two words per sequence: the drafter's rule, so the words must
not be the drafter's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dspark_jax.pallas_kernels.markov.reference import LOWEST, hashed_gumbel


class RowStatistics(NamedTuple):
    """Of every row of logits."""

    best: Int[Array, "B S"]
    """The first entry with the largest logit."""
    log_p: Float[Array, "B S"]
    """The row's token's log-probability; -1e30 or less where it has none."""
    lse: Float[Array, "B S"]
    """The logarithm of the sum of exp(logits / temperature)."""


def row_statistics(
    logits: Float[Array, "B S V"], tokens: Int[Array, "B S"], temperature: Float[Array, "B"]
) -> RowStatistics:
    """Of softmax(logits / temperature), or of temperature 1 where it is 0.

    A token outside the vocabulary, as of a row without a draft, has no probability.
    """
    scale = jnp.where(temperature == 0, 1.0, temperature)[:, None, None]
    scaled = jnp.maximum(logits.astype(jnp.float32) / scale, LOWEST)
    lse = jax.nn.logsumexp(scaled, axis=-1)
    inside = (tokens >= 0) & (tokens < logits.shape[-1])
    own = jnp.take_along_axis(scaled, jnp.where(inside, tokens, 0)[..., None], axis=-1)[..., 0]
    log_p = jnp.where(inside, own, LOWEST) - lse
    return RowStatistics(jnp.argmax(scaled, axis=-1).astype(jnp.int32), log_p, lse)


def residual_draw(
    p_logits: Float[Array, "B V"],
    q_logits: Float[Array, "B Vd"],
    p_lse: Float[Array, "B"],
    q_lse: Float[Array, "B"],
    refused: Bool[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    target_id: Int[Array, "Vd"] | None = None,
) -> Int[Array, "B"]:
    """A draw from max(p - q, 0) renormalised where a draft was `refused`, from p elsewhere.

    `p_lse` and `q_lse` are logarithms of sums of exp(logits / temperature); at temperature 0 they
    are not used and the draw is p's argmax. `target_id` are the target's ids of q's entries,
    ascending, None where they are the same. Where rounding leaves nothing of p - q the draw is
    from p: the refusal then had probability zero.
    """
    q_logits = in_target(q_logits, target_id, p_logits.shape[1])
    scale = jnp.where(temperature == 0, 1.0, temperature)[:, None]
    number = jnp.arange(p_logits.shape[1], dtype=jnp.uint32)
    noise = hashed_gumbel(words[:, :1], words[:, 1:], number)
    p_logits = jnp.maximum(p_logits.astype(jnp.float32), LOWEST)
    p = jnp.exp(p_logits / scale - p_lse[:, None])
    q = jnp.exp(q_logits.astype(jnp.float32) / scale - q_lse[:, None])
    left = jnp.where(p > q, jnp.log(p - q) + noise, -jnp.inf)
    anything = jnp.max(left, axis=-1) > -jnp.inf
    residual = refused & (temperature > 0) & anything
    from_p = p_logits + temperature[:, None] * noise
    return first_largest(jnp.where(residual[:, None], left, from_p))


def first_largest(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The argmax, the first of equals, by two plain reductions: a CPU runs them much faster.

    Places are compared as float32, exact up to 2^24 entries.
    """
    place = jnp.arange(x.shape[-1], dtype=jnp.float32)
    best = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, place, jnp.inf), axis=-1).astype(jnp.int32)


def in_target(
    q_logits: Float[Array, "B Vd"], target_id: Int[Array, "Vd"] | None, V: int
) -> Float[Array, "B V"]:
    """Draft logits where the target has them; the draft gives its other tokens no chance."""
    if target_id is None:
        return q_logits
    # Of ids that need no sorting: a sort takes a TPU's compiler twenty seconds.
    nowhere = jnp.full((V, len(q_logits)), -jnp.inf, q_logits.dtype)
    return nowhere.at[target_id].set(q_logits.T, unique_indices=True, indices_are_sorted=True).T
