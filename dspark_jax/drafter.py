"""The drafter: fuse the target's states, keep their keys and values, run and score blocks.

A block is the anchor token followed by masks. Its slots attend to the context (fused states of
the target, strictly before the anchor) and to one another, in one pass over all slots; only the
Markov head of `heads.py` is sequential. Attribute names are those of the published checkpoint.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import DraftConfig
from dspark_jax.draft_layer import DecoderLayer, before_anchor, block_mask, within
from dspark_jax.heads import ConfidenceHead, MarkovHead
from dspark_jax.layers import Linear, RMSNorm, rope_angles
from dspark_jax.stack import Group, build_layers, members, plan_groups, run_layers
from dspark_jax.types import Batch, Blocks, BlockScores, Frozen

NO_WINDOW = 2**30
"""A window no context outgrows, so that full and sliding layers run the same code."""


class ContextKV(NamedTuple):
    """Per layer, keys and values of the fused states of a packed row."""

    k: tuple[Float[Array, "B T Hk d"], ...]
    v: tuple[Float[Array, "B T Hk d"], ...]


class Drafter(nnx.Module):
    """The trained part of a draft; `Frozen` holds the tables it shares with its target.

    Activations have the type of the parameters, logits and confidences are float32.
    """

    def __init__(self, config: DraftConfig, rngs: nnx.Rngs):
        aux_size = len(config.aux_layer_ids) * (config.target_hidden_size or config.hidden_size)
        self.config = config
        self.groups = plan_groups((0,) * config.num_hidden_layers, config.unroll_layers)
        self.fc = Linear(aux_size, config.hidden_size, rngs=rngs)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = build_layers(self.groups, lambda _, r: DecoderLayer(config, rngs=r), rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = MarkovHead(config, rngs=rngs) if config.markov_rank else None
        self.confidence_head = (
            ConfidenceHead(config, rngs=rngs) if config.enable_confidence_head else None
        )

    def fuse(self, aux_hidden: Float[Array, "B T AD"]) -> Float[Array, "B T D"]:
        """`hidden_norm(fc(concatenated aux states))`: the context, shared by all layers."""
        kernel_type = self.fc.kernel[...].dtype
        return self.hidden_norm(self.fc(aux_hidden.astype(kernel_type)))

    def context_kv(self, context: Float[Array, "B T D"], position: Int[Array, "B T"]) -> ContextKV:
        """Every layer's keys (normed, rotated to their position) and values of fused states.

        The context is not normed again: `input_layernorm` belongs to the block's slots only.
        """
        angle = self.angles(position)

        def project(layer: Any, carry: None, given: None) -> tuple[None, Any]:
            return carry, layer.self_attn.keys_values(context, angle)

        nothing = per_group(self.groups, (None,) * self.config.num_hidden_layers)
        _, outputs = run_layers(self.groups, self.layers, None, nothing, project)
        keys, values = zip(*per_layer(self.groups, outputs), strict=True)
        return ContextKV(keys, values)

    def angles(self, position: Int[Array, "*rows"]) -> Float[Array, "*rows half"]:
        return rope_angles(position, self.config.head_dim, self.config.rope_theta)


class BlockStates(NamedTuple):
    """What a pass over blocks leaves: each layer's output and the normed last one."""

    layers: tuple[Float[Array, "B N K D"], ...]
    hidden: Float[Array, "B N K D"]


