"""GLM laid out for decoding: the weights as a pass over a few rows reads them.

Projections that read the same input are one matrix, and the expansion of the latent is folded into
the matrices around it where those are small. With few rows a small model is bound by the number of
products, a large one by the bytes they read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dspark_jax.config import GlmConfig
from dspark_jax.stack import Group
from dspark_jax.targets.glm import Glm, GlmLayer
from dspark_jax.targets.moe import FEW_EXPERTS, Moe

FOLDED_ELEMENTS = 1 << 20
"""Largest folded matrix: below this a product costs more to launch than to read."""


class LayerNormWeights(NamedTuple):
    """Scale and shift of an index key."""

    weight: Float[Array, "n"]
    bias: Float[Array, "n"]


class MlpWeights(NamedTuple):
    """A SwiGLU, or all experts as one wide SwiGLU whose shared part comes last.

    In a float32 model the router's columns stand before the gate's; else the router stays apart,
    because its product must be float32. Gate and up stay apart: one product of both is slower for
    the rows of a block.
    """

    norm: Float[Array, "D"]
    gate: Float[Array, "D n"]
    up: Float[Array, "D i"]
    down: Float[Array, "i D"]
    router: Float[Array, "D E"] | None
    router_bias: Float[Array, "E"] | None


class LayerWeights(NamedTuple):
    """One decoder layer.

    `into` gives [query latent | latent | rotary key | index key | index weights]; the index
    weights stay apart where the model is not float32. `query` gives [latent query | rotary query]
    per head, then the index queries; `out` reads the mixed latents of all heads. Where they are
    not folded, `query` gives [plain query | rotary query], and `key` and `value` lead into and out
    of the latent. Rotary columns are ordered [evens | odds].
    """

    norm: Float[Array, "D"]
    into: Float[Array, "D n"]
    query_norm: Float[Array, "q"]
    latent_norm: Float[Array, "r"]
    query: Float[Array, "q n"]
    key: Float[Array, "H n r"] | None
    value: Float[Array, "H r v"] | None
    out: Float[Array, "n D"]
    index_norm: LayerNormWeights | None
    index_weight: Float[Array, "D h"] | None
    mlp: MlpWeights


class Decoder(NamedTuple):
    """A GLM laid out for decoding; `layers` are arranged as the model's groups."""

    embed: Float[Array, "V D"]
    layers: tuple[tuple[LayerWeights, ...], ...]
    norm: Float[Array, "D"]
    lm_head: Float[Array, "D V"]


def is_compact(config: GlmConfig, mesh: Mesh | None) -> bool:
    """Whether a target is decoded in this layout: by one device that runs all of its experts."""
    return (mesh is None or mesh.size == 1) and config.n_routed_experts <= FEW_EXPERTS


def prepare(glm: Glm, folded_elements: int = FOLDED_ELEMENTS) -> Decoder:
    """Lay a model's weights out for decoding; run it once."""

    def member(group: Group, layer: Any) -> LayerWeights:
        if group.repeats == 1:
            return lay_out(layer, folded_elements)
        graphdef, stacked = nnx.split(layer)
        return jax.vmap(lambda one: lay_out(nnx.merge(graphdef, one, copy=True), folded_elements))(
            stacked
        )

    layers = tuple(
        tuple(member(group, layer) for layer in unit)
        for group, unit in zip(glm.groups, glm.layers, strict=True)
    )
    return Decoder(glm.embed_tokens[...], layers, glm.norm.weight[...], glm.lm_head.kernel[...])


