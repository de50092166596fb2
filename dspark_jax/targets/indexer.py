"""DSA lightning indexer: a cheap scorer that picks the keys a layer attends to."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dspark_jax.config import GlmConfig
from dspark_jax.layers import LayerNorm, Linear, exact_matmul, rotate_interleaved

INDEX_NORM_EPS = 1e-6


class Indexer(nnx.Module):
    """Scores `I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])`; one key head, weights of any sign.

    Queries come from the normed query latent, keys and weights from the layer's normed input. The
    first `qk_rope_head_dim` of every vector are rotated, the rest pass.
    """

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs):
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim, rngs=rngs)
        self.wk = Linear(config.hidden_size, self.dim, rngs=rngs)
        self.k_norm = LayerNorm(self.dim, INDEX_NORM_EPS)
        self.weights_proj = Linear(config.hidden_size, self.heads, rngs=rngs)

    def keys(
        self, x: Float[Array, "B T D"], angle: Float[Array, "B T half"]
    ) -> Float[Array, "B T n"]:
        """Index keys, after norm and rotation, as they are cached."""
        return self._rotate(self.k_norm(self.wk(x))[..., None, :], angle)[..., 0, :]

    def queries(
        self,
        x: Float[Array, "B T D"],
        query_latent: Float[Array, "B T q"],
        angle: Float[Array, "B T half"],
    ) -> tuple[Float[Array, "B T h n"], Float[Array, "B T h"]]:
        """What every row asks of the keys, and the weight of each head's answer."""
        b, t, _ = x.shape
        query = self.wq_b(query_latent).reshape(b, t, self.heads, self.dim)
        return self._rotate(query, angle), exact_matmul(x, self.weights_proj.kernel[...])

    def _rotate(
        self, x: Float[Array, "B T h n"], angle: Float[Array, "B T half"]
    ) -> Float[Array, "B T h n"]:
        rotated, passed = x[..., : self.rope_dim], x[..., self.rope_dim :]
        return jnp.concatenate([rotate_interleaved(rotated, angle), passed], axis=-1)


def index_scores(
    query: Float[Array, "B T h n"], keys: Float[Array, "B C n"], weight: Float[Array, "B T h"]
) -> Float[Array, "B T C"]:
    """`sum_h weight[h] / sqrt(heads) * relu(query[h] . key / sqrt(n))`, in float32."""
    heads, dim = query.shape[-2:]
    product = jnp.einsum("bthn,bcn->bhtc", query, keys, preferred_element_type=jnp.float32)
    weight = weight.astype(jnp.float32) * heads**-0.5
    # Head by head rather than by a reduction, which XLA does not fuse on a CPU.
    weighed = (weight[..., h, None] * jax.nn.relu(product[:, h] * dim**-0.5) for h in range(heads))
    return sum(weighed, start=jnp.zeros(()))


def select_top(
    scores: Float[Array, "B T C"], visible: Bool[Array, "B T C"], k: int
) -> Bool[Array, "B T C"]:
    """The k best visible keys of every row; equal scores go to the earlier key.

    Rows that see no more than k keys keep them all, so short contexts are dense attention.
    """
    if scores.shape[-1] <= k:
        return visible
    # Asked for places, not values: XLA then selects instead of sorting, 6 to 20 times as fast.
    place = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), k)[1]
    batch, row, _ = jnp.indices(place.shape, sparse=True)
    return jnp.zeros(scores.shape, bool).at[batch, row, place].set(True) & visible
