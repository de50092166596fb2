"""Multi-head latent attention: keys and values of all heads compressed into one cached latent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dspark_jax import ops
from dspark_jax.block_attention import attend_tiled
from dspark_jax.cache import Cached, places
from dspark_jax.config import GlmConfig
from dspark_jax.fp8 import BlockScaled, dequantise
from dspark_jax.layers import Linear, RMSNorm, masked_softmax, product, rotate_interleaved
from dspark_jax.targets.indexer import Indexer

TILE = 16384
"""Rows of a memory whose scores exist at a time."""
LARGEST_SCORES = 1 << 27
"""Elements of a layer's attention scores up to which all of them are held at once."""


class LayerCache(NamedTuple):
    """What one layer remembers of a token; `index_key` only in layers that own an indexer."""

    latent: Float[Array, "B C r"]
    rope: Float[Array, "B C p"]
    index_key: Float[Array, "B C n"] | None


class Query(NamedTuple):
    """A row's query; `latent` is the normed low-rank query, which the indexer reads too."""

    latent: Float[Array, "B T q"]
    nope: Float[Array, "B T H n"]
    rope: Float[Array, "B T H p"]


class Mla(nnx.Module):
    """GLM-5 attention. Head vectors are [nope | rope], `kv_b_proj` holds [key | value] per head."""

    def __init__(self, config: GlmConfig, indexer: str, *, rngs: nnx.Rngs):
        c = self.config = config
        heads, eps = c.num_attention_heads, c.latent_norm_eps
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, rngs=rngs)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, eps)
        self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, rngs=rngs)
        self.kv_a_proj_with_mqa = Linear(
            c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, rngs=rngs
        )
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps)
        self.kv_b_proj = Linear(
            c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), rngs=rngs
        )
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, rngs=rngs)
        self.indexer = Indexer(config, rngs=rngs) if indexer == "full" else None

    def query(self, x: Float[Array, "B T D"], angle: Float[Array, "B T half"]) -> Query:
        """The queries of every row."""
        c = self.config
        latent = self.q_a_layernorm(self.q_a_proj(x))
        heads = self.q_b_proj(latent).reshape(*x.shape[:2], -1, c.qk_head_dim)
        nope, rope = jnp.split(heads, [c.qk_nope_head_dim], axis=-1)
        return Query(latent, nope, rotate_interleaved(rope, angle))

    def memory(self, x: Float[Array, "B T D"], angle: Float[Array, "B T half"]) -> LayerCache:
        """What this layer remembers of every row."""
        latent, rope = jnp.split(self.kv_a_proj_with_mqa(x), [self.config.kv_lora_rank], axis=-1)
        rope = rotate_interleaved(rope[..., None, :], angle)[..., 0, :]
        # The indexer learns from its own loss alone; nothing flows back into the model.
        indexed = jax.lax.stop_gradient(x)
        index = None if self.indexer is None else self.indexer.keys(indexed, angle)
        return LayerCache(self.kv_a_layernorm(latent), rope, index)

    def attend_expanded(
        self, query: Query, memory: LayerCache, visible: Bool[Array, "B T C"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T C"] | None]:
        """Attention with per-head keys and values: fewest operations when rows are many.

        Also returns the attention averaged over heads, which trains the indexer; of rows so many
        that their scores are computed tile by tile, None.
        """
        c, (b, s, _) = self.config, memory.latent.shape
        heads = self.kv_b_proj(memory.latent).reshape(b, s, -1, c.qk_nope_head_dim + c.v_head_dim)
        key, value = jnp.split(heads, [c.qk_nope_head_dim], axis=-1)
        rows, count = query.nope.shape[1:3]
        if b * count * rows * s > LARGEST_SCORES:
            out, probs = _tiled(query, key, value, memory.rope, visible), None
        else:
            scores = product("bthn,bshn->bhts", query.nope, key)
            scores = scores + product("bthp,bsp->bhts", query.rope, memory.rope)
            probs = masked_softmax(scores * c.qk_head_dim**-0.5, visible[:, None])
            out = product("bhts,bshv->bthv", probs.astype(value.dtype), value).astype(value.dtype)
            probs = jnp.mean(probs, axis=1)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), probs

    def attend_absorbed(
        self, query: Query, memory: Cached, visible: Bool[Array, "N S C"]
    ) -> tuple[Float[Array, "B T D"], None]:
        """Attention in the latent space, where all heads read the same memory: fewest bytes.

        The expansion of keys is applied to the queries, that of values to what they mix.
        """
        c, dtype = self.config, query.nope.dtype
        expand = self.kv_b_proj.kernel[...]
        if isinstance(expand, BlockScaled):
            expand = dequantise(expand, dtype)
        expand = expand.reshape(c.kv_lora_rank, -1, c.qk_nope_head_dim + c.v_head_dim)
        to_latent, to_value = jnp.split(jnp.moveaxis(expand, 1, 0), [c.qk_nope_head_dim], axis=-1)
        # Heads go first: XLA's CPU multiplies no bfloat16 with them in the middle.
        heads = jnp.moveaxis(query.nope, 2, 0)
        latent = jnp.moveaxis(product("hbsn,hrn->hbsr", heads, to_latent), 0, 2).astype(dtype)
        latent, rope = memory.blocks((latent, query.rope))
        mixed = memory.flat(mix_latents(latent, rope, memory, visible, c.qk_head_dim**-0.5))
        out = product("hbsr,hrv->hbsv", jnp.moveaxis(mixed.astype(dtype), 2, 0), to_value)
        out = jnp.moveaxis(out, 0, 2).astype(dtype)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), None


