"""What a draft's proposals are worth under one reading of its files, teacher-forced.

A reading is data, not a static setting: one program judges them all. Its numbers are those of
`drafter.run_blocks` under the configuration that says the same.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.anchors import at
from dspark_jax.config import DraftConfig
from dspark_jax.draft import draft_graphdef
from dspark_jax.draft_layer import before_anchor, block_mask, within
from dspark_jax.drafter import Drafter, block_positions, per_group, per_layer
from dspark_jax.stack import run_layers
from dspark_jax.types import Frozen

BLOCKS_AT_A_TIME = 4
"""Blocks of every row whose logits exist at once."""


class Text(NamedTuple):
    """Prompts with the target's answers, one a row, and the blocks that are judged."""

    tokens: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    anchor: Int[Array, "B N"]
    valid: Bool[Array, "B N"]


class Way(NamedTuple):
    """How a draft is run: what its config.json, or a mistake in it, decides.

    `rate` gives a position's angles; `window` and `causal` are per layer; `normed` is whether the
    last norm is applied, `sighted` whether blocks see their context at all.
    """

    aux: Float[Array, "B T AD"]
    rate: Float[Array, "half"]
    window: Int[Array, "L"]
    causal: Bool[Array, "L"]
    mask_token: Int[Array, ""]
    from_anchor: Bool[Array, ""]
    normed: Bool[Array, ""]
    sighted: Bool[Array, ""]


@partial(jax.jit, static_argnums=0)
def survivals(
    config: DraftConfig, params: Any, frozen: Frozen, text: Text, way: Way
) -> Bool[Array, "B N K"]:
    """Whether draft i of a block, and every one before it, is what the target said.

    Of `config` only sizes are read. Where slot 0 predicts nothing the last column is false.
    """
    drafter = nnx.merge(draft_graphdef(config), params, copy=True)
    hidden = run_blocks(drafter, frozen, text, way)
    slot = text.anchor[..., None] + jnp.arange(config.block_size)
    follows = jnp.maximum(slot + way.from_anchor - 1, text.anchor[..., None])
    head, mixed = drafter.markov_head, None
    if head is not None:
        mixed, _ = head.block(at(text.tokens, follows), hidden)

    def proposed(given: Any) -> Int[Array, "B K"]:
        hidden, mixed = given
        logits = jnp.matmul(hidden, frozen.lm_head, preferred_element_type=jnp.float32)
        if head is not None:
            logits += jnp.matmul(
                mixed, head.markov_w2.kernel[...], preferred_element_type=jnp.float32
            )
        return frozen.target_id[jnp.argmax(logits, axis=-1)]

    by_block = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, mixed))
    drafts = jax.lax.map(proposed, by_block, batch_size=BLOCKS_AT_A_TIME)
    right = jnp.moveaxis(drafts, 0, 1) == at(text.tokens, slot + way.from_anchor)
    right = right.at[..., 0].set(right[..., 0] | ~way.from_anchor)
    survived = jnp.cumprod(right, axis=-1, dtype=jnp.int32).astype(bool)
    shifted = jnp.pad(survived[..., 1:], ((0, 0), (0, 0), (0, 1)))
    return jnp.where(way.from_anchor, survived, shifted) & text.valid[..., None]


def run_blocks(drafter: Drafter, frozen: Frozen, text: Text, way: Way) -> Float[Array, "B N K D"]:
    """The parallel pass over all blocks, normed or not."""
    K, kind = drafter.config.block_size, drafter.fc.kernel[...].dtype
    row = jnp.broadcast_to(jnp.arange(text.tokens.shape[1]), text.tokens.shape)
    fused, angle = drafter.fuse(way.aux), row[..., None] * way.rate

    def keys_values(layer: Any, carry: None, given: None) -> tuple[None, Any]:
        return carry, layer.self_attn.keys_values(fused, angle)

    nothing = per_group(drafter.groups, (None,) * drafter.config.num_hidden_layers)
    _, outputs = run_layers(drafter.groups, drafter.layers, None, nothing, keys_values)
    context = per_layer(drafter.groups, outputs)
    seen = before_anchor(text.segment, text.anchor) & way.sighted
    block_angle = block_positions(text.anchor, K)[..., None] * way.rate

    def step(layer: Any, x: Any, given: Any) -> tuple[Any, None]:
        (keys, values), window, causal = given
        near = within(seen, text.anchor, window)
        return layer(x, block_angle, (keys, values), near, block_mask(K, causal)), None

    tokens = jnp.broadcast_to(way.mask_token, (*text.anchor.shape, K))
    tokens = tokens.at[..., 0].set(at(text.tokens, text.anchor))
    inputs = list(zip(context, way.window, way.causal, strict=True))
    x, _ = run_layers(
        drafter.groups,
        drafter.layers,
        frozen.embed[tokens].astype(kind),
        per_group(drafter.groups, inputs),
        step,
    )
    return jnp.where(way.normed, drafter.norm(x), x)