def lay_out(layer: GlmLayer, folded_elements: int) -> LayerWeights:
    """One layer's weights, merged."""
    attention, indexer = layer.self_attn, layer.self_attn.indexer
    c = attention.config
    heads, rank, rotary = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    query = attention.q_b_proj.kernel[...].reshape(c.q_lora_rank, heads, c.qk_head_dim)
    nope, rope = jnp.split(deinterleave(query, rotary, last=True), [c.qk_nope_head_dim], axis=-1)
    expand = attention.kv_b_proj.kernel[...].reshape(rank, heads, -1)
    key = expand[..., : c.qk_nope_head_dim].transpose(1, 2, 0)
    value = expand[..., c.qk_nope_head_dim :].transpose(1, 0, 2)
    out = attention.o_proj.kernel[...].reshape(heads, c.v_head_dim, -1)
    if heads * rank * max(c.q_lora_rank, c.hidden_size) <= folded_elements:
        nope, out = _product("qhn,hnr->qhr", nope, key), _product("hrv,hvd->hrd", value, out)
        key = value = None
    into = [
        attention.q_a_proj.kernel[...],
        deinterleave(attention.kv_a_proj_with_mqa.kernel[...], rotary, last=True),
    ]
    queries = [jnp.concatenate([nope, rope], axis=-1).reshape(c.q_lora_rank, -1)]
    index_norm = index_weight = None
    if indexer is not None:
        index_query = indexer.wq_b.kernel[...].reshape(c.q_lora_rank, indexer.heads, indexer.dim)
        queries.append(deinterleave(index_query, rotary).reshape(c.q_lora_rank, -1))
        into.append(deinterleave(indexer.wk.kernel[...], rotary))
        index_norm = LayerNormWeights(
            deinterleave(indexer.k_norm.weight[...], rotary),
            deinterleave(indexer.k_norm.bias[...], rotary),
        )
        index_weight = indexer.weights_proj.kernel[...]
        if index_weight.dtype == jnp.float32:
            into, index_weight = [*into, index_weight], None
    return LayerWeights(
        norm=layer.input_layernorm.weight[...],
        into=jnp.concatenate(into, axis=-1),
        query_norm=attention.q_a_layernorm.weight[...],
        latent_norm=attention.kv_a_layernorm.weight[...],
        query=jnp.concatenate(queries, axis=-1),
        key=key,
        value=value,
        out=out.reshape(-1, c.hidden_size),
        index_norm=index_norm,
        index_weight=index_weight,
        mlp=lay_out_mlp(layer),
    )


def lay_out_mlp(layer: GlmLayer) -> MlpWeights:
    """One layer's feed-forward weights, merged."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm.weight[...]
    shared = mlp.shared_experts if isinstance(mlp, Moe) else mlp
    gate, up = [shared.gate_proj.kernel[...]], [shared.up_proj.kernel[...]]
    down = [shared.down_proj.kernel[...]]
    if not isinstance(mlp, Moe):
        return MlpWeights(norm, gate[0], up[0], down[0], None, None)
    experts, size = mlp.experts, gate[0].shape[0]
    gate.insert(0, jnp.moveaxis(experts.gate_proj[...], 0, 1).reshape(size, -1))
    up.insert(0, jnp.moveaxis(experts.up_proj[...], 0, 1).reshape(size, -1))
    down.insert(0, experts.down_proj[...].reshape(-1, size))
    router = mlp.gate.kernel[...]
    exact = router.dtype == jnp.float32
    return MlpWeights(
        norm=norm,
        gate=jnp.concatenate([router, *gate] if exact else gate, axis=-1),
        up=jnp.concatenate(up, axis=-1),
        down=jnp.concatenate(down, axis=0),
        router=None if exact else router,
        router_bias=mlp.gate.e_score_correction_bias[...],
    )


def deinterleave(
    columns: Float[Array, "*rows n"], rotary: int, last: bool = False
) -> Float[Array, "*rows n"]:
    """The first (or last) `rotary` columns reordered from neighbouring pairs to [evens | odds]."""
    split = columns.shape[-1] - rotary if last else rotary
    before, after = jnp.split(columns, [split], axis=-1)
    pairs = after if last else before
    ordered = jnp.concatenate([pairs[..., 0::2], pairs[..., 1::2]], axis=-1)
    return jnp.concatenate([before, ordered] if last else [ordered, after], axis=-1)


def _product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    wide = [x.astype(jnp.float32) for x in (a, b)]
    wide = jnp.einsum(spec, *wide, precision=jax.lax.Precision.HIGHEST)
    return wide.astype(a.dtype)
