"""Mixtures of experts: GLM-5's sigmoid router with a shared expert, Qwen3's softmax router."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.config import GlmConfig, Qwen3Config, TargetConfig
from dspark_jax.fp8 import BlockScaled, dequantise, ragged_matmul
from dspark_jax.layers import SwiGLU, exact_matmul, init_normal, matmul, product
from dspark_jax.spread import ALONE, Spread

FEW_EXPERTS = 16
"""Up to so many experts, all of them run on every row."""


Kernels = Float[Array, "E _in _out"] | BlockScaled


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
    """Routed experts, stacked: all of them, or those that this device holds.

    Few experts all run and those not chosen weigh nothing: exact, a row never meets another row,
    and on a CPU faster than gathering. Many experts run on their own rows only.
    """

    def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
        d, e, i = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.few = e <= FEW_EXPERTS
        self.gate_proj = init_normal(rngs, (e, d, i))
        self.up_proj = init_normal(rngs, (e, d, i))
        self.down_proj = init_normal(rngs, (e, i, d))

    def __call__(
        self, x: Float[Array, "R D"], routing: Routing, spread: Spread = ALONE
    ) -> Float[Array, "R D"]:
        """What the experts here add to every row."""
        kernels = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        here = kernels[0].shape[0]
        first = spread.first_expert(here)
        if self.few:
            weight = jax.lax.dynamic_slice_in_dim(routing.weight, first, here, axis=1)
            return all_experts(x, weight, *map(plain, kernels))
        share = jnp.take_along_axis(routing.weight, routing.expert, axis=-1)
        if spread == ALONE:
            return chosen_experts(x, routing.expert, share, *kernels)
        return local_experts(x, routing.expert - first, share, *kernels, routing.weight.shape[1])


def plain(kernels: Kernels) -> Float[Array, "E i o"]:
    """The matrices themselves, in bfloat16 where they are kept in FP8."""
    return dequantise(kernels, jnp.bfloat16) if isinstance(kernels, BlockScaled) else kernels


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
    share: Float[Array, "R k"],
    gate: Kernels,
    up: Kernels,
    down: Kernels,
) -> Float[Array, "R D"]:
    """Every expert on the rows that chose it: rows sorted by expert, one ragged product each."""
    (rows, k), experts = expert.shape, gate.shape[0]
    order = jnp.argsort(expert.reshape(-1), stable=True)
    sizes = jnp.bincount(expert.reshape(-1), length=experts).astype(jnp.int32)
    y = swiglu(x[order // k], sizes, gate, up, down) * share.reshape(-1)[order][:, None]
    # Back in the rows' order the sum over choices has a fixed order, whatever else is in the batch.
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
    return y.reshape(rows, k, -1).sum(axis=1).astype(x.dtype)


def local_experts(
    x: Float[Array, "R D"],
    expert: Int[Array, "R k"],
    share: Float[Array, "R k"],
    gate: Kernels,
    up: Kernels,
    down: Kernels,
    everywhere: int,
) -> Float[Array, "R D"]:
    """The same for choices among `everywhere` experts, of which those numbered from 0 are here.

    Rows that chose one of these are worked off in chunks of twice as many as there should be, so
    one chunk is usual, and however the choices fall none is left out. A row's sum goes from the
    lowest expert to the highest.
    """
    (rows, k), here = expert.shape, gate.shape[0]
    chunk = min(rows * k, 8 * -(-2 * rows * k * here // (8 * everywhere)))
    key = jnp.where((expert >= 0) & (expert < here), expert, here).reshape(-1)
    order = jnp.argsort(key, stable=True)
    order = jnp.pad(order, (0, -len(order) % chunk))
    sizes = jnp.bincount(key, length=here + 1)[:here].astype(jnp.int32)
    ends = jnp.cumsum(sizes)

    def add(i: Any, y: Array) -> Array:
        begin = i * chunk
        slot = jax.lax.dynamic_slice_in_dim(order, begin, chunk)
        cut = jnp.clip(ends - begin, 0, chunk) - jnp.clip(ends - sizes - begin, 0, chunk)
        real = begin + jnp.arange(chunk) < ends[-1]
        part = swiglu(x[slot // k], cut, gate, up, down) * share.reshape(-1)[slot][:, None]
        # Rows past the real ones hold anything, and are added nowhere.
        return y.at[jnp.where(real, slot // k, rows)].add(part, mode="drop")

    zero = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, -(-ends[-1] // chunk), add, zero).astype(x.dtype)


def swiglu(
    x: Float[Array, "R D"], sizes: Int[Array, "E"], gate: Kernels, up: Kernels, down: Kernels
) -> Float[Array, "R D"]:
    """Every expert's MLP on its rows, which are sorted by expert; in float32."""
    hidden = jax.nn.silu(ragged(x, gate, sizes).astype(x.dtype))
    hidden = hidden * ragged(x, up, sizes).astype(x.dtype)
    return ragged(hidden, down, sizes)


def ragged(x: Float[Array, "R i"], kernels: Kernels, sizes: Int[Array, "E"]) -> Float[Array, "R o"]:
    """Rows sorted by matrix times their matrix, in float32."""
    if isinstance(kernels, BlockScaled):
        return ragged_matmul(x, kernels, sizes)
    return jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32)


def routed(
    gate: Callable[[Array], Routing],
    experts: Experts,
    shared: SwiGLU | None,
    x: Float[Array, "B T D"],
    spread: Spread,
) -> tuple[Float[Array, "B T D"], Routing]:
    """A mixture on rows of which each group of devices has its own; the experts are shared by all.

    One gathering of rows, one sum; the decision comes back for the own rows.
    """
    rows = spread.all_rows(x)
    routing = gate(rows.reshape(-1, x.shape[-1]))
    y = experts(rows.reshape(-1, x.shape[-1]), routing, spread).reshape(rows.shape)
    routing = jax.tree.map(lambda r: spread.own_rows(r.reshape(*rows.shape[:-1], -1)), routing)
    return spread.sum_experts(y, None if shared is None else shared(x)), routing


class Moe(nnx.Module):
    """Routed experts plus the shared expert, which every token visits unscaled."""

    def __init__(self, config: GlmConfig, *, rngs: nnx.Rngs):
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.shared_experts = SwiGLU(config.hidden_size, shared, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], spread: Spread = ALONE
    ) -> tuple[Float[Array, "B T D"], Routing]:
        return routed(self.gate, self.experts, self.shared_experts, x, spread)


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

    def __call__(
        self, x: Float[Array, "B T D"], spread: Spread = ALONE
    ) -> tuple[Float[Array, "B T D"], Routing]:
        return routed(self.gate, self.experts, None, x, spread)
