"""GLM-5.x (`glm_moe_dsa`): latent attention, a sparse indexer shared by layers, experts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import TargetConfig
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, init_normal, rope_angles
from dspark_jax.stack import build_layers, plan_groups, run_layers
from dspark_jax.targets.indexer import select_top
from dspark_jax.targets.mla import LayerCache, Mla
from dspark_jax.targets.moe import Moe, Routing
from dspark_jax.types import Frozen, Rows, TargetStates


class Choices(NamedTuple):
    """What one layer decided and saw; unused fields cost nothing once compiled."""

    routing: Routing | None
    index_scores: Float[Array, "B T C"] | None
    selected: Bool[Array, "B T C"]
    attention: Float[Array, "B T C"] | None


class _Carry(NamedTuple):
    x: Float[Array, "B T D"]
    selected: Bool[Array, "B T C"]
    aux: Float[Array, "A B T D"]


class GlmLayer(nnx.Module):
    """One decoder layer: normed attention, then a normed dense or expert MLP, both residual."""

    def __init__(self, config: TargetConfig, layer: int, *, rngs: nnx.Rngs):
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

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
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

        def step(layer: GlmLayer, carry: _Carry, slot: Any) -> tuple[_Carry, Choices]:
            normed = layer.input_layernorm(carry.x)
            query, memory = (
                layer.self_attn.query(normed, angle),
                layer.self_attn.memory(normed, angle),
            )
            scores, selected = _select(layer, normed, query.latent, memory, angle, visible, carry)
            update, attention = layer.self_attn.attend_expanded(query, memory, selected)
            x, routing = _residual(layer, carry.x + update)
            return _leave(carry, x, selected, slot), Choices(routing, scores, selected, attention)

        slots = self._per_layer(self._aux_slots())
        carry, choices = run_layers(
            self.groups, self.layers, self._enter(tokens, visible), slots, step
        )
        return self._states(carry), choices

    def extend(self, cache: Any, rows: Rows) -> tuple[Any, TargetStates, list[Any]]:
        """Rows after their caches: each is written at its position, then sees all up to itself.

        Rows already written at or past a position are overwritten, never rolled back.
        """
        capacity = jax.tree.leaves(cache)[0].shape[-2]
        visible = jnp.arange(capacity) <= rows.position[:, :, None]
        angle = self._angles(rows.position)

        def step(layer: GlmLayer, carry: _Carry, given: Any) -> tuple[_Carry, Any]:
            slot, cached = given
            normed = layer.input_layernorm(carry.x)
            query = layer.self_attn.query(normed, angle)
            memory = _write(cached, layer.self_attn.memory(normed, angle), rows.position)
            scores, selected = _select(layer, normed, query.latent, memory, angle, visible, carry)
            x, routing = _residual(
                layer, carry.x + layer.self_attn.attend_absorbed(query, memory, selected)
            )
            choices = Choices(routing, scores, selected, None)
            return _leave(carry, x, selected, slot), (memory, choices)

        slots = self._per_layer(self._aux_slots())
        given = [tuple(zip(s, c, strict=True)) for s, c in zip(slots, cache, strict=True)]
        carry, outputs = run_layers(
            self.groups, self.layers, self._enter(rows.tokens, visible), given, step
        )
        cache = tuple(tuple(memory for memory, _ in unit) for unit in outputs)
        choices = [tuple(choice for _, choice in unit) for unit in outputs]
        return cache, self._states(carry), choices

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Final norm and head; logits in float32."""
        return self.lm_head(self.norm(hidden)).astype(jnp.float32)

    def init_cache(self, batch: int, capacity: int, dtype: Any) -> Any:
        """Empty caches of every layer, arranged like `layers`."""
        c = self.config

        def empty(layer: int, repeats: int) -> LayerCache:
            lead = (batch, capacity) if repeats == 1 else (repeats, batch, capacity)
            index = jnp.zeros((*lead, c.index_head_dim), dtype)
            return LayerCache(
                latent=jnp.zeros((*lead, c.kv_lora_rank), dtype),
                rope=jnp.zeros((*lead, c.qk_rope_head_dim), dtype),
                index_key=index if c.indexer_types[layer] == "full" else None,
            )

        return tuple(
            tuple(empty(g.layer(m), g.repeats) for m in range(g.unit)) for g in self.groups
        )

    def _angles(self, position: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        return rope_angles(position, self.config.qk_rope_head_dim, self.config.rope_theta)

    def _aux_slots(self) -> list[int]:
        """Place of every layer's input among the aux states; out of range if not captured."""
        ids = self.config.aux_layer_ids
        layers = range(self.config.num_hidden_layers + 1)
        return [ids.index(j) if j in ids else len(ids) for j in layers]

    def _per_layer(self, values: list[int]) -> list[tuple[Any, ...]]:
        """Values of all layers arranged like `layers`: the state after layer i has id i + 1."""
        return [
            tuple(
                values[g.layer(m) + 1]
                if g.repeats == 1
                else np.array([values[g.layer(m, r) + 1] for r in range(g.repeats)])
                for m in range(g.unit)
            )
            for g in self.groups
        ]

    def _enter(self, tokens: Int[Array, "B T"], visible: Bool[Array, "B T C"]) -> _Carry:
        x = self.embed_tokens[...][tokens]
        aux = jnp.zeros((len(self.config.aux_layer_ids), *x.shape), x.dtype)
        return _leave(_Carry(x, visible, aux), x, visible, self._aux_slots()[0])

    def _states(self, carry: _Carry) -> TargetStates:
        aux = jnp.moveaxis(carry.aux, 0, -2)
        return TargetStates(aux.reshape(*carry.x.shape[:-1], -1), carry.x)


def _select(
    layer: GlmLayer,
    normed: Float[Array, "B T D"],
    query_latent: Float[Array, "B T q"],
    memory: LayerCache,
    angle: Float[Array, "B T half"],
    visible: Bool[Array, "B T C"],
    carry: _Carry,
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


def _leave(carry: _Carry, x: Any, selected: Any, slot: Any) -> _Carry:
    """The carry after a layer, its output kept among the aux states when a draft reads it."""
    if isinstance(slot, int) and slot >= len(carry.aux):
        return _Carry(x, selected, carry.aux)
    return _Carry(x, selected, carry.aux.at[slot].set(x, mode="drop"))


def _write(cached: LayerCache, new: LayerCache, position: Int[Array, "B S"]) -> LayerCache:
    """New rows at their positions; a position past the capacity is dropped."""
    row = jnp.arange(position.shape[0])[:, None]
    return jax.tree.map(
        lambda old, rows: old.at[row, position].set(rows.astype(old.dtype), mode="drop"),
        cached,
        new,
    )


def frozen_tables(glm: Glm, target_id: Int[Array, "Vd"] | None = None) -> Frozen:
    """The embedding and head a draft shares, the head cut to the draft vocabulary if given."""
    if target_id is None:
        target_id = jnp.arange(glm.config.vocab_size)
        return Frozen(glm.embed_tokens[...], glm.lm_head.kernel[...], target_id)
    return Frozen(glm.embed_tokens[...], glm.lm_head.kernel[...][:, target_id], target_id)
