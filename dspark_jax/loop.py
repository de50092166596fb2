"""The decode step: draft, verify, accept, commit.

It knows no model: a target and a draft are records of functions. Everything is pure, runs on the
device and has one shape whatever is accepted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from dspark_jax.acceptance import accept
from dspark_jax.sampling import salted
from dspark_jax.types import (
    DecodeState,
    Draft,
    Frozen,
    Proposal,
    Recipe,
    Rows,
    Target,
    Verdict,
)

DRAFT_SALT, VERIFY_SALT = 11, 12


class Weights(NamedTuple):
    """The arrays a decode step reads and never changes; `prepare_weights` makes them."""

    target: Any
    draft: Any
    frozen: Frozen


def prepare_weights(
    target: Target, draft: Draft, params: Any, draft_params: Any, frozen: Frozen
) -> Weights:
    """Both models laid out for decoding; once per load, never inside a round."""
    return Weights(target.prepare(params), draft.prepare(draft_params), frozen)


class Request(NamedTuple):
    """How each sequence is decoded; data, so changing it compiles nothing.

    `verify_length` is how many drafts are checked per round: 0 is plain decoding by this very
    program, larger than the draft length means all.
    """

    verify_length: Int[Array, "B"]
    temperature: Float[Array, "B"]
    max_tokens: Int[Array, "B"]


class Emitted(NamedTuple):
    """A round's new tokens: the first `length` of every row are real.

    `confidence` is what the draft said of them, before the sigmoid.
    """

    tokens: Int[Array, "B S"]
    length: Int[Array, "B"]
    confidence: Float[Array, "B G"]


def init_state(
    target: Target, draft: Draft, keys: Key[Array, "B"], capacity: int, dtype: Any = jnp.float32
) -> DecodeState:
    """Empty caches for `len(keys)` sequences of up to `capacity` tokens."""
    batch = keys.shape[0]
    return DecodeState(
        anchor=jnp.zeros(batch, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        active=jnp.ones(batch, bool),
        keys=keys,
        draft_cache=draft.init_cache(batch, capacity, dtype),
        target_cache=target.init_cache(batch, capacity, dtype),
    )


def prefill(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: DecodeState,
    rows: Rows,
    anchor: Int[Array, "B"],
) -> DecodeState:
    """Run one chunk of prompt rows through both caches; `anchor` is the token that follows them.

    The last prompt token is the first anchor, so a prompt of n tokens has n - 1 rows and nothing
    is sampled here. Rows are padded with positions past the capacity.
    """
    target_cache, states = target.extend(weights.target, state.target_cache, rows)
    draft_cache = draft.extend_context(
        weights.draft, state.draft_cache, states.aux_hidden, rows.position
    )
    real = rows.position < cache_capacity(target_cache)
    length = state.length + jnp.sum(real, axis=1, dtype=state.length.dtype)
    return state._replace(
        anchor=anchor, length=length, draft_cache=draft_cache, target_cache=target_cache
    )


def decode_step(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: DecodeState,
    request: Request,
    most: int | None = None,
) -> tuple[DecodeState, Emitted]:
    """One round: draft a block, verify it in one pass, keep what the target keeps, commit.

    With `most`, 1 or more, the verify pass has room for no more drafts than that, whatever is
    requested: where rows cost time, the last ones of a block may not be worth theirs.
    """
    assert most is None or most >= 1, most
    drawing, judging = round_keys(state, request, draft.mesh)
    with jax.named_scope("draft"):
        block = draft.draft_block(
            weights.draft,
            weights.frozen,
            state.draft_cache,
            state.length,
            state.anchor,
            drawing,
            request.temperature,
        )
        proposal = block if most is None else first_drafts(block, most)
    with jax.named_scope("verify"):
        verify_length = jnp.clip(request.verify_length, 0, proposal.tokens.shape[1])
        rows = verify_rows(state, proposal, verify_length)
        target_cache, states = target.extend(weights.target, state.target_cache, rows)
        logits = target.logits(weights.target, states.final_hidden)
    with jax.named_scope("accept"):
        verdict = accept(
            proposal,
            logits,
            weights.frozen.target_id,
            verify_length,
            request.temperature,
            judging,
            draft.mesh,
        )
    with jax.named_scope("commit"):
        position = kept_positions(state, rows.position, verdict)
        draft_cache = draft.extend_context(
            weights.draft, state.draft_cache, states.aux_hidden, position
        )
        kept = commit(state, verdict)._replace(draft_cache=draft_cache, target_cache=target_cache)
    return kept, emit(state, proposal, verdict)._replace(confidence=block.confidence)


def round_keys(
    state: DecodeState, request: Request, mesh: Mesh | None
) -> tuple[Key[Array, "B"], Key[Array, "B"]]:
    """Fresh keys to draft and to verify with.

    On one device any, where all is greedy and nothing is drawn; several would have to ask one
    another whether it is.
    """

    def fresh() -> tuple[Key[Array, "B"], Key[Array, "B"]]:
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
        return salted(keys, DRAFT_SALT), salted(keys, VERIFY_SALT)

    if mesh is not None:
        return fresh()
    drawn = jnp.any(request.temperature > 0)
    return jax.lax.cond(drawn, fresh, lambda: (state.keys, state.keys))


def first_drafts(proposal: Proposal, length: int) -> Proposal:
    """The beginnings of blocks: everything that a slot has, of the first `length` slots."""
    made = proposal.logits
    whole = (made.w2,) if isinstance(made, Recipe) else ()
    whole += () if proposal.certain is None else (proposal.certain,)
    return jax.tree.map(lambda x: x if any(x is y for y in whole) else x[:, :length], proposal)


def verify_rows(state: DecodeState, proposal: Proposal, verify_length: Int[Array, "B"]) -> Rows:
    """The anchor and the admitted drafts at their positions; every other row is padding."""
    tokens = jnp.concatenate([state.anchor[:, None], proposal.tokens], axis=1)
    offset = jnp.arange(tokens.shape[1], dtype=state.length.dtype)
    admitted = state.active[:, None] & (offset <= verify_length[:, None])
    position = state.length[:, None] + offset
    return Rows(tokens, jnp.where(admitted, position, cache_capacity(state.target_cache)))


def kept_positions(
    state: DecodeState, position: Int[Array, "B S"], verdict: Verdict
) -> Int[Array, "B S"]:
    """Positions of the anchor and the accepted drafts, padding elsewhere."""
    kept = jnp.arange(position.shape[1]) <= verdict.accepted[:, None]
    return jnp.where(kept, position, cache_capacity(state.target_cache))


def commit(state: DecodeState, verdict: Verdict) -> DecodeState:
    """The state after a round; rows past the new length are stale and will be overwritten."""
    grown = state.length + verdict.accepted.astype(state.length.dtype) + 1
    return state._replace(
        anchor=jnp.where(state.active, verdict.bonus, state.anchor),
        length=jnp.where(state.active, grown, state.length),
    )


def emit(state: DecodeState, proposal: Proposal, verdict: Verdict) -> Emitted:
    """The accepted drafts, then the bonus token; nothing from an inactive sequence."""
    slot = jnp.arange(proposal.tokens.shape[1] + 1)
    drafts = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(slot == verdict.accepted[:, None], verdict.bonus[:, None], drafts)
    length = jnp.where(state.active, verdict.accepted + 1, 0)
    return Emitted(tokens, length, proposal.confidence)


def cache_capacity(cache: Any) -> int:
    """Rows per sequence of a target cache, whose arrays all end in [.., C, size]."""
    return jax.tree.leaves(cache)[0].shape[-2]
