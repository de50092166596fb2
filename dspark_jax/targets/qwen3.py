"""Qwen3 (`qwen3`, `qwen3_moe`): grouped-query attention, a dense or a sparse MLP."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.attention import Attention, attend_rows
from dspark_jax.config import Qwen3Config
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, init_normal, rope_angles
from dspark_jax.stack import Group, build_layers, plan_groups, run_layers
from dspark_jax.targets.cache import write_heads
from dspark_jax.targets.moe import Routing, SparseMlp
from dspark_jax.targets.residual import Carry, Choices, enter, layer_slots, leave, states
from dspark_jax.types import Rows, TargetStates


class KeyValue(NamedTuple):
    """What one layer remembers of a token."""

    key: Float[Array, "B Hk C d"]
    value: Float[Array, "B Hk C d"]


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

    def feed_forward(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """The MLP's residual update."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SparseMlp):
            return self.mlp(normed)
        return self.mlp(normed), None


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
        self, tokens: Int[Array, "B T"], segment: Int[Array, "B T"], position: Int[Array, "B T"]
    ) -> tuple[TargetStates, list[Any]]:
        """Whole packed rows without a cache; a token sees its own document up to itself."""
        order = jnp.arange(tokens.shape[1])
        visible = (segment[:, :, None] == segment[:, None, :]) & (order[:, None] >= order)
        nothing = tuple((None,) * group.unit for group in self.groups)

        def remember(cached: None, new: KeyValue) -> tuple[KeyValue, None]:
            return new, None

        found, outputs = self._run(tokens, position, visible, nothing, remember)
        return found, [tuple(choices for _, choices in unit) for unit in outputs]

    def extend(self, cache: Any, rows: Rows) -> tuple[Any, TargetStates]:
        """Rows after their caches: each is written at its position, then sees all up to itself."""
        capacity = cache[0][0].key.shape[-2]
        visible = jnp.arange(capacity) <= rows.position[:, :, None]

        def remember(cached: KeyValue, new: KeyValue) -> tuple[KeyValue, KeyValue]:
            memory = write_heads(cached, new, rows.position)
            return memory, memory

        found, outputs = self._run(rows.tokens, rows.position, visible, cache, remember)
        return tuple(tuple(memory for memory, _ in unit) for unit in outputs), found

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Final norm and head; logits in float32."""
        kernel = self.head.astype(hidden.dtype)
        return jnp.matmul(self.norm(hidden), kernel, preferred_element_type=jnp.float32)

    @property
    def head(self) -> Float[Array, "D V"]:
        return self.embed_tokens[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def _run(
        self,
        tokens: Int[Array, "B S"],
        position: Int[Array, "B S"],
        visible: Bool[Array, "B S C"],
        caches: Any,
        remember: Callable[[Any, KeyValue], tuple[KeyValue, Any]],
    ) -> tuple[TargetStates, list[Any]]:
        """All layers; `remember(cached, new)` gives what the rows attend to and what is kept."""
        angle = rope_angles(position, self.config.head_dim, self.config.rope_theta)

        def step(layer: Qwen3Layer, carry: Carry, given: Any) -> tuple[Carry, Any]:
            slot, cached = given
            normed = layer.input_layernorm(carry.x)
            new = layer.self_attn.keys_values(normed, angle)
            memory, kept = remember(cached, KeyValue(*(jnp.moveaxis(x, 2, 1) for x in new)))
            query = layer.self_attn.queries(normed, angle)
            x = carry.x + layer.self_attn.o_proj(attend_rows(query, *memory, visible))
            update, routing = layer.feed_forward(x)
            choices = Choices(routing, None, None, None)
            return leave(carry, x + update, carry.selected, slot), (kept, choices)

        ids = self.config.aux_layer_ids
        slots = layer_slots(self.groups, ids, self.config.num_hidden_layers)
        given = [tuple(zip(s, c, strict=True)) for s, c in zip(slots, caches, strict=True)]
        carry = enter(self.embed_tokens[...][tokens], visible, ids)
        carry, outputs = run_layers(self.groups, self.layers, carry, given, step)
        return states(carry), outputs


def init_cache(config: Qwen3Config, batch: int, capacity: int, dtype: Any = jnp.float32) -> Any:
    """Empty caches of every layer, arranged like the model's groups."""
    one = (batch, config.num_key_value_heads, capacity, config.head_dim)

    def empty(group: Group) -> KeyValue:
        shape = one if group.repeats == 1 else (group.repeats, *one)
        return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    groups = plan_groups(config.layer_kinds, config.unroll_layers)
    return tuple(tuple(empty(group) for _ in range(group.unit)) for group in groups)
