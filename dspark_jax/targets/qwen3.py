"""Qwen3 (`qwen3`, `qwen3_moe`): grouped-query attention, a dense or a sparse MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.attention import Attention, attend_rows
from dspark_jax.cache import Cached, capacity, places
from dspark_jax.config import Qwen3Config
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, init_normal, rope_angles
from dspark_jax.spread import ALONE, Spread
from dspark_jax.stack import Group, build_layers, plan_groups, run_cached, run_layers
from dspark_jax.targets.moe import Routing, SparseMlp
from dspark_jax.targets.residual import Carry, Choices, enter, layer_slots, leave, states
from dspark_jax.types import Rows, TargetStates


class KeyValue(NamedTuple):
    """What one layer remembers of a token; as made by new rows, [B T Hk d]."""

    key: Float[Array, "B Hk C d"]
    value: Float[Array, "B Hk C d"]


Attend = Callable[[Float[Array, "B T H d"], KeyValue], tuple[Float[Array, "B T n"], Any]]
"""Of queries and of new keys and values [B T Hk d]: what the rows see, and what is kept."""


class Qwen3Layer(nnx.Module):
    """One decoder layer: normed attention, then a normed dense or sparse MLP, both residual."""

    def __init__(self, config: Qwen3Config, layer: int, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        dense = config.layer_kinds[layer] == "dense"
        self.mlp = (
            SwiGLU(size, config.intermediate_size, rngs=rngs)
            if dense
            else SparseMlp(config, rngs=rngs)
        )

    def __call__(
        self,
        carry: Carry,
        slot: Any,
        angle: Float[Array, "B T half"],
        attend: Attend,
        spread: Spread,
    ) -> tuple[Carry, Routing | None, Any]:
        """The carry after this layer, its experts' choice, and what `attend` keeps."""
        with jax.named_scope("attention"):
            normed = self.input_layernorm(carry.x)
            new = KeyValue(*self.self_attn.keys_values(normed, angle))
            attended, kept = attend(self.self_attn.queries(normed, angle), new)
            x = carry.x + spread.sum(self.self_attn.o_proj(attended))
        update, routing = self.feed_forward(x, spread)
        return leave(carry, x + update, carry.selected, slot), routing, kept

    def feed_forward(
        self, x: Float[Array, "B T D"], spread: Spread = ALONE
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The MLP's residual update."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SparseMlp):
            return self.mlp(normed, spread)
        with jax.named_scope("mlp"):
            return spread.sum(self.mlp(normed)), None


class Qwen3(nnx.Module):
    """The whole model; attribute names are those of the checkpoint's tensors."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.groups = plan_groups(config.layer_kinds, config.unroll_layers)
        self.embed_tokens = init_normal(rngs, (config.vocab_size, config.hidden_size))
        self.layers = build_layers(self.groups, lambda i, r: Qwen3Layer(config, i, rngs=r), rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, rngs=rngs)

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

        def attend(query: Any, new: KeyValue) -> tuple[Any, None]:
            key, value = (jnp.moveaxis(x, 2, 1) for x in new)
            return attend_rows(query, key, value, visible), None

        def step(layer: Qwen3Layer, carry: Carry, slot: Any) -> tuple[Carry, Choices]:
            carry, routing, _ = layer(carry, slot, angle, attend, spread)
            return carry, Choices(routing, None, None, None)

        carry = enter(spread.embed(self.embed_tokens[...], tokens), visible, self.config)
        slots = layer_slots(self.groups, self.config)
        carry, choices = run_layers(self.groups, self.layers, carry, slots, step)
        return states(carry), choices

    def extend(
        self, cache: Any, rows: Rows, spread: Spread = ALONE
    ) -> tuple[tuple[tuple[KeyValue, ...], ...], TargetStates]:
        """Rows after their caches: each is written at its position, then sees all up to itself."""
        context = capacity(rows, cache[0][0].key.shape[-2])
        visible = jnp.arange(context) <= places(rows)[:, :, None]
        angle = self._angles(rows.position)

        def step(
            layer: Qwen3Layer, carry: Carry, slot: Any, cache: KeyValue, repeat: Any
        ) -> tuple[Carry, KeyValue]:
            def attend(query: Any, new: KeyValue) -> tuple[Any, KeyValue]:
                cached = Cached(cache, rows, repeat).write_heads(new)
                key, value = cached.read_heads()
                attended = attend_rows(cached.blocks(query), key, value, visible)
                return cached.flat(attended), cached.arrays

            carry, _, kept = layer(carry, slot, angle, attend, spread)
            return carry, kept

        carry = enter(spread.embed(self.embed_tokens[...], rows.tokens), visible, self.config)
        slots = layer_slots(self.groups, self.config)
        carry, cache = run_cached(self.groups, self.layers, carry, slots, cache, step)
        return cache, states(carry)

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Final norm and head; logits in float32."""
        kernel = self.head.astype(hidden.dtype)
        return jnp.matmul(self.norm(hidden), kernel, preferred_element_type=jnp.float32)

    @property
    def head(self) -> Float[Array, "D V"]:
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def _angles(self, position: Int[Array, "B T"]) -> Float[Array, "B T half"]:
        return rope_angles(position, self.config.head_dim, self.config.rope_theta)


def init_cache(config: Qwen3Config, batch: int, capacity: int, dtype: Any = jnp.float32) -> Any:
    """Empty caches of every layer, arranged like the model's groups."""
    one = (batch, config.num_key_value_heads, capacity, config.head_dim)

    def empty(group: Group) -> KeyValue:
        shape = one if group.repeats == 1 else (group.repeats, *one)
        return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    groups = plan_groups(config.layer_kinds, config.unroll_layers)
    return tuple(tuple(empty(group) for _ in range(group.unit)) for group in groups)
