"""One layer of the drafter: attention of a block's slots over the context and their own block.

Attribute names are those of the published checkpoint.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.attention import Attention
from dspark_jax.block_attention import Part, attend_tiled, combine
from dspark_jax.config import DraftConfig
from dspark_jax.layers import RMSNorm, SwiGLU, product


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

    The two are computed apart and put together, so the square over every slot never exists. A slot
    always sees itself, so no sum is empty.
    """
    B, N, K, H, d = query.shape
    heads = context[0].shape[2]
    grouped = query.reshape(B, N, K, heads, H // heads, d) * d**-0.5
    flat = jnp.moveaxis(grouped, 3, 1).reshape(B, heads, N, -1, d).astype(query.dtype)
    keys, values = (jnp.moveaxis(x, 2, 1) for x in context)
    over_context = attend_tiled(flat, keys, values, context_seen)
    score = product("bnkhgd,bnjhd->bhnkgj", grouped.astype(query.dtype), block[0])
    score = jnp.where(block_seen[:, None, :], score, -jnp.inf)
    weight = jax.nn.softmax(score).astype(query.dtype)
    out = product("bhnkgj,bnjhd->bhnkgd", weight, block[1]).reshape(flat.shape)
    lse = jax.nn.logsumexp(score, axis=-1).reshape(flat.shape[:-1])
    both = combine(over_context, Part(out, lse)).astype(query.dtype)
    return jnp.moveaxis(both.reshape(B, heads, N, K, -1, d), 1, 3).reshape(B, N, K, H * d)


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
