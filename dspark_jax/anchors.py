"""Training blocks: where they start, which tokens their slots hold and which slots are trained."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Shaped

from dspark_jax.config import DraftConfig
from dspark_jax.types import Blocks


def sample_blocks(
    key: Key[Array, ""],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segment: Int[Array, "B T"],
    num_anchors: int,
    config: DraftConfig,
    mask_cross_document: bool = True,
) -> Blocks:
    """Draw up to `num_anchors` blocks per row; see `make_blocks` for what supervises them."""
    anchor, valid = sample_anchors(key, eligible_anchors(loss_mask, config), num_anchors)
    return make_blocks(anchor, valid, tokens, loss_mask, segment, config, mask_cross_document)


def eligible_anchors(loss_mask: Bool[Array, "B T"], config: DraftConfig) -> Bool[Array, "B T"]:
    """Trained positions with a whole block after them in the row: `loss_mask[p] and p < T - K`."""
    T = loss_mask.shape[1]
    return loss_mask & (jnp.arange(T) < T - config.block_size)


def sample_anchors(
    key: Key[Array, ""], eligible: Bool[Array, "B T"], num_anchors: int
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """(anchor, valid): a uniform draw without replacement per row, ascending.

    A row with fewer eligible positions takes them all; its unused slots hold 0 and are not valid.
    """
    T = eligible.shape[1]
    priority = jnp.where(eligible, jax.random.uniform(key, eligible.shape), -1.0)
    spare = max(num_anchors - T, 0)
    priority = jnp.pad(priority, ((0, 0), (0, spare)), constant_values=-1.0)
    drawn, position = jax.lax.top_k(priority, num_anchors)
    position = jnp.sort(jnp.where(drawn >= 0, position, T + spare), axis=1)
    valid = position < T + spare
    return jnp.where(valid, position, 0), valid


def make_blocks(
    anchor: Int[Array, "B N"],
    valid: Bool[Array, "B N"],
    tokens: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    segment: Int[Array, "B T"],
    config: DraftConfig,
    mask_cross_document: bool = True,
) -> Blocks:
    """Blocks at given anchors, supervised by speculators' rule.

    Slot k of a block at p is trained where `loss_mask[p + k]`: the mask of the token the slot's
    prediction follows, or, without sample_from_anchor, of the token it predicts, and then slot 0,
    which predicts nothing, is off.

    That rule lets a block run into the next packed document, where the draft would be taught to
    continue one text from another's context. With `mask_cross_document` a slot is trained only if
    the token it follows and the token it predicts both lie in the anchor's document; speculators
    has no such check, so parity with it needs this off.
    """
    T, K = tokens.shape[1], config.block_size
    row = anchor[..., None] + jnp.arange(K, dtype=anchor.dtype)
    trained = valid[..., None] & at(loss_mask, row) & (row < T)
    if not config.sample_from_anchor:
        trained &= jnp.arange(K) > 0
    if mask_cross_document:
        follows = row if config.sample_from_anchor else row - 1
        here = at(segment, anchor)[..., None]
        trained &= (at(segment, follows) == here) & (at(segment, follows + 1) == here)
        trained &= follows + 1 < T
    return Blocks(anchor, valid, at(tokens, row), trained)


def teacher_rows(anchor: Int[Array, "B N"], config: DraftConfig, T: int) -> Int[Array, "B N K"]:
    """Row of the batch whose target state predicts what slot k predicts (mod T, as speculators)."""
    offset = jnp.arange(config.block_size, dtype=anchor.dtype) - (not config.sample_from_anchor)
    return (anchor[..., None] + offset) % T


def at(values: Shaped[Array, "B T *rest"], row: Int[Array, "B *any"]) -> Array:
    """`values[b, row[b]]`, rows clamped to the ends."""
    return jax.vmap(lambda v, r: v[jnp.clip(r, 0, v.shape[0] - 1)])(values, row)
