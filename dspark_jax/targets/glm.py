"""GLM-5.x (`glm_moe_dsa`): latent attention, a sparse indexer shared by layers, experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import GlmConfig
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, init_normal, rope_angles
from dspark_jax.stack import build_layers, plan_groups, run_layers
from dspark_jax.targets.indexer import select_top
from dspark_jax.targets.mla import LayerCache, Mla
from dspark_jax.targets.moe import Moe, Routing
from dspark_jax.targets.residual import Carry, Choices, enter, layer_slots, leave, states
from dspark_jax.types import TargetStates


class GlmLayer(nnx.Module):
    """One decoder layer: normed attention, then a normed dense or expert MLP, both residual."""

    def __init__(self, config: GlmConfig, layer: int, *, rngs: nnx.Rngs):
        indexer, mlp = config.layer_kinds[layer]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Mla(config, indexer, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = mlp == "dense"
        self.mlp = (
            SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs)
            if dense
            else Moe(config, rngs=rngs)
        )

    def feed_forward(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The MLP's residual update."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Moe):
            return self.mlp(normed)
        return self.mlp(normed), None


class Glm(nnx.Module):
    """The whole model; attribute names are those of the checkpoint's tensors."""

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.groups = plan_groups(config.layer_kinds, config.unroll_layers)
        self.embed_tokens = init_normal(rngs, (config.vocab_size, config.hidden_size))
        self.layers = build_layers(self.groups, lambda i, r: GlmLayer(config, i, rngs=r), rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def forward(
        self, tokens: Int[Array, "B T"], segment: Int[Array, "B T"], position: Int[Array, "B T"]
    ) -> tuple[TargetStates, list[Any]]:
        """Whole packed rows without a cache; a token sees its own document up to itself."""
        order = jnp.arange(tokens.shape[1])
        visible = (segment[:, :, None] == segment[:, None, :]) & (order[:, None] >= order)
        angle = self._angles(position)

        def step(layer: GlmLayer, carry: Carry, slot: Any) -> tuple[Carry, Choices]:
            normed = layer.input_layernorm(carry.x)
            query, memory = (
                layer.self_attn.query(normed, angle),
                layer.self_attn.memory(normed, angle),
            )
            scores, selected = _select(layer, normed, query.latent, memory, angle, visible, carry)
            update, attention = layer.self_attn.attend_expanded(query, memory, selected)
            x, routing = _residual(layer, carry.x + update)
            return leave(carry, x, selected, slot), Choices(routing, scores, selected, attention)

        ids = self.config.aux_layer_ids
        carry, choices = run_layers(
            self.groups,
            self.layers,
            enter(self.embed_tokens[...][tokens], visible, ids),
            layer_slots(self.groups, ids, self.config.num_hidden_layers),
            step,
        )
        return states(carry), choices

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Final norm and head; logits in float32."""
        return jnp.matmul(self.norm(hidden), self.head, preferred_element_type=jnp.float32)

    @property
    def head(self) -> Float[Array, "D V"]:
        return self.lm_head.kernel[...]

    def _angles(self, position: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        return rope_angles(position, self.config.qk_rope_head_dim, self.config.rope_theta)


def _select(
    layer: GlmLayer,
    normed: Float[Array, "B T D"],
    query_latent: Float[Array, "B T q"],
    memory: LayerCache,
    angle: Float[Array, "B T half"],
    visible: Bool[Array, "B T C"],
    carry: Carry,
) -> tuple[Float[Array, "B T C"] | None, Bool[Array, "B T C"]]:
    """The keys every row attends to: chosen here, or the last choice where the layer shares it."""
    indexer = layer.self_attn.indexer
    if indexer is None or memory.index_key is None:
        return None, carry.selected
    # The choice carries no gradient: the indexer learns from its own loss on these scores.
    scores = indexer.scores(
        jax.lax.stop_gradient(normed), jax.lax.stop_gradient(query_latent), memory.index_key, angle
    )
    top = select_top(jax.lax.stop_gradient(scores), visible, layer.self_attn.config.index_topk)
    return scores, top


def _residual(
    layer: GlmLayer, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Routing | None]:
    update, routing = layer.feed_forward(x)
    return x + update, routing
