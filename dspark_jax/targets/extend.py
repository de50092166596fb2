"""A GLM pass over a few rows after their caches: prefill chunks, verification, plain decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dspark_jax.cache import Cached, capacity, places
from dspark_jax.config import GlmConfig
from dspark_jax.layers import (
    exact_matmul,
    layer_norm,
    masked_softmax,
    matmul,
    product,
    rms_norm,
    rope_angles,
    rotate_half,
)
from dspark_jax.stack import plan_groups, run_weights
from dspark_jax.targets.decoder import Decoder, LayerWeights, MlpWeights
from dspark_jax.targets.indexer import INDEX_NORM_EPS, index_scores, select_top
from dspark_jax.targets.moe import route
from dspark_jax.targets.residual import Carry, enter, layer_slots, leave, states
from dspark_jax.types import Rows, TargetStates


class RowCache(NamedTuple):
    """What one layer remembers of a token: [latent | rotary key], and its index key if it has."""

    key: Float[Array, "B C n"]
    index_key: Float[Array, "B C n"] | None


class IndexQuery(NamedTuple):
    """What an indexer asks of every cached key."""

    query: Float[Array, "B S h n"]
    weight: Float[Array, "B S h"]


class Projected(NamedTuple):
    """A layer's view of the new rows: queries, what to remember of them, and index queries."""

    query: Float[Array, "B S H n"]
    memory: RowCache
    indexing: IndexQuery | None


def init_cache(config: GlmConfig, batch: int, capacity: int, dtype: Any = jnp.float32) -> Any:
    """Empty caches of every layer, arranged like `Decoder.layers`."""
    c = config

    def empty(layer: int, repeats: int) -> RowCache:
        lead = (batch, capacity) if repeats == 1 else (repeats, batch, capacity)
        index = jnp.zeros((*lead, c.index_head_dim), dtype)
        key = jnp.zeros((*lead, c.kv_lora_rank + c.qk_rope_head_dim), dtype)
        return RowCache(key, index if c.indexer_types[layer] == "full" else None)

    groups = plan_groups(c.layer_kinds, c.unroll_layers)
    return tuple(tuple(empty(g.layer(m), g.repeats) for m in range(g.unit)) for g in groups)


def extend(config: GlmConfig, decoder: Decoder, cache: Any, rows: Rows) -> tuple[Any, TargetStates]:
    """Rows after their caches: each is written at its position, then sees all up to itself.

    Rows already written at or past a position are overwritten, never rolled back.
    """
    context = capacity(rows, jax.tree.leaves(cache)[0].shape[-2])
    visible = jnp.arange(context) <= places(rows)[:, :, None]
    angle = rope_angles(rows.position, config.qk_rope_head_dim, config.rope_theta)

    def step(weights: LayerWeights, carry: Carry, given: Any) -> tuple[Carry, RowCache]:
        slot, cached = given
        normed = rms_norm(carry.x, weights.norm, config.rms_norm_eps)
        projected = project(config, weights, normed, angle)
        cached = Cached(cached, rows).write(projected.memory)
        memory, selected = cached.read(), carry.selected
        indexing = cached.blocks(projected.indexing)
        if indexing is not None and memory.index_key is not None:
            scores = index_scores(indexing.query, memory.index_key, indexing.weight)
            selected = select_top(scores, visible, config.index_topk)
        mixed = attend(config, weights, cached.blocks(projected.query), memory.key, selected)
        x = carry.x + matmul(cached.flat(mixed), weights.out)
        x = x + feed_forward(config, weights.mlp, x)
        return leave(carry, x, selected, slot), cached.arrays

    groups = plan_groups(config.layer_kinds, config.unroll_layers)
    slots = layer_slots(groups, config)
    given = [tuple(zip(s, c, strict=True)) for s, c in zip(slots, cache, strict=True)]
    carry = enter(decoder.embed[rows.tokens], visible, config)
    carry, outputs = run_weights(groups, decoder.layers, carry, given, step)
    return tuple(outputs), states(carry)


