"""Rejection sampling: which drafted tokens the target keeps, and the token it adds itself.

Whatever the draft proposes, emitted tokens are distributed as the target alone would emit them
(Leviathan et al. 2023; paper §2). At temperature 0 they are the target's argmax, token by token.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from dspark_jax import ops
from dspark_jax.sampling import key_words, salted
from dspark_jax.spread import Spread, over, recipe_lies, rows, run
from dspark_jax.types import Candidates, Proposal, Recipe, Verdict

ACCEPT_SALT, EMIT_SALT = 1, 2


def accept(
    proposal: Proposal,
    target_logits: Float[Array, "B S V"],
    target_id: Int[Array, "Vd"],
    verify_length: Int[Array, "B"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
    mesh: Mesh | None = None,
) -> Verdict:
    """Judge one block per sequence.

    Draft i < `verify_length` is kept with probability min(1, p(x)/q(x)). The first refusal emits a
    draw from max(p - q, 0) renormalised; a block kept up to `verify_length` emits a draw from p.
    `target_logits[:, i]` is the target's prediction of draft i's position; rows past
    `verify_length` are not read. `keys` must be fresh every round and not be the draft's. Over a
    mesh every group of devices judges its own sequences, whose whole vocabulary each of them has.
    """
    spread = over(mesh, len(keys))
    lie = rows(spread)
    made: Any = recipe_lies(spread) if isinstance(proposal.logits, Recipe) else lie
    drafts: Any = {"tokens": lie, "logits": made, "confidence": lie, "certain": lie}
    ins, judge = (Proposal(**drafts), lie, PartitionSpec(), lie, lie, lie), partial(_judge, spread)
    given = (proposal, target_logits, target_id, verify_length, temperature, keys)
    return run(mesh, judge, ins, lie, *given)


def _judge(
    spread: Spread,
    proposal: Proposal,
    target_logits: Float[Array, "B S V"],
    target_id: Int[Array, "Vd"],
    verify_length: Int[Array, "B"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
) -> Verdict:
    """`accept` on one device."""
    greedy, tokens = temperature == 0, proposal.tokens
    some = jnp.any(temperature > 0)
    if isinstance(proposal.logits, Recipe):
        # Devices exchange a recipe's row: all groups do, or none, whatever waits for whom.
        some = spread.anywhere(some)
    # The row after the last draft judges none.
    beside = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=-1)
    p = ops.row_statistics(target_logits, beside, temperature)
    unknown = jnp.zeros(tokens.shape)
    kept, q_lse = jax.lax.cond(
        some,
        lambda: _kept_by_chance(proposal, p.log_p[:, :-1], target_id, temperature, keys),
        lambda: (jnp.zeros(tokens.shape, bool), unknown),
    )
    kept = jnp.where(greedy[:, None], tokens == p.best[:, :-1], kept)
    slot = jnp.arange(kept.shape[1])
    accepted = jnp.sum(jnp.cumprod(kept & (slot < verify_length[:, None]), axis=1), axis=1)
    refused = accepted < verify_length
    bonus = jnp.where(
        greedy,
        _pick(p.best, accepted),
        jax.lax.cond(
            some,
            lambda: _emit(
                *(spread, proposal, target_logits, p.lse, q_lse, target_id, accepted),
                *(refused, temperature, keys),
            ),
            lambda: jnp.zeros(accepted.shape, p.best.dtype),
        ),
    )
    return Verdict(accepted, bonus.astype(tokens.dtype))


def _kept_by_chance(
    proposal: Proposal,
    log_p: Float[Array, "B G"],
    target_id: Int[Array, "Vd"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
) -> tuple[Bool[Array, "B G"], Float[Array, "B G"]]:
    """(u <= p(x) / q(x) per draft, compared as logarithms; the logarithms of q's sums).

    u is never 0: then even a token that the target forbids would be kept.
    """
    log_q, q_lse = _drafted(proposal, target_id, temperature)
    chance = jax.vmap(lambda key: 1 - jax.random.uniform(key, log_p.shape[1:]))
    return jnp.log(chance(salted(keys, ACCEPT_SALT))) <= log_p - log_q, q_lse


def _drafted(
    proposal: Proposal, target_id: Int[Array, "Vd"], temperature: Float[Array, "B"]
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """(log q of the drafted tokens, logarithms of sums of exp(logits / temperature)).

    At the temperature that they were drawn at. A certain token has logit 0 and no rivals.
    """
    made = proposal.logits
    if isinstance(made, Recipe):
        log_q, lse = made.log_q, made.lse
    elif isinstance(made, Candidates):
        scaled = made.logits / jnp.where(temperature == 0, 1.0, temperature)[:, None, None]
        own = target_id[made.entry] == proposal.tokens[..., None]
        lse = jax.nn.logsumexp(scaled, axis=-1)
        log_q = jnp.max(jnp.where(own, scaled, -jnp.inf), axis=-1) - lse
    else:
        # Draft ids ascend with target ids, so the drafted token's place is found by bisection.
        place = jnp.searchsorted(target_id, proposal.tokens).astype(jnp.int32)
        _, log_q, lse = ops.row_statistics(made, place, temperature)
    if proposal.certain is None:
        return log_q, lse
    certain = proposal.certain[:, None]
    return jnp.where(certain, 0.0, log_q), jnp.where(certain, 0.0, lse)


def _drafted_from(
    spread: Spread, proposal: Proposal, target_id: Int[Array, "Vd"], row: Int[Array, "B"]
) -> Float[Array, "B Vd"]:
    """The logits that one slot of every block was drawn from."""
    made = proposal.logits
    if isinstance(made, Recipe):
        bias = jnp.matmul(_at(made.mixed, row), made.w2, preferred_element_type=jnp.float32)
        logits = spread.columns(_at(made.base, row) + bias)
    elif isinstance(made, Candidates):
        impossible = jnp.full((len(row), len(target_id)), -jnp.inf, made.logits.dtype)
        place = (jnp.arange(len(row))[:, None], _at(made.entry, row))
        logits = impossible.at[place].set(_at(made.logits, row), unique_indices=True)
    else:
        logits = _at(made, row)
    if proposal.certain is None:
        return logits
    one_hot = jnp.where(target_id == _pick(proposal.tokens, row)[:, None], 0.0, -jnp.inf)
    return jnp.where(proposal.certain[:, None], one_hot, logits)


def _emit(
    spread: Spread,
    proposal: Proposal,
    target_logits: Float[Array, "B S V"],
    p_lse: Float[Array, "B S"],
    q_lse: Float[Array, "B G"],
    target_id: Int[Array, "Vd"],
    accepted: Int[Array, "B"],
    refused: Bool[Array, "B"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
) -> Int[Array, "B"]:
    """A draw from p, or from the positive part of p - q where a draft was refused."""
    logits = _at(target_logits, accepted)
    row = jnp.minimum(accepted, proposal.tokens.shape[1] - 1)
    drafted = _drafted_from(spread, proposal, target_id, row)
    ids = None if drafted.shape[1] == logits.shape[1] else target_id
    lse, words = (_pick(p_lse, accepted), _pick(q_lse, row)), key_words(salted(keys, EMIT_SALT))
    return ops.residual_draw(logits, drafted, *lse, refused, words, temperature, ids)


def _at(values: Shaped[Array, "B S n"], row: Int[Array, "B"]) -> Shaped[Array, "B n"]:
    """One row of every sequence."""
    return jnp.take_along_axis(values, row[:, None, None], axis=1)[:, 0]


def _pick(values: Any, row: Int[Array, "B"]) -> Any:
    """One number of every sequence, of [B S]."""
    return jnp.take_along_axis(values, row[:, None], axis=1)[:, 0]