def mix_latents(
    latent: Float[Array, "B S H r"],
    rope: Float[Array, "B S H p"],
    memory: Cached,
    visible: Bool[Array, "B S C"],
    scale: float,
    tile: int = TILE,
) -> Float[Array, "B S H r"]:
    """What every head's query takes from the cached latents, in float32.

    Without a kernel, tile by tile. Tiles are not a loop of the program: XLA would copy the whole
    cache to loop over it.
    """
    cached, pages = memory.as_pages()
    given = (latent, rope, cached.latent, cached.rope, pages, places(memory.rows), visible)
    by_kernel = ops.mla_attention(*given, scale=scale)
    if by_kernel is not None:
        return by_kernel
    capacity = visible.shape[-1]
    tile = tile if capacity % tile == 0 else capacity
    lead = latent.shape[:3]

    def add(i: int, carry: Any) -> Any:
        total, largest, summed = carry
        part = memory.read_rows(i * tile, tile)
        seen = jax.lax.dynamic_slice_in_dim(visible, i * tile, tile, 2)[:, :, None]
        with jax.named_scope("scores"):
            scores = product("bshr,bcr->bshc", latent, part.latent)
            scores = (
                scores + product("bshp,bcp->bshc", rope, part.rope[..., : rope.shape[-1]])
            ) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weight, old = jnp.exp(scores - top[..., None]), jnp.exp(largest - top)
        with jax.named_scope("values"):
            mixed = product("bshc,bcr->bshr", weight.astype(part.latent.dtype), part.latent)
        return total * old[..., None] + mixed, top, summed * old + jnp.sum(weight, axis=-1)

    lowest = jnp.full(lead, jnp.finfo(jnp.float32).min)  # and not -inf: old would have no value
    carry = jnp.zeros(latent.shape, jnp.float32), lowest, jnp.zeros(lead)
    for i in range(capacity // tile):
        carry = add(i, carry)
    total, _, summed = carry
    return total / jnp.maximum(summed, 1e-30)[..., None]


def _tiled(
    query: Query,
    key: Float[Array, "B C H n"],
    value: Float[Array, "B C H v"],
    rope: Float[Array, "B C p"],
    visible: Bool[Array, "B T C"],
) -> Float[Array, "B T H v"]:
    """The same as a whole softmax; rows see their own document, so most tiles are skipped."""
    shared = jnp.broadcast_to(rope[:, :, None], (*key.shape[:3], rope.shape[-1]))
    key = jnp.moveaxis(jnp.concatenate([key, shared], axis=-1), 2, 1)
    asked = jnp.concatenate([query.nope, query.rope], axis=-1)
    asked = jnp.moveaxis(asked * asked.shape[-1] ** -0.5, 2, 1).astype(key.dtype)
    out = attend_tiled(asked[:, :, :, None], key, jnp.moveaxis(value, 2, 1), visible).out
    return jnp.moveaxis(out[:, :, :, 0], 1, 2).astype(value.dtype)
