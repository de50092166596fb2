"""Why two programs of different shape part: the first choice that fell differently, and its margin.

Float32 results of two programs differ in the last bits. Where experts, top-k sets or the next token
are chosen by less than that, the programs may choose differently and are both right.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dspark_jax.hosts import fetch
from dspark_jax.types import Rows, Target

NEAR_TIE = 1e-4
"""Largest margin at which two right programs may choose differently."""
ROUNDING = 1e-4
"""Largest difference of hidden states, relative to their largest entry, that is rounding alone."""


class Parting(NamedTuple):
    """Where two programs first computed different things, and how close the choice there was."""

    token: int
    """Position in prompt and answer, from 0."""
    kind: str
    """router, top-k, or top-two logits where only the last choice fell differently."""
    margin: float


def explain(
    target: Target,
    params: Any,
    prompt: Int[np.ndarray, "P"],
    answer: list[int],
    position: int,
    width: int,
    one_token: Target | None = None,
    other: int = 1,
) -> Parting:
    """Read the agreed tokens once more by both programs and compare what they computed.

    Both programs agree on the answer before `position`; one reads `width` rows a pass, the other
    (of `one_token`, the same target when not given) a single one, or `other` ones. The first row at
    which their hidden states differ by more than rounding must hold a router or top-k choice that
    nearly tied; if there is none, the next token's two best logits must.
    """
    agreed = np.concatenate([prompt, np.array(answer[:position], np.int32)]).astype(np.int32)
    tokens = np.zeros((1, -(-len(agreed) // 64) * 64), np.int32)
    tokens[0, : len(agreed)] = agreed
    start, length = jnp.int32(len(prompt) - 1), jnp.int32(len(agreed))
    wide = _replay(target, width, params, tokens, start, length)
    narrow = _replay(one_token or target, other, params, tokens, start, length)
    size = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-30)  # rows of the prompt are not read
    difference = fetch(jnp.max(jnp.abs(wide - narrow), axis=-1) / size)[: len(agreed)]
    jumps = np.flatnonzero(difference > ROUNDING)
    router, top_k, two = fetch(_margins(target, params, tokens))
    if not len(jumps):
        return Parting(len(agreed) - 1, "top-two", float(two[len(agreed) - 1]))
    first = int(jumps[0])
    kind, margin = min(("router", router[first]), ("top-k", top_k[first]), key=lambda x: x[1])
    return Parting(first, kind, float(margin))


@partial(jax.jit, static_argnums=(0, 1))
def _replay(
    target: Target,
    width: int,
    params: Any,
    tokens: Int[Array, "1 T"],
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> Float[Array, "T D"]:
    """Final hidden states of rows `start` to `length`, read `width` at a time; zero elsewhere."""
    capacity = tokens.shape[1]
    order = jnp.arange(capacity)
    prepared = target.prepare(params)
    dtype = jnp.result_type(target.frozen(params).embed)
    cache = target.init_cache(1, capacity, dtype)
    cache, _ = target.extend(
        prepared, cache, Rows(tokens, jnp.where(order < start, order, capacity)[None])
    )

    def chunk(carry: Any, i: Any) -> tuple[Any, None]:
        cache, hidden = carry
        position = start + i * width + jnp.arange(width)
        position = jnp.where(position < length, position, capacity)
        rows = Rows(tokens[:, jnp.minimum(position, capacity - 1)], position[None])
        cache, states = target.extend(prepared, cache, rows)
        return (cache, hidden.at[position].set(states.final_hidden[0], mode="drop")), None

    nothing = jnp.zeros((capacity, target.config.hidden_size), dtype)
    chunks = jnp.arange(-(-capacity // width))
    return jax.lax.scan(chunk, (cache, nothing), chunks)[0][1]


@partial(jax.jit, static_argnums=0)
def _margins(target: Target, params: Any, tokens: Int[Array, "1 T"]) -> Any:
    """Per row: the closest router choice, the closest top-k choice, the two best logits' gap."""
    order = jnp.arange(tokens.shape[1])[None]
    states, choices = target.trace(params, tokens, jnp.ones_like(tokens), order)
    flat = [choice for unit in choices for choice in unit]
    routers = [_router_gap(c.routing, target) for c in flat if c.routing is not None]
    tops = [_top_k_gap(c.index_scores, target) for c in flat if c.index_scores is not None]
    best = jax.lax.top_k(target.unembed(params, states.final_hidden), 2)[0][0]
    none = jnp.full(tokens.shape[1], jnp.inf)
    closest = [jnp.min(jnp.stack([*gaps, none]), axis=0) for gaps in (routers, tops)]
    return *closest, best[:, 0] - best[:, 1]


def _router_gap(routing: Any, target: Target) -> Float[Array, "T"]:
    k = target.config.num_experts_per_tok
    ranked = jax.lax.top_k(routing.biased, k + 1)[0]
    return _smallest_per_row(ranked[..., k - 1] - ranked[..., k])


def _top_k_gap(scores: Any, target: Target) -> Float[Array, "T"]:
    k, width = target.config.index_topk, scores.shape[-1]
    if width <= k:
        return jnp.full(width, jnp.inf)
    order = jnp.arange(width)
    causal = jnp.where(order <= order[:, None], scores, -jnp.inf)
    ranked = jax.lax.top_k(causal, k + 1)[0]
    gap = ranked[..., k - 1] - ranked[..., k]
    return _smallest_per_row(jnp.where(order >= k, gap, jnp.inf))


def _smallest_per_row(gaps: Float[Array, "*layers T"]) -> Float[Array, "T"]:
    return jnp.min(gaps.reshape(-1, gaps.shape[-1]), axis=0)
