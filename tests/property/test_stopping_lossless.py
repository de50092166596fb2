"""Algorithm 1 emits what the target alone would emit, as it stops before what it may not know.

As `test_serving_lossless`, with thousands of servers of two sequences each, so that what one round
verifies hangs on a few confidences of its very blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from dspark_jax import paged_loop
from dspark_jax.draft import dspark_draft
from dspark_jax.paged_loop import Control, init_slots, prefill_pages, stopping_round
from dspark_jax.schedule import survivals
from dspark_jax.truncation import Truncation
from dspark_jax.types import Rows
from tests.property.test_lossless import FALSE_ALARM, FIRST, PROMPT, exact, first_tokens, p_value
from tests.property.test_serving_lossless import (
    NOTICED,
    OWNED,
    PAGE,
    VANILLA,
    G,
    paged_target,
    random_weights,
    telling,
    told_weights,
)

SERVERS, N = 4000, 2
BUDGETS = (N, 2 * N, (G + 1) * N)
RISING = np.array([1, 1, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.25], np.float32)
"""Seconds by verified rows, of which two hold no draft."""
HUMP = np.array([1, 1, 1, 9, 9, 9, 9, 9, 2.1], np.float32)
"""A few drafts are dear and all of them are not: whoever looks past the hump may want them."""
KNOWING = (0.99, 0.02, 0.99, 0.9, 0.02, 0.02)
"""Confidences by the token before: that of a slot tells which token the one before it drafted. The
first anchor, 3, promises something whatever follows."""


def control_of(keys: Array, seconds: np.ndarray) -> Control:
    ones = jnp.ones(N)
    return Control(
        slot=jnp.arange(N),
        fresh=jnp.ones(N, bool),
        anchor=jnp.full(N, PROMPT[-1]),
        length=jnp.full(N, len(PROMPT) - 1),
        pages=1 + jnp.arange(N * OWNED).reshape(N, OWNED),
        cap=jnp.full(N, G),
        key=jax.random.key_data(keys),
        temperature=ones,
        draft_temperature=ones,
        slope=jnp.ones((N, G)),
        intercept=jnp.zeros((N, G)),
        truncation=Truncation(0 * ones, jnp.zeros(N, jnp.int32), ones),
        seconds=jnp.asarray(seconds),
    )


def player() -> Callable[..., Any]:
    """A compiled function that serves FIRST rounds on every server."""
    target, draft = paged_target(), telling(dspark_draft(VANILLA))

    def play(weights: Any, keys: Array, seconds: np.ndarray) -> Any:
        control = control_of(keys, seconds)
        state = init_slots(target, draft, N, 1 + N * OWNED, PAGE, jnp.float32)
        tokens = jnp.tile(jnp.asarray(PROMPT[:-1]), (N, 1))
        rows = Rows(tokens, jnp.tile(jnp.arange(tokens.shape[1]), (N, 1)), control.pages)
        state = prefill_pages(target, draft, weights, state, rows)

        def round_(state: Any, number: Array) -> Any:
            now = control._replace(fresh=control.fresh & (number == 0))
            given = (target, draft, weights, state, now, None)
            state, result = stopping_round(*given, BUDGETS)
            return state, (result.tokens, result.accepted + 1, result.verified)

        _, emitted = jax.lax.scan(round_, state, jnp.arange(FIRST))
        return tuple(jnp.moveaxis(x, 0, 1) for x in emitted)

    return jax.jit(jax.vmap(play, in_axes=(None, 0, None)))


def serve(
    play: Callable[..., Any], weights: Any, seconds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of every sequence, and how many drafts every round verified."""
    keys = jax.random.split(jax.random.key(3), (SERVERS, N))
    tokens, count, verified = play(weights, keys, seconds)
    emitted = (x.reshape(SERVERS * N, *x.shape[2:]) for x in (tokens, count))
    return first_tokens(*emitted), np.asarray(verified).sum(axis=1)


def test_first_tokens_are_the_targets_whatever_rounds_take():
    play, expected = player(), exact(random_weights().target)
    for seconds in (RISING, HUMP):
        drawn, verified = serve(play, told_weights(random_weights(), before=KNOWING), seconds)
        assert p_value(drawn, expected) > FALSE_ALARM
        assert set(np.unique(verified)) <= {0, N, G * N}
        # Of drafts that are cheap at first every round takes some, and how many depends on them.
        shares = [np.mean(verified == size) for size in (N, G * N)]
        assert min(shares) > 0.05 if seconds is RISING else verified.max() == 0


@pytest.mark.slow
def test_a_scheduler_that_does_not_stop_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Appendix A: the most promising number of all is wanted or not by what was drafted."""

    def unconstrained(chance: Array, cap: Array, active: Array, seconds: Array) -> Array:
        survival = jnp.maximum(-jnp.sort(-survivals(chance, cap).ravel()), 0)
        promised = active + jnp.concatenate([jnp.zeros(1), jnp.cumsum(survival)])
        rate = promised / seconds[active + jnp.arange(len(promised))]
        return jnp.argmax(rate).astype(jnp.int32)

    monkeypatch.setattr(paged_loop, "worth_verifying", unconstrained)
    weights = told_weights(random_weights(), before=KNOWING)
    drawn, verified = serve(player(), weights, HUMP)
    assert p_value(drawn, exact(random_weights().target)) < NOTICED
    assert 0 < np.mean(verified == 0) < 1
