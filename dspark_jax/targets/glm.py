"""GLM-5.x (`glm_moe_dsa`): latent attention, a sparse indexer shared by layers, experts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax import ops
from dspark_jax.cache import Cached, capacity, places
from dspark_jax.config import GlmConfig
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, init_normal, rope_angles
from dspark_jax.spread import ALONE, Spread
from dspark_jax.stack import Group, build_layers, plan_groups, run_cached, run_layers
from dspark_jax.targets.indexer import index_scores, select_top
from dspark_jax.targets.mla import LayerCache, Mla
from dspark_jax.targets.moe import Moe, Routing
from dspark_jax.targets.residual import Carry, Choices, enter, layer_slots, leave, states
from dspark_jax.types import Rows, TargetStates

Memory = LayerCache | Cached
Attend = Callable[..., tuple[Float[Array, "B T D"], Any]]


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
        self, x: Float[Array, "B T D"], spread: Spread = ALONE
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The MLP's residual update."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Moe):
            return self.mlp(normed, spread)
        with jax.named_scope("mlp"):
            return spread.sum(self.mlp(normed)), None

    def __call__(
        self,
        carry: Carry,
        slot: Any,
        angle: Float[Array, "B T half"],
        visible: Bool[Array, "N S C"],
        remember: Callable[[LayerCache], Memory],
        attend: Attend,
        spread: Spread,
    ) -> tuple[Carry, Choices, Memory]:
        """The carry after this layer; `remember(new)` is what rows attend to, and comes back."""
        with jax.named_scope("attention"):
            normed = self.input_layernorm(carry.x)
            query = self.self_attn.query(normed, angle)
            memory = remember(self.self_attn.memory(normed, angle))
        with jax.named_scope("indexer"):
            scores, selected = _select(self, normed, query.latent, memory, angle, visible, carry)
        with jax.named_scope("attention"):
            update, attention = attend(self.self_attn, query, memory, selected)
            x = carry.x + spread.sum(update)
        update, routing = self.feed_forward(x, spread)
        carry = leave(carry, x + update, selected, slot)
        return carry, Choices(routing, scores, selected, attention), memory


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
        self,
        tokens: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        position: Int[Array, "B T"],
        spread: Spread = ALONE,
    ) -> tuple[TargetStates, list[Any]]:
        """Whole packed rows without a cache; a token sees its own document up to itself."""
        order = jnp.arange(tokens.shape[1])
        visible = (segment[:, :, None] == segment[:, None, :]) & (order[:, None] >= order)
        angle = self._angles(position)

        def step(layer: GlmLayer, carry: Carry, slot: Any) -> tuple[Carry, Choices]:
            given = (angle, visible, lambda new: new, Mla.attend_expanded, spread)
            carry, choices, _ = layer(carry, slot, *given)
            return carry, choices

        carry = enter(spread.embed(self.embed_tokens[...], tokens), visible, self.config)
        slots = layer_slots(self.groups, self.config)
        carry, choices = run_layers(self.groups, self.layers, carry, slots, step)
        return states(carry), choices

    def extend(
        self, cache: Any, rows: Rows, spread: Spread = ALONE
    ) -> tuple[tuple[tuple[LayerCache, ...], ...], TargetStates]:
        """Rows after their caches: each is written at its position, then sees all up to itself.

        Rows already written at or past a position are overwritten, never rolled back.
        """
        context = capacity(rows, cache[0][0].latent.shape[-2])
        visible = jnp.arange(context) <= places(rows)[:, :, None]
        angle = self._angles(rows.position)

        def step(
            layer: GlmLayer, carry: Carry, slot: Any, cache: LayerCache, repeat: Any
        ) -> tuple[Carry, LayerCache]:
            def remember(new: LayerCache) -> Cached:
                return Cached(cache, rows, repeat).write(new)

            given = (angle, visible, remember, Mla.attend_absorbed, spread)
            carry, _, cached = layer(carry, slot, *given)
            assert isinstance(cached, Cached)
            return carry, cached.arrays

        carry = enter(spread.embed(self.embed_tokens[...], rows.tokens), visible, self.config)
        slots = layer_slots(self.groups, self.config)
        carry, cache = run_cached(self.groups, self.layers, carry, slots, cache, step)
        return cache, states(carry)

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Final norm and head; logits in float32."""
        return jnp.matmul(self.norm(hidden), self.head, preferred_element_type=jnp.float32)

    @property
    def head(self) -> Float[Array, "D V"]:
        return self.lm_head.kernel[...]

    def _angles(self, position: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        return rope_angles(position, self.config.qk_rope_head_dim, self.config.rope_theta)


def init_cache(
    config: GlmConfig, batch: int, capacity: int, dtype: Any = jnp.float32
) -> tuple[tuple[LayerCache, ...], ...]:
    """Empty caches of every layer, arranged like the model's groups."""
    c = config

    def empty(group: Group, member: int) -> LayerCache:
        lead = (batch, capacity) if group.repeats == 1 else (group.repeats, batch, capacity)
        sizes = [c.kv_lora_rank, ops.row_width(c.qk_rope_head_dim), c.index_head_dim]
        latent, rope, index = (jnp.zeros((*lead, size), dtype) for size in sizes)
        full = c.indexer_types[group.layer(member)] == "full"
        return LayerCache(latent, rope, index if full else None)

    groups = plan_groups(c.layer_kinds, c.unroll_layers)
    return tuple(tuple(empty(group, m) for m in range(group.unit)) for group in groups)


def _select(
    layer: GlmLayer,
    normed: Float[Array, "B T D"],
    query_latent: Float[Array, "B T q"],
    memory: Memory,
    angle: Float[Array, "B T half"],
    visible: Bool[Array, "N S C"],
    carry: Carry,
) -> tuple[Float[Array, "N S C"] | None, Bool[Array, "N S C"]]:
    """The keys every row attends to: chosen here, or the last choice where the layer shares it."""
    indexer = layer.self_attn.indexer
    index_key = (memory.read() if isinstance(memory, Cached) else memory).index_key
    if indexer is None or index_key is None:
        return None, carry.selected
    # The choice carries no gradient: the indexer learns from its own loss on these scores.
    asked = indexer.queries(
        jax.lax.stop_gradient(normed), jax.lax.stop_gradient(query_latent), angle
    )
    query, weight = memory.blocks(asked) if isinstance(memory, Cached) else asked
    scores = index_scores(query, index_key, weight)
    top = select_top(jax.lax.stop_gradient(scores), visible, layer.self_attn.config.index_topk)
    return scores, top
