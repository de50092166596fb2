"""Qwen3's attention, which the draft shares: projections, and causal attention over a context."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dspark_jax.block_attention import attend_tiled
from dspark_jax.config import DraftConfig, Qwen3Config
from dspark_jax.layers import Linear, RMSNorm, masked_softmax, product, rotate_half

FEW_ROWS = 64
"""Up to so many query rows the scores of all of them are held at once."""


class Attention(nnx.Module):
    """Projections of grouped-query attention with a norm per head before the rotation."""

    def __init__(self, config: DraftConfig | Qwen3Config, *, rngs: nnx.Rngs):
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
        """Of a draft's block slots and of its context alike: the same maps serve both (§3.1)."""
        keys = rotate_half(self.k_norm(self._heads(self.k_proj(x))), angle)
        return keys, self._heads(self.v_proj(x))

    def _heads(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows heads d"]:
        return x.reshape(*x.shape[:-1], -1, self.dim)


def attend_rows(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B Hk C d"],
    value: Float[Array, "B Hk C d"],
    visible: Bool[Array, "B S C"],
) -> Float[Array, "B S H*d"]:
    """Softmax attention of rows over the context rows each of them sees.

    With many rows the scores exist tile by tile, and tiles that nobody sees are skipped.
    """
    B, S, H, d = query.shape
    grouped = query.reshape(B, S, key.shape[1], -1, d) * d**-0.5
    grouped = jnp.moveaxis(grouped, 2, 1).astype(query.dtype)
    if S > FEW_ROWS:
        out = attend_tiled(grouped, key, value, visible).out
    else:
        score = product("bhsgd,bhcd->bhsgc", grouped, key)
        weight = masked_softmax(score, visible[:, None, :, None])
        out = product("bhsgc,bhcd->bhsgd", weight.astype(value.dtype), value)
    return jnp.moveaxis(out, 1, 2).astype(query.dtype).reshape(B, S, H * d)
