"""The drafter in decoding: one block per sequence after a cache, in few matrix products.

Projections that read the same input are one matrix, the context's keys and values of all layers
are one product, and caches are stored head by head, as attention reads them. The numbers are those
of `drafter.score_blocks`, which trains.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, UInt32

from dspark_jax import ops
from dspark_jax.cache import cells
from dspark_jax.config import DraftConfig
from dspark_jax.draft_layer import DecoderLayer
from dspark_jax.drafter import Drafter, base_logits, block_positions
from dspark_jax.heads import ConfidenceHead, MarkovHead
from dspark_jax.layers import matmul, rms_norm, rope_angles, rotate_half
from dspark_jax.sampling import choose, noise_words, sampling_noise
from dspark_jax.spread import ALONE, Spread
from dspark_jax.stack import members
from dspark_jax.types import DraftCache, Frozen, Proposal, Recipe, Rows

MOST_ODDS = 40.0


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


def prepare(drafter: Drafter) -> DraftDecoder:
    """Lay a draft's weights out for decoding; run it once."""
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
    )


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
) -> tuple[Float[Array, "B K D"], Float[Array, "B G Vd"]]:
    """One block per sequence at positions `length`...: (hidden, base logits of predicting slots).

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
    return hidden, spread.columns(base_logits(frozen, hidden[:, -config.draft_length :]))


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
) -> Proposal:
    """Draft G tokens per sequence: one parallel pass, then position by position (paper §3.1).

    A sequence's noise comes from its own key folded with its `length`, which grows every round:
    the same key can be passed each time, other rows never matter, and no noise is used twice. The
    verifier must draw from other keys. `logits` are corrected, before temperature.
    """
    hidden, logits = run_block(config, decoder, frozen, cache, length, anchor, pages, spread)
    if decoder.markov_head is not None and spread == ALONE:
        given = (logits, hidden, anchor, noise_words(keys, length), temperature)
        drafted = by_kernel(config, decoder, frozen, *given)
        if drafted is not None:
            return drafted
    noise = jax.lax.cond(
        jnp.any(temperature > 0),
        lambda: sampling_noise(keys, length, logits.shape[1:]),
        lambda: jnp.zeros_like(logits),
    )
    head, state, predicting = decoder.markov_head, None, hidden[:, -logits.shape[1] :]
    if head is not None:
        state = head.start(hidden[:, 0])
        if not config.sample_from_anchor:  # training runs the state over slot 0 too
            state, _, _ = head.step(state, anchor, hidden[:, 0])

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


def by_kernel(
    config: DraftConfig,
    decoder: DraftDecoder,
    frozen: Frozen,
    base: Float[Array, "B G Vd"],
    hidden: Float[Array, "B K D"],
    anchor: Int[Array, "B"],
    words: UInt32[Array, "B 2"],
    temperature: Float[Array, "B"],
) -> Proposal | None:
    """`draft_block`'s tokens, drawn by a kernel that keeps no corrected logits; None without one.

    Noise and formulas are the same; logits differ in their last bits.
    """
    head, predicting = decoder.markov_head, hidden[:, -base.shape[1] :]
    assert head is not None
    state = head.start(hidden[:, 0])
    if not config.sample_from_anchor:
        state, _, _ = head.step(state, anchor, hidden[:, 0])
    w2 = head.markov_w2.kernel[...]
    block = ops.markov_block(
        *(base, predicting, anchor, state, words, temperature, head.markov_w1[...], w2),
        *(*head.mixing, frozen.target_id),
        head_type=head.head_type,
    )
    if block is None:
        return None
    recipe = Recipe(base, block.mixed, w2, block.log_q, block.lse)
    if decoder.confidence_head is None:
        return Proposal(block.tokens, recipe, block.odds)
    return Proposal(block.tokens, recipe, decoder.confidence_head(predicting, block.embedding))


def likeliest(
    logits: Float[Array, "B G Vd"], temperature: Float[Array, "B"]
) -> Float[Array, "B G"]:
    """Log-odds of the likeliest token, within ±40, at the temperature that is drawn at.

    What a draft without a confidence head is judged by. It is the same whichever token is drawn
    (feature of vLLM's `acceptance_estimator.py`).
    """
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None, None]
    first = jnp.argmax(logits, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(logits.shape[-1]) == first, -jnp.inf, logits)
    odds = jnp.max(logits, axis=-1) - jax.nn.logsumexp(others, axis=-1)
    return jnp.clip(odds, -MOST_ODDS, MOST_ODDS)
