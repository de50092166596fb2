"""The tokens of a block: position by position, from the whole vocabulary or among candidates."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from dspark_jax import ops
from dspark_jax.config import DraftConfig
from dspark_jax.draft_candidates import draft_among
from dspark_jax.draft_decoder import DraftDecoder, run_block
from dspark_jax.heads import MarkovHead
from dspark_jax.sampling import choose, noise_words, sampling_noise
from dspark_jax.spread import ALONE, Spread
from dspark_jax.types import DraftCache, Frozen, Proposal, Recipe

MOST_ODDS = 40.0


def draft_block(
    config: DraftConfig,
    decoder: DraftDecoder,
    frozen: Frozen,
    cache: DraftCache,
    length: Int[Array, "B"],
    anchor: Int[Array, "B"],
    keys: Key[Array, "B"],
    temperature: Float[Array, "B"],
    pages: Int[Array, "B P"] | None = None,
    spread: Spread = ALONE,
    candidates: int | None = None,
) -> Proposal:
    """Draft G tokens per sequence: one parallel pass, then position by position (paper §3.1).

    A sequence's noise comes from its own key folded with its `length`, which grows every round:
    the same key can be passed each time, other rows never matter, and no noise is used twice. The
    verifier must draw from other keys. `logits` are corrected, before temperature. With
    `candidates` every token is drawn among so many of the largest base logits.
    """
    hidden, own = run_block(config, decoder, frozen, cache, length, anchor, pages, spread)
    if decoder.markov_head is not None and candidates is None:
        given = (own, hidden, anchor, noise_words(keys, length), temperature)
        drafted = by_kernel(config, decoder, frozen, *given, spread)
        if drafted is not None:
            return drafted
    logits = spread.columns(own)
    if candidates is not None:
        given = (logits, hidden, anchor, noise_words(keys, length), temperature)
        return by_candidates(config, decoder, frozen, *given, candidates)
    noise = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: sampling_noise(keys, length, logits.shape[1:]),
        lambda: jnp.zeros_like(logits),
    )
    head, predicting = decoder.markov_head, hidden[:, -logits.shape[1] :]
    state = None if head is None else first_state(config, head, hidden, anchor)

    def position(carry: Any, slot: Any) -> tuple[Any, Any]:
        (state, prev), (hidden, logits, noise), embedding = carry, slot, None
        if head is not None:
            state, bias, embedding = head.step(state, prev, hidden)
            logits += spread.columns(bias)
        token = frozen.target_id[choose(logits, noise, temperature)].astype(prev.dtype)
        return (state, token), (token, logits, embedding)

    slots = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (predicting, logits, noise))
    _, drafted = jax.lax.scan(position, (state, anchor), slots)
    tokens, logits, embedding = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    if decoder.confidence_head is not None:
        return Proposal(tokens, logits, decoder.confidence_head(predicting, embedding))
    return Proposal(tokens, logits, likeliest(logits, temperature))


def first_state(
    config: DraftConfig, head: MarkovHead, hidden: Float[Array, "B K D"], anchor: Int[Array, "B"]
) -> Float[Array, "B r"]:
    """What runs along the block, before the first predicting slot."""
    state = head.start(hidden[:, 0])
    if not config.sample_from_anchor:  # training runs the state over slot 0 too
        state, _, _ = head.mixed(state, anchor, hidden[:, 0])
    return state


def by_candidates(
    config: DraftConfig,
    decoder: DraftDecoder,
    frozen: Frozen,
    base: Float[Array, "B G Vd"],
    hidden: Float[Array, "B K D"],
    anchor: Int[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    candidates: int,
) -> Proposal:
    """`draft_block`'s tokens, drawn among the candidates of every slot."""
    head, factor = decoder.markov_head, decoder.candidate_factor
    assert head is not None and factor is not None
    predicting, state = hidden[:, -base.shape[1] :], first_state(config, head, hidden, anchor)
    tokens, made, embedding = draft_among(
        *(head, factor, base, predicting, state, anchor, words, temperature),
        *(frozen.target_id, candidates),
    )
    if decoder.confidence_head is None:
        return Proposal(tokens, made, likeliest(made.logits, temperature))
    return Proposal(tokens, made, decoder.confidence_head(predicting, embedding))


def by_kernel(
    config: DraftConfig,
    decoder: DraftDecoder,
    frozen: Frozen,
    base: Float[Array, "B G own"],
    hidden: Float[Array, "B K D"],
    anchor: Int[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    spread: Spread,
) -> Proposal | None:
    """`draft_block`'s tokens, drawn by a kernel that keeps no corrected logits; None without one.

    Noise and formulas are the same; logits differ in their last bits. Devices that share the
    vocabulary tell one another of a slot what they have drawn, and no logits.
    """
    head, predicting = decoder.markov_head, hidden[:, -base.shape[1] :]
    assert head is not None
    state = first_state(config, head, hidden, anchor)
    w2 = head.markov_w2.kernel[...]
    block = ops.markov_block(
        *(base, predicting, anchor, state, words, temperature, head.markov_w1[...], w2),
        *(*head.mixing, frozen.target_id),
        head_type=head.head_type,
        first=spread.first(base.shape[2]),
        gather=spread.stacked if spread.tensor > 1 else None,
    )
    if block is None:
        return None
    recipe = Recipe(base, block.mixed, w2, block.log_q, block.lse)
    if decoder.confidence_head is None:
        return Proposal(block.tokens, recipe, block.odds)
    return Proposal(block.tokens, recipe, decoder.confidence_head(predicting, block.embedding))


def keeps_recipes(decoder: DraftDecoder, G: int, batch: int, spread: Spread) -> bool:
    """Whether `by_kernel` drafts G tokens of `batch` sequences, as it is asked of every device."""
    if decoder.markov_head is None:
        return False
    w2, state_type = decoder.markov_head.markov_w2.kernel[...], decoder.fc.dtype
    B, own = batch // (spread.data if spread.rows_split else 1), w2.shape[1] // spread.tensor
    base, factor = (B, G, own), (w2.shape[0], own)
    return ops.pick_markov_step(base, jnp.float32, state_type, factor, w2.dtype).is_kernel


def likeliest(logits: Float[Array, "B G n"], temperature: Float[Array, "B"]) -> Float[Array, "B G"]:
    """Log-odds of the likeliest token, within ±40, at the temperature that is drawn at.

    What a draft without a confidence head is judged by. It is the same whichever token is drawn
    (feature of vLLM's `acceptance_estimator.py`).
    """
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None, None]
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(logits.shape[-1]) == first, -jnp.inf, logits)
    odds = jnp.max(logits, axis=-1) - jax.nn.logsumexp(others, axis=-1)
    return jnp.clip(odds, -MOST_ODDS, MOST_ODDS)
