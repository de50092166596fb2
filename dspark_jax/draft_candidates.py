"""Drafting among candidates: of a slot's tokens only the base logits' largest get a Markov bias.

vLLM's `dspark_draft_topk`. All other tokens are impossible, so a slot's distribution is over its k
candidates alone, and that is what the block is judged by. No corrected logits, no noise and no
product with the head's last factor are made of a whole vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from dspark_jax.heads import MarkovHead
from dspark_jax.sampling import noise_at
from dspark_jax.types import Candidates


def draft_among(
    head: MarkovHead,
    factor: Float[Array, "Vd r"],
    base: Float[Array, "B G Vd"],
    hidden: Float[Array, "B G D"],
    state: Float[Array, "B r"],
    anchor: Int[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
    target_id: Int[Array, "Vd"],
    count: int,
) -> tuple[Int[Array, "B G"], Candidates, Float[Array, "B G r"]]:
    """(tokens, what they were drawn from, embeddings of the tokens before), position by position.

    `factor` is the head's last, turned so that a candidate's numbers lie together. An entry's noise
    is what it has in drafting from the whole vocabulary: with all entries as candidates the tokens
    are the same.
    """
    _, G, Vd = base.shape
    top, entry = jax.lax.top_k(base, count)
    first = Vd * jnp.arange(G, dtype=jnp.uint32)[:, None]
    noise = noise_at(words, first + entry.astype(jnp.uint32))

    def position(carry: Any, slot: Any) -> tuple[Any, Any]:
        (state, prev), (hidden, top, entry, noise) = carry, slot
        state, mixed, embedding = head.mixed(state, prev, hidden)
        bias = jnp.einsum("bkr,br->bk", factor[entry], mixed, preferred_element_type=jnp.float32)
        logits = top + bias
        token = target_id[chosen(logits + temperature[:, None] * noise, entry)].astype(prev.dtype)
        return (state, token), (token, logits, embedding)

    slots = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, top, entry, noise))
    _, drafted = jax.lax.scan(position, (state, anchor), slots)
    tokens, logits, embedding = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    return tokens, Candidates(entry, logits), embedding


def chosen(score: Float[Array, "B k"], entry: Int[Array, "B k"]) -> Int[Array, "B"]:
    """The entry with the largest score, the first of equals in the vocabulary."""
    best = score == jnp.max(score, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, entry, jnp.iinfo(entry.dtype).max), axis=-1)
