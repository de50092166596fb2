"""One layer of the drafter: attention of a block's slots over the context and their own block.

Attribute names are those of the published checkpoint.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import DraftConfig
from dspark_jax.layers import Linear, RMSNorm, SwiGLU, rotate_half


class Attention(nnx.Module):
    """Projections of grouped-query attention with a norm per head before the rotation."""

    def __init__(self, config: DraftConfig, *, rngs: nnx.Rngs):
        size, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = Linear(size, queries, rngs=rngs)
        self.k_proj = Linear(size, keys, rngs=rngs)
        self.v_proj = Linear(size, keys, rngs=rngs)
        self.o_proj = Linear(queries, size, rngs=rngs)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.dim = dim

    def queries(
        self, x: Float[Array, "*rows D"], angle: Float[Array, "*rows half"]
    ) -> Float[Array, "*rows H d"]:
        return rotate_half(self.q_norm(self._heads(self.q_proj(x))), angle)

    def keys_values(
        self, x: Float[Array, "*rows D"], angle: Float[Array, "*rows half"]
    ) -> tuple[Float[Array, "*rows Hk d"], Float[Array, "*rows Hk d"]]:
        """Of block slots and of context alike: the same maps serve both (paper §3.1)."""
        keys = rotate_half(self.k_norm(self._heads(self.k_proj(x))), angle)
        return keys, self._heads(self.v_proj(x))

    def _heads(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows heads d"]:
        return x.reshape(*x.shape[:-1], -1, self.dim)


class DecoderLayer(nnx.Module):
    """Attention over context and block, then SwiGLU, each on a normed input and added back."""

    def __init__(self, config: DraftConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B N K D"],
        angle: Float[Array, "B N K half"],
        context: tuple[Float[Array, "B C Hk d"], Float[Array, "B C Hk d"]],
        context_seen: Bool[Array, "B N C"],
        block_seen: Bool[Array, "K K"],
    ) -> Float[Array, "B N K D"]:
        normed = self.input_layernorm(x)
        attended = attend(
            self.self_attn.queries(normed, angle),
            context,
            self.self_attn.keys_values(normed, angle),
            context_seen,
            block_seen,
        )
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def attend(
    query: Float[Array, "B N K H d"],
    context: tuple[Float[Array, "B C Hk d"], Float[Array, "B C Hk d"]],
    block: tuple[Float[Array, "B N K Hk d"], Float[Array, "B N K Hk d"]],
    context_seen: Bool[Array, "B N C"],
    block_seen: Bool[Array, "K K"],
) -> Float[Array, "B N K H*d"]:
    """Softmax attention of block slots over the context's rows and their own block's slots.

    The scores are [slots, C] and [slots, K], exponentiated apart and normalised by their common
    sum; the square over every slot never exists. A slot always sees itself, so no sum is empty.
    """
    B, N, K, H, d = query.shape
    grouped = query.reshape(B, N, K, -1, H // context[0].shape[2], d)
    over_context = _scores("bnkhgd,bchd->bhnkgc", grouped, context[0])
    over_context = jnp.where(context_seen[:, None, :, None, None, :], over_context, -jnp.inf)
    over_block = _scores("bnkhgd,bnjhd->bhnkgj", grouped, block[0])
    over_block = jnp.where(block_seen[:, None, :], over_block, -jnp.inf)
    largest = jnp.maximum(
        over_context.max(axis=-1, keepdims=True), over_block.max(axis=-1, keepdims=True)
    )
    largest = jax.lax.stop_gradient(largest)
    on_context, on_block = jnp.exp(over_context - largest), jnp.exp(over_block - largest)
    total = on_context.sum(axis=-1, keepdims=True) + on_block.sum(axis=-1, keepdims=True)
    out = _blend("bhnkgc,bchd->bhnkgd", on_context, context[1])
    out = (out + _blend("bhnkgj,bnjhd->bhnkgd", on_block, block[1])) / total
    return jnp.moveaxis(out, 1, 3).astype(query.dtype).reshape(B, N, K, H * d)


def _scores(axes: str, query: Float[Array, "..."], key: Float[Array, "..."]) -> Float[Array, "..."]:
    dim = query.shape[-1]
    return jnp.einsum(axes, query, key, preferred_element_type=jnp.float32) * dim**-0.5


def _blend(
    axes: str, weights: Float[Array, "..."], value: Float[Array, "..."]
) -> Float[Array, "..."]:
    weights = weights.astype(value.dtype)
    return jnp.einsum(axes, weights, value, preferred_element_type=jnp.float32)


def before_anchor(segment: Int[Array, "B T"], anchor: Int[Array, "B N"]) -> Bool[Array, "B N T"]:
    """Rows of the anchor's document strictly before it.

    The anchor's own state is excluded because decoding does not have it: the target has not seen
    the anchor yet. Padding (segment 0) is nobody's document.
    """
    own = jnp.take_along_axis(segment, anchor, axis=1)[:, :, None]
    row = jnp.arange(segment.shape[1])
    return (segment[:, None, :] == own) & (own != 0) & (row < anchor[:, :, None])


def within(
    seen: Bool[Array, "B N C"], row: Int[Array, "B N"], window: int | Int[Array, ""]
) -> Bool[Array, "B N C"]:
    """`seen`, narrowed to the `window` rows before the anchor's row."""
    return seen & (jnp.arange(seen.shape[-1]) >= row[..., None] - window)


def block_mask(K: int, causal: bool | Bool[Array, ""]) -> Bool[Array, "K K"]:
    """Which slots of its own block a slot sees: all of them, or those up to itself when causal."""
    slot = jnp.arange(K)
    return (slot <= slot[:, None]) | jnp.logical_not(causal)
