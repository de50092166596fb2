"""Edits and truncation give what numpy gives step by step, row by row, in vLLM's order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dspark_jax.truncation import Edits, Truncation, edit, truncate

N, S, V = 3, 2, 37
CLOSE = 1e-5
"""Nearer than this to a bound, rounding decides."""
# Few distinct values, so that ties are common.
TIED = arrays.arrays(np.float32, (N, S, V), elements=st.integers(-6, 6).map(lambda x: x / 2))


def random_logits(seed: int) -> np.ndarray:
    """Some of them of tokens that edits have made impossible."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(N, S, V)).astype(np.float32)
    return np.where(rng.random((N, S, V)) < 0.2, np.float32(-np.inf), logits)


RANDOM = st.integers(0, 2**32 - 1).map(random_logits)


def per_row(elements: Any, dtype: Any = np.float32) -> Any:
    return arrays.arrays(dtype, N, elements=elements)


TEMPERATURE = per_row(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.8]))
MIN_P = per_row(st.just(0.0) | st.floats(2.0**-10, 1, width=32))
TOP_K = per_row(st.integers(0, V + 3), np.int32)
TOP_P = per_row(st.just(1.0) | st.floats(0.015625, 1, width=32))

truncated = jax.jit(truncate)
edited = jax.jit(edit)


def softmax(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def kept(
    logits: np.ndarray, temperature: Any, min_p: Any, top_k: Any, top_p: Any
) -> tuple[np.ndarray, bool]:
    """Which tokens of one row may be drawn, and whether no bound is so close that rounding decides.

    Of tokens equal to the last one kept all are kept.
    """
    left, clear = logits.astype(float) / temperature, True
    if min_p > 0:
        share = softmax(left) / softmax(left).max()
        # The likeliest is 1 without rounding.
        clear &= not np.any((np.abs(share / min_p - 1) < CLOSE) & (share < 1))
        left = np.where((share >= min_p) | (share == 1), left, -np.inf)
    if 0 < top_k < len(left):
        left = np.where(left >= np.sort(left)[-top_k], left, -np.inf)
    if top_p < 1:
        order = np.argsort(-left, kind="stable")
        before = np.concatenate([[0], np.cumsum(softmax(left)[order])[:-1]])
        clear &= not np.any(np.abs(before - top_p) < CLOSE)
        left = np.where(left >= left[order[before < top_p]].min(), left, -np.inf)
    return np.isfinite(left), clear


@settings(deadline=None, max_examples=100)
@given(TIED | RANDOM, TEMPERATURE, MIN_P, TOP_K, TOP_P)
def test_tokens_left_are_those_of_numpy(
    logits: np.ndarray,
    temperature: np.ndarray,
    min_p: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
):
    wanted = logits.copy()
    for n, s in np.ndindex(N, S):
        if temperature[n]:
            asked = (temperature[n], min_p[n], top_k[n], top_p[n])
            left, clear = kept(logits[n, s], *asked)
            assume(clear)
            wanted[n, s, ~left] = -np.inf
    given_ = Truncation(*map(jnp.asarray, (min_p, top_k, top_p)))
    assert np.array_equal(truncated(logits, temperature, given_), wanted)


def settings_of(*rows: tuple[float, int, float]) -> Truncation:
    min_p, top_k, top_p = (jnp.asarray(x) for x in zip(*rows, strict=True))
    return Truncation(jnp.float32(min_p), jnp.int32(top_k), jnp.float32(top_p))


def test_known_rows():
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]] * 5, np.float32))[:, None]
    asked = settings_of((0, 2, 1), (0, 0, 0.7), (0.25, 0, 1), (0, 3, 0.8), (0.25, 2, 0.3))
    left = np.isfinite(truncated(logits, np.ones(5, np.float32), asked))[:, 0]
    # The fourth: of three kept tokens the first two have 0.833 of what is left, enough for 0.8.
    assert left.sum(axis=1).tolist() == [2, 2, 3, 2, 1]


def test_min_p_is_judged_at_the_temperature():
    logits = np.log(np.array([[0.64, 0.32, 0.04]] * 2, np.float32))[:, None]
    asked = settings_of((0.4, 0, 1), (0.4, 0, 1))
    left = np.isfinite(truncated(logits, np.array([1.0, 0.5], np.float32), asked))
    assert left[:, 0].sum(axis=1).tolist() == [2, 1]


@pytest.mark.parametrize("size", [V, 40_000])
def test_a_row_that_asks_for_nothing_keeps_everything_whatever_others_ask(size: int):
    """Also where the probabilities' running sum reaches 1 before the last token by rounding."""
    logits = 4 * np.random.default_rng(0).normal(size=(4, 1, size)).astype(np.float32)
    asked = settings_of((0, 0, 1), (0, 5, 1), (0, 0, 0.5), (0, 0, 1))
    found = truncated(logits, np.array([1, 1, 1, 0.2], np.float32), asked)
    assert np.array_equal(found[jnp.array([0, 3])], logits[[0, 3]])
    assert np.isfinite(found[1]).sum() == 5


def test_a_greedy_row_is_left_alone_whatever_it_and_others_ask():
    logits = np.random.default_rng(0).normal(size=(2, 3, V)).astype(np.float32)
    asked = settings_of((0.5, 2, 0.5), (0.5, 2, 0.5))
    for other in (0.0, 1.0):
        found = truncated(logits, np.array([0, other], np.float32), asked)
        assert np.array_equal(found[0], logits[0])


EDITS = st.builds(np.random.default_rng, st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=100)
@given(TIED | RANDOM, EDITS)
def test_edits_are_made_in_order(logits: np.ndarray, rng: np.random.Generator):
    allowed = rng.random((N, V)) < 0.7
    bias = np.where(rng.random((N, V)) < 0.3, rng.normal(size=(N, V)) * 5, 0).astype(np.float32)
    bias[rng.random((N, V)) < 0.05] = -np.inf
    seen, repetition = rng.random((N, V)) < 0.4, rng.choice([0.5, 1.0, 1.3, 2.0], N)
    penalty = (rng.integers(-2, 3, (N, V)) / 4).astype(np.float32)
    words = np.zeros((N, -(-V // 32)), np.uint32)
    for n, v in np.argwhere(allowed):
        words[n, v // 32] |= np.uint32(1 << (v % 32))
    given_: Any = (words, bias, seen, repetition.astype(np.float32), penalty)
    found = np.asarray(edited(logits[:, 0], Edits(*given_)))
    for n, v in np.ndindex(N, V):
        wanted = float(logits[n, 0, v]) if allowed[n, v] else -np.inf
        wanted += float(bias[n, v])
        if seen[n, v]:
            wanted = wanted / repetition[n] if wanted > 0 else wanted * repetition[n]
        wanted -= float(penalty[n, v])
        assert found[n, v] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_edits_that_change_nothing_change_no_bit():
    logits = np.random.default_rng(0).normal(size=(N, V)).astype(np.float32)
    nothing: Any = (
        np.full((N, 2), 0xFFFFFFFF, np.uint32),
        np.zeros((N, V), np.float32),
        np.zeros((N, V), bool),
        np.ones(N, np.float32),
        np.zeros((N, V), np.float32),
    )
    assert np.array_equal(edited(logits, Edits(*nothing)), logits)
