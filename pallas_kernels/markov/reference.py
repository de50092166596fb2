"""Drafting through a Markov head in plain JAX: the specification, and what a CPU runs.

Position after position (paper §3.1), a draft's base logits get the low-rank bias `mixed @ w2`, and
one entry is drawn by the Gumbel-max rule. Its noise is a function of two words per sequence and of
the entry's number in the block, so that whoever holds a part of the vocabulary draws alike.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

LOWEST = -1e30
"""An impossible logit, finite so that differences of two are numbers."""
MOST_ODDS = 40.0


class MarkovDraw(NamedTuple):
    """One entry per sequence and what its distribution, softmax(logits / temperature), is like.

    At temperature 0 the distribution is that of temperature 1.
    """

    entry: Int[Array, "B"]
    """The entry drawn: the first that has the largest `logits + temperature * noise`."""
    score: Float[Array, "B"]
    """That largest sum."""
    logit: Float[Array, "B"]
    """The drawn entry's logit / temperature."""
    best: Float[Array, "B"]
    """The largest logit / temperature."""
    others: Float[Array, "B"]
    """The sum of exp(logit / temperature - best) over all entries but one with the largest."""


class MarkovBlock(NamedTuple):
    """A drafted block: `mixed` gives the logits again, by `markov_logits`."""

    tokens: Int[Array, "B G"]
    log_q: Float[Array, "B G"]
    lse: Float[Array, "B G"]
    """Logarithms of sums of exp(logits / temperature), as a draw from p - q takes them."""
    odds: Float[Array, "B G"]
    embedding: Float[Array, "B G r"]
    mixed: Float[Array, "B G r"]


class Share(NamedTuple):
    """A device's part of a vocabulary that several devices share evenly."""

    first: Int[Array, ""]
    """The number of its first entry."""
    whole: int
    """Entries of all devices."""
    gather: Callable[[Array], Array]
    """Puts what every device has one behind the other, in front."""


def log_probability(draw: MarkovDraw) -> Float[Array, "B"]:
    """Of the entry drawn."""
    return draw.logit - draw.best - jnp.log1p(draw.others)


def log_sum(draw: MarkovDraw) -> Float[Array, "B"]:
    """Of exp(logits / temperature)."""
    return draw.best + jnp.log1p(draw.others)


def likeliest_odds(draw: MarkovDraw) -> Float[Array, "B"]:
    """Log-odds of the likeliest entry, within ±40, whichever was drawn."""
    return jnp.clip(-jnp.log(draw.others), -MOST_ODDS, MOST_ODDS)


def joined(parts: MarkovDraw, first: Int[Array, "P"]) -> MarkovDraw:
    """The draw from a vocabulary cut in P parts, from the parts' draws stacked in front.

    Part p's entry 0 is entry `first[p]` of the whole; parts are in ascending order.
    """
    chosen = jnp.argmax(parts.score, axis=0)[None]
    best = jnp.max(parts.best, axis=0)
    winner = jnp.argmax(parts.best, axis=0)[None]
    rivals = jnp.where(jnp.arange(len(first))[:, None] == winner, parts.others, parts.others + 1)
    others = jnp.sum(rivals * jnp.exp(parts.best - best), axis=0)

    def own(values: Array) -> Array:
        return jnp.take_along_axis(values, chosen, axis=0)[0]

    entry = own(parts.entry + first[:, None])
    return MarkovDraw(entry, own(parts.score), own(parts.logit), best, others)


def agreed(draw: MarkovDraw, share: Share | None) -> MarkovDraw:
    """The draw from the whole vocabulary, the same on every device that shares it.

    Entries travel as float32 beside the other numbers, exact up to 2^24.
    """
    if share is None:
        return draw
    parts = share.gather(jnp.stack([x.astype(jnp.float32) for x in draw]))
    entry, *others = jnp.moveaxis(parts, 1, 0)
    first = share.whole // len(parts) * jnp.arange(len(parts), dtype=jnp.int32)
    return joined(MarkovDraw(entry.astype(jnp.int32), *others), first)


def markov_step(
    base: Float[Array, "G B Vd"],
    mixed: Float[Array, "B r"],
    w2: Float[Array, "r Vd"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    slot: Int[Array, ""],
    first_entry: Int[Array, ""],
) -> MarkovDraw:
    """Draw the entry of one slot of every block.

    `base` is laid out slot by slot, as a step reads it. Entry v of this slot has the number
    `first_entry + v`: where the whole vocabulary is here, `slot * Vd`.
    """
    own = jax.lax.dynamic_index_in_dim(base, slot, keepdims=False)
    logits = jnp.maximum(markov_logits(own, mixed, w2), LOWEST)
    number = first_entry.astype(jnp.uint32) + jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    score = logits + temperature[:, None] * hashed_gumbel(words[:, :1], words[:, 1:], number)
    entry = jnp.argmax(score, axis=-1)
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None]
    first = jnp.argmax(scaled, axis=-1)[:, None]
    best = jnp.max(scaled, axis=-1)
    rivals = jnp.arange(logits.shape[-1]) != first
    others = jnp.sum(jnp.where(rivals, jnp.exp(scaled - best[:, None]), 0.0), axis=-1)
    logit = jnp.take_along_axis(scaled, entry[:, None], axis=-1)[:, 0]
    return MarkovDraw(entry.astype(jnp.int32), jnp.max(score, axis=-1), logit, best, others)


