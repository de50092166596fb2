"""Training blocks: where they start, which tokens their slots hold and which slots are trained."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Shaped

from dspark_jax.config import DraftConfig
from dspark_jax.types import Blocks

Rule = Literal["speculators", "paper"]


def sample_blocks(
    keys: Key[Array, "B"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segment: Int[Array, "B T"],
    num_anchors: int,
    config: DraftConfig,
    rule: Rule = "speculators",
) -> Blocks:
    """Draw up to `num_anchors` blocks per row, each row with its own key.

    See `make_blocks` for what supervises them.
    """
    eligible = eligible_anchors(loss_mask, config, rule)
    eligible &= segment == jnp.roll(segment, -1, axis=1)  # what follows is of the same document
    anchor, valid = sample_anchors(keys, eligible, segment, num_anchors)
    return make_blocks(anchor, valid, tokens, loss_mask, segment, config, rule)


def eligible_anchors(
    loss_mask: Bool[Array, "B T"], config: DraftConfig, rule: Rule = "speculators"
) -> Bool[Array, "B T"]:
    """Where blocks may start: `loss_mask[p]`, and a whole block after p in the row (speculators).

    The paper's rule asks for one trained token after p instead.
    """
    T = loss_mask.shape[1]
    if rule == "paper":
        return loss_mask & jnp.roll(loss_mask, -1, axis=1) & (jnp.arange(T) < T - 1)
    return loss_mask & (jnp.arange(T) < T - config.block_size)


def sample_anchors(
    keys: Key[Array, "B"],
    eligible: Bool[Array, "B T"],
    segment: Int[Array, "B T"],
    num_anchors: int,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """(anchor, valid): a uniform draw without replacement, ascending, shared out over documents.

    Every document of a row gets its share of the row's anchors by its eligible positions, up or
    down to a whole number at random, so that every position is as likely as any other and no
    document is left to chance. A row with fewer eligible positions takes them all; its unused
    slots hold 0 and are not valid.
    """

    def draw(
        key: Key[Array, ""], eligible: Bool[Array, "T"], segment: Int[Array, "T"]
    ) -> tuple[Int[Array, "N"], Bool[Array, "N"]]:
        T = len(segment)
        inside, start = jax.random.split(key)
        document = jnp.where(eligible, segment, T + 1)
        order = jnp.lexsort((jax.random.uniform(inside, (T,)), document))
        members = jnp.zeros(T + 2, jnp.int32).at[document].add(1)
        first = jnp.cumsum(members) - members
        rank = jnp.zeros(T, jnp.int32).at[order].set(jnp.arange(T, dtype=jnp.int32))
        place = rank - first[document] + jax.random.uniform(start, (T + 2,))[document]
        share = jnp.where(eligible, place / members[document], jnp.inf)
        share = jnp.pad(share, (0, max(num_anchors - T, 0)), constant_values=jnp.inf)
        smallest, position = jax.lax.top_k(-share, num_anchors)
        position = jnp.sort(jnp.where(smallest > -jnp.inf, position, len(share)))
        valid = position < len(share)
        return jnp.where(valid, position, 0), valid

    return jax.vmap(draw)(keys, eligible, segment)


def make_blocks(
    anchor: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segment: Int[Array, "B T"],
    config: DraftConfig,
    rule: Rule = "speculators",
    mask_cross_document: bool = True,
) -> Blocks:
    """Blocks at given anchors, supervised by one of the published rules (dspark.md §2.2).

    speculators: slot k of a block at p is trained where `loss_mask[p + k]`: the mask of the token
    the slot's prediction follows, or, without sample_from_anchor, of the token it predicts. paper:
    where every token up to the one it predicts is trained. Without sample_from_anchor slot 0
    predicts nothing and is off.

    speculators' rule lets a block run into the next packed document, where the draft would be
    taught to continue one text from another's context. With `mask_cross_document` a slot is
    trained only if the token it follows and the token it predicts both lie in the anchor's
    document; speculators has no such check, so parity with it needs this off.
    """
    T, K = tokens.shape[1], config.block_size
    row = anchor[..., None] + jnp.arange(K, dtype=anchor.dtype)
    predicted = row + config.sample_from_anchor
    trained = valid[..., None] & (row < T)
    if rule == "paper":
        reached = at(loss_mask, predicted) & (predicted < T)
        if not config.sample_from_anchor:
            reached |= jnp.arange(K) == 0
        trained &= jnp.cumprod(reached, axis=-1, dtype=jnp.int32).astype(bool)
    else:
        trained &= at(loss_mask, row)
    if not config.sample_from_anchor:
        trained &= jnp.arange(K) > 0
    if mask_cross_document:
        here = at(segment, anchor)[..., None]
        trained &= (at(segment, predicted - 1) == here) & (at(segment, predicted) == here)
        trained &= predicted < T
    return Blocks(anchor, valid, at(tokens, row), at(tokens, predicted), trained)


def teacher_rows(anchor: Int[Array, "B N"], config: DraftConfig, T: int) -> Int[Array, "B N K"]:
    """Row of the batch whose target state predicts what slot k predicts (mod T, as speculators)."""
    offset = jnp.arange(config.block_size, dtype=anchor.dtype) - (not config.sample_from_anchor)
    return (anchor[..., None] + offset) % T


def at(values: Shaped[Array, "B T *rest"], row: Int[Array, "B *any"]) -> Array:
    """`values[b, row[b]]`, rows clamped to the ends."""
    return jax.vmap(lambda v, r: v[jnp.clip(r, 0, v.shape[0] - 1)])(values, row)
