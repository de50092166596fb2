"""The drafter: fuse the target's states, keep their keys and values, run and score blocks.

A block is the anchor token followed by masks. Its slots attend to the context (fused states of
the target, strictly before the anchor) and to one another, in one pass over all slots; only the
Markov head of `heads.py` is sequential. Attribute names are those of the published checkpoint.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dspark_jax.config import DraftConfig
from dspark_jax.draft_layer import DecoderLayer, before_anchor, block_mask, within
from dspark_jax.heads import ConfidenceHead, MarkovHead
from dspark_jax.layers import Linear, RMSNorm, rope_angles
from dspark_jax.stack import Group, build_layers, members, plan_groups, run_layers
from dspark_jax.types import Batch, Blocks, BlockScores, DraftCache, Frozen, Proposal

NO_WINDOW = 2**30
"""A window no context outgrows, so that full and sliding layers run the same code."""


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

    def context_kv(self, context: Float[Array, "B T D"], position: Int[Array, "B T"]) -> DraftCache:
        """Every layer's keys (normed, rotated to their position) and values of fused states.

        The context is not normed again: `input_layernorm` belongs to the block's slots only.
        """
        angle = self.angles(position)

        def project(layer: Any, carry: None, given: None) -> tuple[None, Any]:
            return carry, layer.self_attn.keys_values(context, angle)

        nothing = per_group(self.groups, (None,) * self.config.num_hidden_layers)
        _, outputs = run_layers(self.groups, self.layers, None, nothing, project)
        keys, values = zip(*per_layer(self.groups, outputs), strict=True)
        return DraftCache(keys, values)

    def angles(self, position: Int[Array, "*rows"]) -> Float[Array, "*rows half"]:
        return rope_angles(position, self.config.head_dim, self.config.rope_theta)


class BlockStates(NamedTuple):
    """What a pass over blocks leaves: each layer's output and the normed last one."""

    layers: tuple[Float[Array, "B N K D"], ...]
    hidden: Float[Array, "B N K D"]