def markov_logits(
    base: Float[Array, "*rows Vd"], mixed: Float[Array, "*rows r"], w2: Float[Array, "r Vd"]
) -> Float[Array, "*rows Vd"]:
    """Corrected logits, before temperature, in float32: a step's, or of single rows once more."""
    return base.astype(jnp.float32) + jnp.matmul(mixed, w2, preferred_element_type=jnp.float32)


def hashed_gumbel(
    low: UInt32[Array, "*#any"], high: UInt32[Array, "*#any"], number: UInt32[Array, "*#any"]
) -> Float[Array, "*any"]:
    """Gumbel noise of entries by number, from two words; always finite.

    Each number is mixed with the words by murmur3's finaliser. 23 bits and a half are exact in
    float32; with 24 the largest would round to 1, whose noise is infinite.
    """
    bits = _mix(_mix(number * jnp.uint32(0x9E3779B9) + low) ^ high)
    # The bits left fit a signed integer, which every device converts.
    uniform = ((bits >> 9).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """murmur3's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


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
) -> MarkovBlock:
    """Draft the G tokens that follow `anchor`, one after another.

    A head of type "vanilla" has no mixing map, "gated" `[h; e] -> r`, "rnn" `[s; e; h] -> 3 r`
    and a state, which `state` begins and every slot changes.
    """
    return run_block(
        markov_step, base, hidden, anchor, state, words, temperature,
        (w1, w2, mix_kernel, mix_bias), target_id, head_type,
    )  # fmt: skip


def run_block(
    step: Callable[..., MarkovDraw],
    base: Array,
    hidden: Array,
    anchor: Array,
    state: Array,
    words: Array,
    temperature: Array,
    head: tuple[Array, Array, Array | None, Array | None],
    target_id: Array,
    head_type: str,
    share: Share | None = None,
) -> MarkovBlock:
    """The scan over slots around any implementation of `markov_step`.

    With a `share` the base logits and the last factor have its columns alone.
    """
    (w1, w2, *mixing), (_, G, Vd) = head, base.shape
    first, Vd = (0, Vd) if share is None else share[:2]
    # XLA lays the product that gives `base` out like this, and nothing is copied.
    by_slot, hidden = jnp.moveaxis(base, 1, 0), jnp.moveaxis(hidden, 1, 0)

    def position(carry: Any, this: Any) -> tuple[Any, Any]:
        (state, prev), (slot, hidden) = carry, this
        embedding = w1[prev]
        state, mixed = mix(head_type, state, embedding, hidden, *mixing)
        draw = step(by_slot, mixed, w2, words, temperature, slot, slot * Vd + first)
        draw = agreed(draw, share)
        token = target_id[draw.entry].astype(prev.dtype)
        known = log_probability(draw), log_sum(draw), likeliest_odds(draw)
        return (state, token), (token, *known, embedding, mixed)

    slots = (jnp.arange(G, dtype=jnp.int32), hidden)
    _, drafted = jax.lax.scan(position, (state, anchor), slots)
    return MarkovBlock(*(jnp.moveaxis(x, 0, 1) for x in drafted))


def mix(
    head_type: str,
    state: Float[Array, "B r"],
    embedding: Float[Array, "B r"],
    hidden: Float[Array, "B D"],
    kernel: Float[Array, "m n"] | None,
    bias: Float[Array, "n"] | None,
) -> tuple[Float[Array, "B r"], Float[Array, "B r"]]:
    """(new state, f) of one slot, from the embedding e of the previous token.

    vanilla `f = e`; gated `f = σ(Wg [h; e]) ⊙ e`; rnn `(g, c, o) = split(Wj [s; e; h])`,
    `f = tanh(o)`, `s ← σ(g) ⊙ s + (1 - σ(g)) ⊙ tanh(c)`.
    """
    if head_type == "vanilla":
        return state, embedding
    assert kernel is not None and bias is not None

    def linear(*features: Array) -> Array:
        x = jnp.concatenate(features, axis=-1)
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)
        return y + bias.astype(y.dtype)

    if head_type == "gated":
        return state, jax.nn.sigmoid(linear(hidden, embedding)) * embedding
    gate, candidate, output = jnp.split(linear(state, embedding, hidden), 3, axis=-1)
    keep = jax.nn.sigmoid(gate)
    return keep * state + (1 - keep) * jnp.tanh(candidate), jnp.tanh(output)