def run_blocks(
    drafter: Drafter,
    frozen: Frozen,
    context: ContextKV,
    seen: Bool[Array, "B N C"],
    row: Int[Array, "B N"],
    anchor: Int[Array, "B N"],
    position: Int[Array, "B N"],
    remat: bool = False,
) -> BlockStates:
    """The parallel pass over N blocks of every row.

    Args:
        seen: Context rows a block may attend to; sliding layers narrow it to the `sliding_window`
            rows before the anchor, for all slots alike.
        row: Context row at which the block's anchor would sit.
        anchor: First token of the block; the other slots hold the mask token.
        position: Rotary position of the anchor; slot k is k further.
    """
    config = drafter.config
    K, kernel_type = config.block_size, drafter.fc.kernel[...].dtype
    masks = jnp.full((*anchor.shape, K - 1), config.mask_token_id, anchor.dtype)
    tokens = jnp.concatenate([anchor[..., None], masks], axis=-1)
    angle = drafter.angles(block_positions(position, K))

    def run(layer: Any, x: Any, given: Any) -> Any:
        keys, values, window, causal = given
        return layer(x, angle, (keys, values), within(seen, row, window), block_mask(K, causal))

    run = nnx.remat(run) if remat else run

    def step(layer: Any, x: Any, given: Any) -> tuple[Any, Any]:
        x = run(layer, x, given)
        return x, x

    windows = [NO_WINDOW if w is None else w for w in config.windows]
    inputs = list(zip(context.k, context.v, windows, config.causal, strict=True))
    x, outputs = run_layers(
        drafter.groups,
        drafter.layers,
        frozen.embed[tokens].astype(kernel_type),
        per_group(drafter.groups, inputs),
        step,
    )
    return BlockStates(per_layer(drafter.groups, outputs), drafter.norm(x))


def block_positions(anchor: Int[Array, "*rows"], K: int) -> Int[Array, "*rows K"]:
    """Position of every slot: the anchor's, then one further each."""
    return anchor[..., None] + jnp.arange(K, dtype=anchor.dtype)


def base_logits(frozen: Frozen, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows Vd"]:
    """Logits before the Markov bias, through the target's own head, in float32."""
    head = frozen.lm_head.astype(hidden.dtype)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def block_states(
    drafter: Drafter,
    frozen: Frozen,
    batch: Batch,
    aux_hidden: Float[Array, "B T AD"],
    blocks: Blocks,
    remat: bool = False,
) -> BlockStates:
    """The parallel pass over training blocks; context rows are the rows of the packed batch."""
    return run_blocks(
        drafter,
        frozen,
        drafter.context_kv(drafter.fuse(aux_hidden), batch.position),
        before_anchor(batch.segment, blocks.anchor),
        blocks.anchor,
        blocks.tokens[..., 0],
        jnp.take_along_axis(batch.position, blocks.anchor, axis=1),
        remat,
    )


def score_blocks(
    drafter: Drafter,
    frozen: Frozen,
    batch: Batch,
    aux_hidden: Float[Array, "B T AD"],
    blocks: Blocks,
    remat: bool = False,
) -> BlockScores:
    """Teacher-forced outputs of training blocks (paper §3.3).

    Slot k's Markov bias reads the real token before the one it predicts: `tokens[k]`, or
    `tokens[k - 1]` without sample_from_anchor, where slot 0 predicts nothing and reads the anchor.
    `remat` computes every layer again in the backward pass instead of keeping what it made.
    """
    hidden = block_states(drafter, frozen, batch, aux_hidden, blocks, remat).hidden
    prev, markov, embedding, confidence = blocks.tokens, None, None, None
    if not drafter.config.sample_from_anchor:
        prev = jnp.concatenate([prev[..., :1], prev[..., :-1]], axis=-1)
    if drafter.markov_head is not None:
        markov, embedding = drafter.markov_head.block(prev, hidden)
    if drafter.confidence_head is not None:
        confidence = drafter.confidence_head(hidden, embedding)
    return BlockScores(hidden, markov, confidence)


def per_group(groups: Sequence[Group], values: Sequence[Any]) -> list[list[Any]]:
    """One value per layer, arranged for `run_layers`: stacked where layers are scanned."""

    def of(group: Group, member: int) -> Any:
        chosen = [values[group.layer(member, repeat)] for repeat in range(group.repeats)]
        return chosen[0] if group.repeats == 1 else jax.tree.map(lambda *x: jnp.stack(x), *chosen)

    return [[of(group, member) for member in range(group.unit)] for group in groups]


def per_layer(groups: Sequence[Group], outputs: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """The inverse of `per_group`, for what `run_layers` returns."""
    found = {}
    for group, member, repeat, layer in members(groups):
        value = outputs[group][member]
        found[layer] = value if repeat is None else jax.tree.map(lambda x, r=repeat: x[r], value)
    return tuple(found[layer] for layer in sorted(found))