def run_blocks(
    drafter: Drafter,
    frozen: Frozen,
    context: DraftCache,
    seen: Bool[Array, "B N C"],
    row: Int[Array, "B N"],
    anchor: Int[Array, "B N"],
    position: Int[Array, "B N"],
) -> BlockStates:
    """The parallel pass over N blocks of every sequence, in training and in decoding.

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

    def step(layer: Any, x: Any, given: Any) -> tuple[Any, Any]:
        keys, values, window, causal = given
        x = layer(x, angle, (keys, values), within(seen, row, window), block_mask(K, causal))
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
    )


def score_blocks(
    drafter: Drafter,
    frozen: Frozen,
    batch: Batch,
    aux_hidden: Float[Array, "B T AD"],
    blocks: Blocks,
) -> BlockScores:
    """Teacher-forced logits and confidences of training blocks (paper §3.3).

    Slot k's Markov bias reads the real token before the one it predicts: `tokens[k]`, or
    `tokens[k - 1]` without sample_from_anchor, where slot 0 predicts nothing and reads the anchor.
    """
    hidden = block_states(drafter, frozen, batch, aux_hidden, blocks).hidden
    logits, prev, embedding, confidence = base_logits(frozen, hidden), blocks.tokens, None, None
    if not drafter.config.sample_from_anchor:
        prev = jnp.concatenate([prev[..., :1], prev[..., :-1]], axis=-1)
    if drafter.markov_head is not None:
        bias, embedding = drafter.markov_head.block(prev, hidden)
        logits += bias
    if drafter.confidence_head is not None:
        confidence = drafter.confidence_head(hidden, embedding)
    return BlockScores(hidden, logits, confidence)


def run_block(
    drafter: Drafter,
    frozen: Frozen,
    cache: DraftCache,
    length: Int[Array, "B"],
    anchor: Int[Array, "B"],
) -> tuple[Float[Array, "B K D"], Float[Array, "B G Vd"]]:
    """One block per sequence at positions `length`...: (hidden, base logits of predicting slots).

    Cache rows at or past `length` are stale and are not read.
    """
    length = length[:, None]
    seen = jnp.arange(cache.k[0].shape[1]) < length[:, :, None]
    states = run_blocks(drafter, frozen, cache, seen, length, anchor[:, None], length)
    hidden = states.hidden[:, 0]
    return hidden, base_logits(frozen, hidden[:, -drafter.config.draft_length :])


def draft_block(
    drafter: Drafter,
    frozen: Frozen,
    cache: DraftCache,
    length: Int[Array, "B"],
    anchor: Int[Array, "B"],
    keys: Key[Array, "B"],
    temperature: Float[Array, "B"],
) -> Proposal:
    """Draft G tokens per sequence: one parallel pass, then position by position (paper §3.1).

    A sequence's noise comes from its own key folded with its `length`, which grows every round:
    the same key can be passed each time, other rows never matter, and no noise is used twice. The
    verifier must draw from other keys. `logits` are corrected, before temperature.
    """
    hidden, logits = run_block(drafter, frozen, cache, length, anchor)
    noise = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: sampling_noise(keys, length, logits.shape[1:]),
        lambda: jnp.zeros_like(logits),
    )
    head, state, predicting = drafter.markov_head, None, hidden[:, -logits.shape[1] :]
    if head is not None:
        state = head.start(hidden[:, 0])
        if not drafter.config.sample_from_anchor:  # training runs the state over slot 0 too
            state, _, _ = head.step(state, anchor, hidden[:, 0])

    def position(carry: Any, slot: Any) -> tuple[Any, Any]:
        (state, prev), (hidden, logits, noise), embedding = carry, slot, None
        if head is not None:
            state, bias, embedding = head.step(state, prev, hidden)
            logits += bias
        token = frozen.target_id[choose(logits, noise, temperature)].astype(prev.dtype)
        return (state, token), (token, logits, embedding)

    slots = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (predicting, logits, noise))
    _, drafted = jax.lax.scan(position, (state, anchor), slots)
    tokens, logits, embedding = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), drafted)
    return Proposal(tokens, logits, confidences(drafter, predicting, embedding))


def confidences(
    drafter: Drafter, hidden: Float[Array, "B G D"], embedding: Float[Array, "B G r"] | None
) -> Float[Array, "B G"]:
    """Predicted acceptance probability per slot; 1 everywhere when the draft has no such head."""
    if drafter.confidence_head is None:
        return jnp.ones(hidden.shape[:2])
    return jax.nn.sigmoid(drafter.confidence_head(hidden, embedding))


def sampling_noise(
    keys: Key[Array, "B"], length: Int[Array, "B"], shape: tuple[int, ...]
) -> Float[Array, "B G Vd"]:
    """Gumbel noise of each sequence's round: a function of its key and length alone.

    The two words of the round's key come from threefry; each entry then mixes them with its own
    number by a 32-bit integer hash (the finaliser that vLLM's sampler uses too), twenty times
    cheaper than threefry over the whole vocabulary. Only the draft draws this way.
    """
    rounds = jax.vmap(jax.random.fold_in)(keys, length)
    words = jax.random.key_data(rounds).astype(jnp.uint32)[:, -2:, None, None]
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return gumbel(_mix(_mix(number * jnp.uint32(0x9E3779B9) + words[:, 0]) ^ words[:, 1]))


def gumbel(bits: UInt32[Array, "*any"]) -> Float[Array, "*any"]:
    """Gumbel noise from random bits, always finite.

    23 bits and a half are exact in float32; with 24 the largest would round to 1, whose noise is
    infinite and would pick its token whatever the logits say.
    """
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """murmur3's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def choose(
    logits: Float[Array, "B Vd"], noise: Float[Array, "B Vd"], temperature: Float[Array, "B"]
) -> Int[Array, "B"]:
    """A draw from softmax(logits / temperature) by the Gumbel-max rule; the argmax at 0."""
    return jnp.argmax(logits + temperature[:, None] * noise, axis=-1)


def init_draft_cache(
    config: DraftConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32
) -> DraftCache:
    """An empty cache of `capacity` context rows per sequence."""
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    layers = range(config.num_hidden_layers)
    return DraftCache(*(tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in "kv"))


def extend_context(
    drafter: Drafter,
    cache: DraftCache,
    aux_hidden: Float[Array, "B S AD"],
    position: Int[Array, "B S"],
) -> DraftCache:
    """Write the keys and values of fused target states at `position`; those >= C are padding."""
    new = drafter.context_kv(drafter.fuse(aux_hidden), position)
    sequence = jnp.arange(position.shape[0])[:, None]

    def write(old: Float[Array, "B C Hk d"], value: Float[Array, "B S Hk d"]) -> Any:
        return old.at[sequence, position].set(value.astype(old.dtype), mode="drop")

    return jax.tree.map(write, cache, new)


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
