"""Mixture of experts with GLM-5's sigmoid router and one shared expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.config import TargetConfig
from dspark_jax.layers import SwiGLU, exact_matmul, init_normal, matmul


class Routing(NamedTuple):
    """A router's decision: `biased` ranks the experts, `weight` is zero where not chosen."""

    logits: Float[Array, "*rows E"]
    biased: Float[Array, "*rows E"]
    expert: Int[Array, "*rows k"]
    weight: Float[Array, "*rows E"]


class Router(nnx.Module):
    """Top-k of `sigmoid(x W) + bias`; the bias chooses, the unbiased scores weigh."""

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.kernel = init_normal(rngs, (config.hidden_size, config.n_routed_experts))
        self.e_score_correction_bias = nnx.Param(jnp.zeros(config.n_routed_experts))

    def __call__(self, x: Float[Array, "*rows D"]) -> Routing:
        logits = exact_matmul(x, self.kernel[...])
        return route(logits, self.e_score_correction_bias[...], self.config)


def route(
    logits: Float[Array, "*rows E"], bias: Float[Array, "E"], config: TargetConfig, always: int = 0
) -> Routing:
    """The decision of a router with these float32 logits.

    `weight` covers `always` more experts after the routed ones, which every token visits at 1.
    """
    score = jax.nn.sigmoid(logits)
    biased = score + bias.astype(jnp.float32)
    expert = jax.lax.top_k(jax.lax.stop_gradient(biased), config.num_experts_per_tok)[1]
    experts = score.shape[-1]
    chosen = jax.nn.one_hot(expert, experts + always, dtype=score.dtype)
    share = jnp.concatenate([score, jnp.zeros((*score.shape[:-1], always))], axis=-1)
    total = jnp.sum(chosen * share[..., None, :], axis=(-2, -1))[..., None] + 1e-20
    share = config.routed_scaling_factor * share / total
    # A sum over choices comes last: XLA keeps it apart from what reads the weights.
    visited = (jnp.arange(experts + always) >= experts).astype(score.dtype)
    weight = jnp.sum(chosen * share[..., None, :], axis=-2) + visited
    return Routing(logits, biased, expert, weight)


class Experts(nnx.Module):
    """All routed experts as one wide SwiGLU whose hidden units are scaled by the routing weights.

    Two matrix products over every expert: exact, a row never meets another row, and on a CPU
    faster than gathering the chosen experts as long as experts are few and small. The cost grows
    with the number of experts, not with the number chosen.
    """

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        d, e, i = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.gate_proj = init_normal(rngs, (d, e, i))
        self.up_proj = init_normal(rngs, (d, e, i))
        self.down_proj = init_normal(rngs, (e, i, d))

    def __call__(
        self, x: Float[Array, "*rows D"], weight: Float[Array, "*rows E"]
    ) -> Float[Array, "*rows D"]:
        d, e, i = self.gate_proj.shape
        gate = matmul(x, self.gate_proj[...].reshape(d, e * i))
        up = matmul(x, self.up_proj[...].reshape(d, e * i))
        hidden = (jax.nn.silu(gate) * up).reshape(*x.shape[:-1], e, i)
        hidden = (hidden * weight[..., None].astype(hidden.dtype)).reshape(*x.shape[:-1], e * i)
        return matmul(hidden, self.down_proj[...].reshape(e * i, d))


class Moe(nnx.Module):
    """Routed experts plus the shared expert, which every token visits unscaled."""

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SwiGLU(config.hidden_size, shared, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows D"], Routing]:
        routing = self.gate(x)
        return self.experts(x, routing.weight) + self.shared_experts(x), routing
