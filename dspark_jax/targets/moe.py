"""Mixtures of experts: GLM-5's sigmoid router with a shared expert, Qwen3's softmax router."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.config import GlmConfig, Qwen3Config, TargetConfig
from dspark_jax.layers import SwiGLU, exact_matmul, init_normal, matmul, product

FEW_EXPERTS = 16
"""Up to so many experts, all of them run on every row."""


class Routing(NamedTuple):
    """A router's decision: `biased` ranks the experts, `weight` is zero where not chosen."""

    logits: Float[Array, "*rows E"]
    biased: Float[Array, "*rows E"]
    expert: Int[Array, "*rows k"]
    weight: Float[Array, "*rows E"]


class Router(nnx.Module):
    """Top-k of `sigmoid(x W) + bias`; the bias chooses, the unbiased scores weigh."""

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.kernel = init_normal(rngs, (config.hidden_size, config.n_routed_experts))
        self.e_score_correction_bias = nnx.Param(jnp.zeros(config.n_routed_experts))

    def __call__(self, x: Float[Array, "*rows D"]) -> Routing:
        logits = exact_matmul(x, self.kernel[...])
        return route(logits, self.e_score_correction_bias[...], self.config)


def route(
    logits: Float[Array, "*rows E"], bias: Float[Array, "E"], config: GlmConfig, always: int = 0
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
    """All routed experts, stacked.

    Few experts all run and those not chosen weigh nothing: exact, a row never meets another row,
    and on a CPU faster than gathering. Many experts run on their own rows only.
    """

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        d, e, i = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.gate_proj = init_normal(rngs, (e, d, i))
        self.up_proj = init_normal(rngs, (e, d, i))
        self.down_proj = init_normal(rngs, (e, i, d))

    def __call__(self, x: Float[Array, "*rows D"], routing: Routing) -> Float[Array, "*rows D"]:
        gate, up, down = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        rows, expert, weight = (
            a.reshape(-1, a.shape[-1]) for a in (x, routing.expert, routing.weight)
        )
        if len(gate) <= FEW_EXPERTS:
            return all_experts(rows, weight, gate, up, down).reshape(x.shape)
        return chosen_experts(rows, expert, weight, gate, up, down).reshape(x.shape)


def all_experts(
    x: Float[Array, "R D"],
    weight: Float[Array, "R E"],
    gate: Float[Array, "E D I"],
    up: Float[Array, "E D I"],
    down: Float[Array, "E I D"],
) -> Float[Array, "R D"]:
    """Every expert on every row; the cost grows with the number of experts."""
    hidden = jax.nn.silu(product("rd,edi->rei", x, gate).astype(x.dtype))
    hidden = hidden * product("rd,edi->rei", x, up).astype(x.dtype)
    hidden = hidden * weight[..., None].astype(x.dtype)
    return matmul(hidden.reshape(len(x), -1), down.reshape(-1, x.shape[-1]))


def chosen_experts(
    x: Float[Array, "R D"],
    expert: Int[Array, "R k"],
    weight: Float[Array, "R E"],
    gate: Float[Array, "E D I"],
    up: Float[Array, "E D I"],
    down: Float[Array, "E I D"],
) -> Float[Array, "R D"]:
    """Every expert on the rows that chose it: rows sorted by expert, one ragged product each."""
    (rows, k), experts = expert.shape, gate.shape[0]
    order = jnp.argsort(expert.reshape(-1), stable=True)
    sizes = jnp.bincount(expert.reshape(-1), length=experts).astype(jnp.int32)
    gathered = x[order // k]

    def each(rows: Float[Array, "n i"], kernel: Float[Array, "E i o"]) -> Float[Array, "n o"]:
        wide = jax.lax.ragged_dot(rows, kernel, sizes, preferred_element_type=jnp.float32)
        return wide.astype(x.dtype)

    hidden = jax.nn.silu(each(gathered, gate)) * each(gathered, up)
    share = jnp.take_along_axis(weight, expert, axis=-1).reshape(-1)[order]
    y = each(hidden, down).astype(jnp.float32) * share[:, None]
    # Back in the rows' order the sum over choices has a fixed order, whatever else is in the batch.
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    return y.reshape(rows, k, -1).sum(axis=1).astype(x.dtype)


class Moe(nnx.Module):
    """Routed experts plus the shared expert, which every token visits unscaled."""

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs):
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SwiGLU(config.hidden_size, shared, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows D"], Routing]:
        routing = self.gate(x)
        return self.experts(x, routing) + self.shared_experts(x), routing


class SoftmaxRouter(nnx.Module):
    """Top-k of `softmax(x W)`, the weights of the chosen scaled to a sum of 1 if so configured."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.kernel = init_normal(rngs, (config.hidden_size, config.num_experts))

    def __call__(self, x: Float[Array, "*rows D"]) -> Routing:
        logits = exact_matmul(x, self.kernel[...])
        score = jax.nn.softmax(logits)
        best, expert = jax.lax.top_k(score, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            best = best / jnp.sum(best, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(expert, score.shape[-1], dtype=score.dtype)
        weight = jnp.sum(chosen * best[..., None], axis=-2)
        return Routing(logits, score, expert, weight)


class SparseMlp(nnx.Module):
    """Qwen3's mixture: routed experts only."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.gate = SoftmaxRouter(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows D"], Routing]:
        routing = self.gate(x)
        return self.experts(x, routing), routing
