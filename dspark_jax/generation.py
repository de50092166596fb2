"""Whole answers on the device: speculative decoding, and plain decoding, which it must equal.

The host is needed only when every sequence is done.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dspark_jax.loop import Emitted, Request, Weights, cache_capacity, decode_step
from dspark_jax.sampling import draw, largest
from dspark_jax.types import DecodeState, Draft, Rows, Target


class Generation(NamedTuple):
    """Answers (the first `length` tokens of a row; the end token is included) and what they took.

    `survived[b, i]` counts the rounds in which draft i was accepted. `confidence` and `accepted`
    are of the first `rounds` rounds, one by one: what the draft said of its block, and how much of
    it was kept.
    """

    tokens: Int[Array, "B M"]
    length: Int[Array, "B"]
    rounds: Int[Array, "B"]
    survived: Int[Array, "B G"]
    confidence: Float[Array, "B M G"]
    accepted: Int[Array, "B M"]


def nothing(batch: int, limit: int, width: int) -> Generation:
    """Before the first round of answers of up to `limit` tokens, `width` drafts a round."""
    zeros = partial(jnp.zeros, dtype=jnp.int32)
    rounds = limit if width else 0
    return Generation(
        tokens=zeros((batch, limit)),
        length=zeros(batch),
        rounds=zeros(batch),
        survived=zeros((batch, width)),
        confidence=jnp.zeros((batch, rounds, width)),
        accepted=zeros((batch, rounds)),
    )


def generate(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: DecodeState,
    request: Request,
    limit: int,
    end: Int[Array, "E"],
    most: int | None = None,
) -> tuple[DecodeState, Generation]:
    """Decode until every sequence has met an end token or `max_tokens` (at most `limit`).

    With `most` no round verifies more drafts than that (see `decode_step`).
    """
    batch, width = state.anchor.shape[0], draft.draft_length
    done = nothing(batch, limit, width)

    def unfinished(carry: Any) -> Bool[Array, ""]:
        return jnp.any(carry[0].active)

    def round_(carry: Any) -> Any:
        state, done = carry
        was_active = state.active
        state, emitted = decode_step(target, draft, weights, state, request, most)
        before = done.length
        done = append(record(done, emitted, was_active), emitted, end, request.max_tokens)
        # Drafts cut off by the end of the answer were accepted for nothing: they do not count.
        accepted = jnp.minimum(emitted.length - 1, done.length - before)
        survived = (jnp.arange(width) < accepted[:, None]) & was_active[:, None]
        done = done._replace(rounds=done.rounds + was_active, survived=done.survived + survived)
        return state._replace(active=was_active & ~finished(done, end, request.max_tokens)), done

    return jax.lax.while_loop(unfinished, round_, (state, done))


def plain_state(
    target: Target, keys: Key[Array, "B"], capacity: int, dtype: Any = jnp.float32
) -> DecodeState:
    """Empty caches for plain decoding; no draft is involved."""
    batch = keys.shape[0]
    return DecodeState(
        anchor=jnp.zeros(batch, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        active=jnp.ones(batch, bool),
        keys=keys,
        draft_cache=(),
        target_cache=target.init_cache(batch, capacity, dtype),
    )


def plain_prefill(
    target: Target, prepared: Any, state: DecodeState, rows: Rows, anchor: Int[Array, "B"]
) -> DecodeState:
    """As `loop.prefill`, without a draft."""
    cache, _ = target.extend(prepared, state.target_cache, rows)
    real = rows.position < cache_capacity(cache)
    length = state.length + jnp.sum(real, axis=1, dtype=state.length.dtype)
    return state._replace(anchor=anchor, length=length, target_cache=cache)


def plain_generate(
    target: Target,
    prepared: Any,
    state: DecodeState,
    request: Request,
    limit: int,
    end: Int[Array, "E"],
) -> tuple[DecodeState, Generation]:
    """Plain decoding: one token per target pass, no draft anywhere in the program."""
    batch = state.anchor.shape[0]
    done = nothing(batch, limit, 0)

    def unfinished(carry: Any) -> Bool[Array, ""]:
        return jnp.any(carry[0].active)

    def one_token(carry: Any) -> Any:
        state, done = carry
        position = jnp.where(state.active, state.length, cache_capacity(state.target_cache))
        rows = Rows(state.anchor[:, None], position[:, None])
        cache, states = target.extend(prepared, state.target_cache, rows)
        logits = target.logits(prepared, states.final_hidden)[:, 0]
        token = sample(logits, request.temperature, state.keys, state.length)
        emitted = Emitted(token[:, None], state.active.astype(jnp.int32), jnp.zeros((batch, 0)))
        state = state._replace(anchor=token, length=state.length + state.active, target_cache=cache)
        rounds = done.rounds + state.active
        done = append(done, emitted, end, request.max_tokens)._replace(rounds=rounds)
        over = finished(done, end, request.max_tokens)
        return state._replace(active=state.active & ~over), done

    return jax.lax.while_loop(unfinished, one_token, (state, done))


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, "B"],
    keys: Key[Array, "B"],
    length: Int[Array, "B"],
) -> Int[Array, "B"]:
    """A draw from softmax(logits / temperature) per sequence; the argmax at temperature 0."""

    def by_chance() -> Int[Array, "B"]:
        fresh = jax.vmap(jax.random.fold_in)(keys, length)
        scaled = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None]
        return draw(fresh, scaled)

    best = largest(logits)
    drawn = jax.lax.cond(jnp.all(temperature == 0), lambda: best, by_chance)
    return jnp.where(temperature == 0, best, drawn).astype(jnp.int32)


def record(done: Generation, emitted: Emitted, active: Bool[Array, "B"]) -> Generation:
    """Note what the drafts of a round said and what became of them."""
    row = jnp.arange(len(active))
    place = jnp.where(active, done.rounds, done.accepted.shape[1])
    return done._replace(
        confidence=done.confidence.at[row, place].set(emitted.confidence, mode="drop"),
        accepted=done.accepted.at[row, place].set(emitted.length - 1, mode="drop"),
    )


def append(
    done: Generation, emitted: Emitted, end: Int[Array, "E"], max_tokens: Int[Array, "B"]
) -> Generation:
    """Add a round's tokens, cut after the first end token and at `max_tokens`."""
    slot = jnp.arange(emitted.tokens.shape[1])
    is_end = jnp.any(emitted.tokens[..., None] == end, axis=-1)
    before = jnp.cumsum(is_end, axis=1) - is_end
    real = (slot < emitted.length[:, None]) & (before == 0)
    real &= done.length[:, None] + slot < max_tokens[:, None]
    limit = done.tokens.shape[1]
    place = jnp.where(real, done.length[:, None] + slot, limit)
    row = jnp.arange(done.tokens.shape[0])[:, None]
    tokens = done.tokens.at[row, place].set(emitted.tokens, mode="drop")
    length = done.length + jnp.sum(real, axis=1, dtype=done.length.dtype)
    return done._replace(tokens=tokens, length=jnp.minimum(length, limit))


def finished(
    done: Generation, end: Int[Array, "E"], max_tokens: Int[Array, "B"]
) -> Bool[Array, "B"]:
    """Whether each answer has its end token or its last allowed token."""
    last = jnp.take_along_axis(done.tokens, jnp.maximum(done.length - 1, 0)[:, None], axis=1)
    ended = jnp.any(last == end, axis=1) & (done.length > 0)
    return ended | (done.length >= jnp.minimum(max_tokens, done.tokens.shape[1]))
