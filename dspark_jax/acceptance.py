"""Rejection sampling: which drafted tokens the target keeps, and the token it adds itself.

Whatever the draft proposes, emitted tokens are distributed as the target alone would emit them
(Leviathan et al. 2023; paper §2). At temperature 0 they are the target's argmax, token by token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dspark_jax.sampling import draw, largest, salted
from dspark_jax.types import Proposal, Recipe, Verdict

ACCEPT_SALT, EMIT_SALT = 1, 2


def accept(
    proposal: Proposal,
    target_logits: Float[Array, "B S V"],
    target_id: Int[Array, "Vd"],
    verify_length: Int[Array, "B"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
) -> Verdict:
    """Judge one block per sequence.

    Draft i < `verify_length` is kept with probability min(1, p(x)/q(x)). The first refusal emits a
    draw from max(p - q, 0) renormalised; a block kept up to `verify_length` emits a draw from p.
    `target_logits[:, i]` is the target's prediction of draft i's position; rows past
    `verify_length` are not read. `keys` must be fresh every round and not be the draft's.
    """
    greedy, best = temperature == 0, largest(target_logits)
    scale = jnp.where(greedy, 1.0, temperature)[:, None]
    kept = jnp.where(
        greedy[:, None],
        proposal.tokens == best[:, :-1],
        jax.lax.cond(
            jnp.all(greedy),
            lambda: jnp.zeros(proposal.tokens.shape, bool),
            lambda: _kept_by_chance(proposal, target_logits, target_id, scale, keys),
        ),
    )
    slot = jnp.arange(kept.shape[1])
    accepted = jnp.sum(jnp.cumprod(kept & (slot < verify_length[:, None]), axis=1), axis=1)
    refused = accepted < verify_length
    logits = _at(target_logits, accepted)
    bonus = jnp.where(
        greedy,
        jnp.take_along_axis(best, accepted[:, None], axis=1)[:, 0],
        jax.lax.cond(
            jnp.all(greedy),
            lambda: jnp.zeros_like(accepted),
            lambda: _emit(proposal, logits, target_id, accepted, refused, scale, keys),
        ),
    )
    return Verdict(accepted, bonus.astype(proposal.tokens.dtype))


def _kept_by_chance(
    proposal: Proposal,
    target_logits: Float[Array, "B S V"],
    target_id: Int[Array, "Vd"],
    scale: Float[Array, "B 1"],
    keys: Key[Array, "B"],
) -> Any:
    """u < p(x) / q(x) per draft, compared as logarithms."""
    log_p = jax.nn.log_softmax(target_logits[:, :-1] / scale[..., None])
    log_p = jnp.take_along_axis(log_p, proposal.tokens[..., None], axis=-1)[..., 0]
    log_q = _log_q(proposal, target_id, scale)
    chance = jax.vmap(lambda key: jax.random.uniform(key, log_p.shape[1:]))
    return jnp.log(chance(salted(keys, ACCEPT_SALT))) < log_p - log_q


def _log_q(
    proposal: Proposal, target_id: Int[Array, "Vd"], scale: Float[Array, "B 1"]
) -> Float[Array, "B G"]:
    """The drafted tokens' log-probabilities in the distributions they were drawn from."""
    if isinstance(proposal.logits, Recipe):
        return proposal.logits.log_q
    log_q = jax.nn.log_softmax(proposal.logits / scale[..., None])
    # Draft ids ascend with target ids, so the drafted token's place is found by bisection.
    place = jnp.searchsorted(target_id, proposal.tokens)
    return jnp.take_along_axis(log_q, place[..., None], axis=-1)[..., 0]


def _drafted_from(
    proposal: Proposal, target_id: Int[Array, "Vd"], row: Int[Array, "B"]
) -> Float[Array, "B Vd"]:
    """The logits that one slot of every block was drawn from."""
    made = proposal.logits
    if not isinstance(made, Recipe):
        return _at(made, row)
    correction = jnp.matmul(_at(made.mixed, row), made.w2, preferred_element_type=jnp.float32)
    token = jnp.take_along_axis(proposal.tokens, row[:, None], axis=1)
    one_hot = jnp.where(target_id == token, 0.0, -jnp.inf)
    return jnp.where(made.certain[:, None], one_hot, _at(made.base, row) + correction)


def _emit(
    proposal: Proposal,
    logits: Float[Array, "B V"],
    target_id: Int[Array, "Vd"],
    accepted: Int[Array, "B"],
    refused: Any,
    scale: Float[Array, "B 1"],
    keys: Key[Array, "B"],
) -> Int[Array, "B"]:
    """A draw from p, or from the positive part of p - q where a draft was refused."""
    p = jax.nn.softmax(logits / scale)
    last = proposal.tokens.shape[1] - 1
    drafted = _drafted_from(proposal, target_id, jnp.minimum(accepted, last))
    q = jax.nn.softmax(drafted / scale)
    residual = jnp.maximum(p - jnp.zeros_like(p).at[:, target_id].set(q), 0.0)
    # Rounding can leave nothing when p and q agree; the refusal then had probability zero.
    empty = jnp.sum(residual, axis=-1, keepdims=True) <= 0.0
    weights = jnp.where(refused[:, None] & ~empty, residual, p)
    return draw(salted(keys, EMIT_SALT), jnp.log(weights))


def _at(values: Float[Array, "B S n"], row: Int[Array, "B"]) -> Float[Array, "B n"]:
    return jnp.take_along_axis(values, row[:, None, None], axis=1)[:, 0]