def logits(
    config: GlmConfig, decoder: Decoder, hidden: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """Final norm and head; logits in float32."""
    normed = rms_norm(hidden, decoder.norm, config.rms_norm_eps)
    return jnp.matmul(normed, decoder.lm_head, preferred_element_type=jnp.float32)


def project(
    config: GlmConfig,
    weights: LayerWeights,
    normed: Float[Array, "B S D"],
    angle: Float[Array, "B S half"],
) -> Projected:
    """Queries and memory of new rows: two products, four where the latent is not folded."""
    c, (B, S, _) = config, normed.shape
    heads, rotary, index = c.num_attention_heads, c.qk_rope_head_dim, c.index_head_dim
    exact = weights.index_norm is not None and weights.index_weight is None
    into = (exact_matmul if exact else matmul)(normed, weights.into)
    sizes = (c.q_lora_rank, c.kv_lora_rank, rotary)
    query_latent, latent, rope, indexing = jnp.split(into, np.cumsum(sizes), axis=-1)
    query_latent = rms_norm(query_latent, weights.query_norm, c.latent_norm_eps)
    latent = rms_norm(latent, weights.latent_norm, c.latent_norm_eps)
    key = jnp.concatenate([latent, rotate_half(rope[..., None, :], angle)[..., 0, :]], axis=-1)
    width = (c.kv_lora_rank if weights.key is None else c.qk_nope_head_dim) + rotary
    queries = matmul(query_latent, weights.query)
    query = queries[..., : heads * width].reshape(B, S, heads, width)
    plain, rope = jnp.split(query, [width - rotary], axis=-1)
    if weights.key is not None:
        plain = _by_head(plain, weights.key)
    query = jnp.concatenate([plain, rotate_half(rope, angle)], axis=-1)
    if weights.index_norm is None:
        return Projected(query, RowCache(key, None), None)
    index_key, index_weight = jnp.split(indexing, [index], axis=-1)
    if weights.index_weight is not None:
        index_weight = exact_matmul(normed, weights.index_weight)
    index_key = layer_norm(index_key, *weights.index_norm, INDEX_NORM_EPS)
    index_key = _rotate_first(index_key[..., None, :], angle)[..., 0, :]
    index_query = queries[..., heads * width :].reshape(B, S, -1, index)
    index_query = IndexQuery(_rotate_first(index_query, angle), index_weight)
    return Projected(query, RowCache(key, index_key), index_query)


def attend(
    config: GlmConfig,
    weights: LayerWeights,
    query: Float[Array, "B S H n"],
    memory: Float[Array, "B C n"],
    selected: Bool[Array, "B S C"],
) -> Float[Array, "B S m"]:
    """Attention in the latent space, where every head reads the same memory; heads side by side."""
    scores = product("bshn,bcn->bshc", query, memory) * config.qk_head_dim**-0.5
    probs = masked_softmax(scores, selected[:, :, None]).astype(memory.dtype)
    mixed = product("bshc,bcn->bshn", probs, memory)[..., : config.kv_lora_rank]
    mixed = mixed.astype(memory.dtype)
    if weights.value is not None:
        mixed = _by_head(mixed, weights.value)
    return mixed.reshape(*mixed.shape[:2], -1)


def feed_forward(
    config: GlmConfig, weights: MlpWeights, x: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """The MLP's residual update; of experts, all run and those not chosen weigh nothing."""
    normed = rms_norm(x, weights.norm, config.rms_norm_eps)
    up = matmul(normed, weights.up)
    if weights.router_bias is None:
        return matmul(jax.nn.silu(matmul(normed, weights.gate)) * up, weights.down)
    if weights.router is None:
        gate = exact_matmul(normed, weights.gate)
        routed, gate = jnp.split(gate, [config.n_routed_experts], axis=-1)
    else:
        gate = matmul(normed, weights.gate)
        routed = exact_matmul(normed, weights.router)
    weight = route(routed, weights.router_bias, config, config.n_shared_experts).weight
    hidden = (jax.nn.silu(gate) * up).reshape(*weight.shape, -1)
    hidden = hidden * weight[..., None].astype(x.dtype)
    return matmul(hidden.reshape(gate.shape), weights.down)


def _rotate_first(
    x: Float[Array, "B S h n"], angle: Float[Array, "B S half"]
) -> Float[Array, "B S h n"]:
    rotated, passed = jnp.split(x, [2 * angle.shape[-1]], axis=-1)
    return jnp.concatenate([rotate_half(rotated, angle), passed], axis=-1)


def _by_head(x: Float[Array, "B S H i"], kernel: Float[Array, "H i o"]) -> Float[Array, "B S H o"]:
    """Every head through its own matrix; heads go first, as XLA's CPU needs them in bfloat16."""
    heads_first = product("hbsi,hio->hbso", jnp.moveaxis(x, 2, 0), kernel)
    return jnp.moveaxis(heads_first, 0, 2).astype(x.dtype)
