"""The drafter in decoding: one block per sequence after a cache, in few matrix products.

Projections that read the same input are one matrix, the context's keys and values of all layers
are one product, and caches are stored head by head, as attention reads them. The numbers are those
of `drafter.score_blocks`, which trains.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dspark_jax import ops
from dspark_jax.cache import cells
from dspark_jax.config import DraftConfig
from dspark_jax.draft_layer import DecoderLayer
from dspark_jax.drafter import Drafter, base_logits, block_positions
from dspark_jax.heads import ConfidenceHead, MarkovHead
from dspark_jax.layers import matmul, rms_norm, rope_angles, rotate_half
from dspark_jax.spread import ALONE, Spread
from dspark_jax.stack import members
from dspark_jax.types import DraftCache, Frozen, Rows


class LayerWeights(NamedTuple):
    """One layer; `into` gives [queries | keys | values], `mlp_into` [gate | up]."""

    norm: Float[Array, "D"]
    into: Float[Array, "D n"]
    query_norm: Float[Array, "d"]
    key_norm: Float[Array, "d"]
    out: Float[Array, "n D"]
    mlp_norm: Float[Array, "D"]
    mlp_into: Float[Array, "D n"]
    mlp_down: Float[Array, "i D"]


class DraftDecoder(NamedTuple):
    """A draft for decoding: `context` gives [keys | values] of every layer from a fused state."""

    fc: Float[Array, "AD D"]
    hidden_norm: Float[Array, "D"]
    context: Float[Array, "D n"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Array, "D"]
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None
    candidate_factor: Float[Array, "Vd r"] | None
    """The Markov head's last factor once more, turned, where tokens are drawn among candidates."""


def prepare(drafter: Drafter, among: bool = False, spread: Spread = ALONE) -> DraftDecoder:
    """Lay a draft's weights out for decoding; run it once. `among`: for drawing among candidates,
    whose columns of the last factor every device has."""
    layers: dict[int, DecoderLayer] = {}
    for g, member, repeat, number in members(drafter.groups):
        graphdef, params = nnx.split(drafter.layers[g][member])
        one = params if repeat is None else jax.tree.map(lambda x, r=repeat: x[r], params)
        layers[number] = nnx.merge(graphdef, one, copy=True)
    ordered = [layers[number] for number in sorted(layers)]
    context = [p.kernel[...] for x in ordered for p in (x.self_attn.k_proj, x.self_attn.v_proj)]
    return DraftDecoder(
        fc=drafter.fc.kernel[...],
        hidden_norm=drafter.hidden_norm.weight[...],
        context=jnp.concatenate(context, axis=-1),
        layers=tuple(lay_out(layer) for layer in ordered),
        norm=drafter.norm.weight[...],
        markov_head=drafter.markov_head,
        confidence_head=drafter.confidence_head,
        candidate_factor=turned_factor(drafter.markov_head, spread) if among else None,
    )


def turned_factor(head: MarkovHead | None, spread: Spread) -> Float[Array, "Vd r"] | None:
    """W2 with the numbers of an entry side by side: a few entries are read without the others."""
    return None if head is None else spread.columns(head.markov_w2.kernel[...]).T


