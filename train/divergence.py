"""Why two programs of different shape part: the smallest margin of any choice on the way."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.types import Target


class Margin(NamedTuple):
    """How close a choice was, and which kind: router, top-k or top-two logits."""

    value: float
    kind: str


def margin_at(
    target: Target, params: Any, prompt: np.ndarray, answer: list[int], position: int
) -> Margin:
    """The closest choice the target made while reading up to answer token `position`.

    Both programs agree on everything before it, so one of these choices fell differently.
    """
    tokens = np.concatenate([prompt, np.array(answer[:position], np.int32)]).astype(np.int32)[None]
    length = tokens.shape[1]
    padded = -(-length // 64) * 64
    rows = np.zeros((1, padded), np.int32)
    rows[:, :length] = tokens
    router, top_k, two = jax.jit(partial(_margins, target))(
        params, rows, np.arange(padded)[None], np.array([length])
    )
    found = {"router": float(router), "top-k": float(top_k), "top-two": float(two)}
    kind = min(found, key=lambda name: found[name])
    return Margin(found[kind], kind)


def _margins(target: Target, params: Any, tokens: Any, position: Any, length: Any) -> Any:
    segment = (position < length[:, None]).astype(jnp.int32)
    states, choices = target.trace(params, tokens, segment, position)
    real = segment > 0
    flat = [choice for unit in choices for choice in unit]
    routers = [_router_gap(c.routing, real, target) for c in flat if c.routing is not None]
    tops = [_top_k_gap(c.index_scores, real, target) for c in flat if c.index_scores is not None]
    last = jnp.take_along_axis(states.final_hidden, (length - 1)[:, None, None], axis=1)
    best = jax.lax.top_k(target.unembed(params, last), 2)[0]
    two = jnp.min(best[..., 0] - best[..., 1])
    return jnp.min(jnp.stack(routers)), jnp.min(jnp.stack(tops)), two


def _router_gap(routing: Any, real: Any, target: Target) -> Any:
    k = target.config.num_experts_per_tok
    ranked = jax.lax.top_k(routing.biased, k + 1)[0]
    return jnp.min(jnp.where(real, ranked[..., k - 1] - ranked[..., k], jnp.inf))


def _top_k_gap(scores: Any, real: Any, target: Target) -> Any:
    k, width = target.config.index_topk, scores.shape[-1]
    if width <= k:
        return jnp.float32(jnp.inf)
    order = jnp.arange(width)
    causal = jnp.where(order <= order[:, None], scores, -jnp.inf)
    ranked = jax.lax.top_k(causal, k + 1)[0]
    full = real & (order >= k)
    return jnp.min(jnp.where(full, ranked[..., k - 1] - ranked[..., k], jnp.inf))
