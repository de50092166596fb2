"""What is done to a server's pages between rounds: drafts catch up, spoiled rows become zeros."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dspark_jax.loop import Weights
from dspark_jax.paged_loop import BEYOND, HELD, SlotState
from dspark_jax.types import Draft, Target


class Behind(NamedTuple):
    """N sequences whose last `rows` the draft has not heard; a slot beyond the last is nobody."""

    slot: Int[Array, "N"]
    rows: Int[Array, "N"]
    pages: Int[Array, "N P"]


def catch_up(
    target: Target, draft: Draft, weights: Weights, state: SlotState, behind: Behind
) -> SlotState:
    """The draft's context takes the rows that plain rounds have held."""
    slot = jnp.minimum(behind.slot, len(state.length) - 1)
    end = state.length[slot][:, None]
    begin = end - behind.rows[:, None]
    position = begin + (jnp.arange(HELD) - begin) % HELD
    real = (position < end) & (behind.slot < len(state.length))[:, None]
    given = (state.held[slot], jnp.where(real, position, BEYOND), behind.pages)
    draft_cache = draft.extend_context(weights.draft, state.draft_cache, *given)
    return state._replace(draft_cache=draft_cache)


def page_axes(init_cache: Any) -> Any:
    """Along which axis the pages of a cache's arrays lie: 1 where layers are stacked, else 0."""
    few, more = (jax.eval_shape(lambda n=n: init_cache(n, 1)) for n in (2, 3))

    def differing(x: Any, y: Any) -> int:
        return next(i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)

    return jax.tree.map(differing, few, more)


def scrub(target: Target, draft: Draft, state: SlotState, pages: Int[Array, "P"]) -> SlotState:
    """Zeros in some pages: what is not a number must not stay where another sequence will read.

    Masked rows weigh nothing, but nothing times what is not a number is not a number.
    """

    def zero(x: Array, axis: int) -> Array:
        return x.at[(slice(None),) * axis + (pages,)].set(0, mode="drop")

    return state._replace(
        target_cache=jax.tree.map(zero, state.target_cache, page_axes(target.init_cache)),
        draft_cache=jax.tree.map(zero, state.draft_cache, page_axes(draft.init_cache)),
    )