def lay_out(layer: DecoderLayer) -> LayerWeights:
    """One layer's weights, merged."""
    attention, mlp = layer.self_attn, layer.mlp
    into = [p.kernel[...] for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return LayerWeights(
        norm=layer.input_layernorm.weight[...],
        into=jnp.concatenate(into, axis=-1),
        query_norm=attention.q_norm.weight[...],
        key_norm=attention.k_norm.weight[...],
        out=attention.o_proj.kernel[...],
        mlp_norm=layer.post_attention_layernorm.weight[...],
        mlp_into=jnp.concatenate([mlp.gate_proj.kernel[...], mlp.up_proj.kernel[...]], axis=-1),
        mlp_down=mlp.down_proj.kernel[...],
    )


def init_draft_cache(
    config: DraftConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32
) -> DraftCache:
    """An empty cache of `capacity` context rows per sequence, as wide as its kernels read them."""
    shape = (batch, config.num_key_value_heads, capacity, ops.row_width(config.head_dim))
    layers = range(config.num_hidden_layers)
    return DraftCache(*(tuple(jnp.zeros(shape, dtype) for _ in layers) for _ in "kv"))


def extend_context(
    config: DraftConfig,
    decoder: DraftDecoder,
    cache: DraftCache,
    aux_hidden: Float[Array, "B S AD"],
    position: Int[Array, "B S"],
    pages: Int[Array, "B P"] | None = None,
    spread: Spread = ALONE,
) -> DraftCache:
    """Write the keys and values of fused target states at `position`; those >= C are padding.

    The context is not normed again: a layer's `norm` belongs to the block's slots only.
    """
    fused = spread.columns(matmul(aux_hidden.astype(decoder.fc.dtype), decoder.fc))
    hidden = rms_norm(fused, decoder.hidden_norm, config.rms_norm_eps)
    page, place = cells(Rows(position, position, pages), cache.k[0].shape[-2])
    keys, values = ops.context_append(
        hidden.reshape(-1, hidden.shape[-1]),
        decoder.context,
        jnp.stack([layer.key_norm for layer in decoder.layers]),
        position.reshape(-1),
        jnp.broadcast_to(page, position.shape).reshape(-1),
        place.reshape(-1),
        cache.k,
        cache.v,
        eps=config.rms_norm_eps,
        theta=config.rope_theta,
    )
    return DraftCache(keys, values)


def run_block(
    config: DraftConfig,
    decoder: DraftDecoder,
    frozen: Frozen,
    cache: DraftCache,
    length: Int[Array, "B"],
    anchor: Int[Array, "B"],
    pages: Int[Array, "B P"] | None = None,
    spread: Spread = ALONE,
) -> tuple[Float[Array, "B K D"], Float[Array, "B G own"]]:
    """One block per sequence at positions `length`...: (hidden, base logits of predicting slots).

    Of the logits a device has its own columns, `own` of them.

    Cache rows at or past `length` are stale and are not read.
    """
    K, eps = config.block_size, config.rms_norm_eps
    masks = jnp.full((anchor.shape[0], K - 1), config.mask_token_id, anchor.dtype)
    tokens = jnp.concatenate([anchor[:, None], masks], axis=1)
    angle = rope_angles(block_positions(length, K), config.head_dim, config.rope_theta)
    x = spread.embed(frozen.embed, tokens).astype(decoder.fc.dtype)
    described = zip(decoder.layers, cache.k, cache.v, config.windows, config.causal, strict=True)
    for layer, keys, values, window, causal in described:
        normed = rms_norm(x, layer.norm, eps)
        query, key, value = project(config, layer, normed, angle, keys.shape[1])
        with jax.named_scope("block_attention"):
            attended = ops.block_attention(
                query, key, value, keys, values, pages, length, window=window, causal=causal
            ).reshape(*normed.shape[:2], -1)
        x = x + spread.sum(matmul(attended, layer.out))
        gate, up = jnp.split(matmul(rms_norm(x, layer.mlp_norm, eps), layer.mlp_into), 2, axis=-1)
        x = x + spread.sum(matmul(jax.nn.silu(gate) * up, layer.mlp_down))
    hidden = rms_norm(x, decoder.norm, eps)
    return hidden, base_logits(frozen, hidden[:, -config.draft_length :])


def project(
    config: DraftConfig,
    layer: LayerWeights,
    normed: Float[Array, "B K D"],
    angle: Float[Array, "B K half"],
    shared: int,
) -> tuple[Float[Array, "B K H d"], Float[Array, "B K Hk d"], Float[Array, "B K Hk d"]]:
    """A block's queries, keys and values, of which this device has `shared` key heads."""
    (B, K, _), dim = normed.shape, config.head_dim
    heads = shared * (config.num_attention_heads // config.num_key_value_heads)
    into = matmul(normed, layer.into).reshape(B, K, -1, dim)
    query, key, value = jnp.split(into, [heads, heads + shared], axis=2)
    query = rotate_half(rms_norm(query, layer.query_norm, config.rms_norm_eps), angle)
    key = rotate_half(rms_norm(key, layer.key_norm, config.rms_norm_eps), angle)
    return query, key, value
