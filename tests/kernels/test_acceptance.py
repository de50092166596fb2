"""Every pass over a vocabulary that rejection sampling makes, over the same odd shapes.

Tolerance: statistics are float32 sums over the vocabulary of what exp gives, 2^-17 of a logarithm.
A probability is off by 2^-18 of itself, so p - q by 2^-18 of p + q: what is drawn must have the
largest sum of logarithm and noise within that and 2^-18 of the noise, and be the definition's own
draw where no other could have the largest.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.acceptance import reference, tpu
from dspark_jax.pallas_kernels.markov.reference import hashed_gumbel
from dspark_jax.sampling import largest
from tests.kernels.races import interpreted, race_found


class Case(NamedTuple):
    """Sequences, rows of each, vocabulary, the draft's, the logits' type."""

    B: int
    S: int
    V: int
    Vd: int
    dtype: Any


CASES = [
    Case(1, 1, 4096, 4096, jnp.float32),
    Case(3, 8, 4200, 4200, jnp.float32),  # no multiple of the tile
    Case(5, 3, 777, 500, jnp.float32),  # one tile, a reduced vocabulary
    Case(11, 9, 2049, 2049, jnp.bfloat16),  # one entry in the last tile, two tiles of sequences
    Case(16, 5, 300, 300, jnp.float32),  # slots that do not fill groups of eight rows
    Case(70, 2, 600, 70, jnp.float32),  # more sequences than a tile has
]
IMPLEMENTATIONS = ("reference", "tpu")
NAMES = pytest.mark.parametrize("name", IMPLEMENTATIONS)
SHAPES = pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[:4])))


def implementation(name: str, operation: str) -> Callable[..., Any]:
    if name == "reference":
        return jax.jit(getattr(reference, operation))

    def interpreted_kernel(*arguments: Any) -> Any:
        y = getattr(tpu, operation)(*arguments, interpret=interpreted())
        jax.block_until_ready(y)
        assert not race_found()
        return y

    return interpreted_kernel


class Rows(NamedTuple):
    """What a case's two operations take."""

    logits: jax.Array
    tokens: jax.Array
    temperature: jax.Array
    q_logits: jax.Array
    refused: jax.Array
    words: jax.Array
    target_id: jax.Array | None


@functools.cache
def rows(case: Case) -> Rows:
    """Temperatures from 0 to 2, impossible tokens, tokens that are none, p like q and unlike it."""
    rng = np.random.default_rng(case.B)
    B, S, V, Vd, dtype = case
    logits = 4 * rng.standard_normal((B, S, V))
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    tokens = rng.integers(V, size=(B, S))
    tokens[:, -1] = -1
    ids = np.sort(rng.choice(V, Vd, replace=False))
    q = logits[:, 0, ids] + rng.standard_normal((B, Vd)) * (rng.random((B, 1)) < 0.7)
    return Rows(
        jnp.asarray(logits, dtype),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(np.resize([0.7, 0.0, 1.0, 2.0], B), jnp.float32),
        jnp.asarray(q, dtype),
        jnp.asarray(np.resize([True, True, False], B)),
        jnp.asarray(rng.integers(2**32, size=(B, 2)), jnp.uint32),
        None if V == Vd else jnp.asarray(ids, jnp.int32),
    )


def scaled(logits: Any, temperature: Any) -> np.ndarray:
    """Logits over temperature in float64, over 1 at temperature 0."""
    scale = np.where(temperature == 0, 1.0, np.asarray(temperature, np.float64))
    return np.asarray(logits, np.float64) / scale.reshape(-1, *[1] * (logits.ndim - 1))


def log_sum(x: np.ndarray) -> np.ndarray:
    peak = x.max(axis=-1, keepdims=True)
    return (peak + np.log(np.exp(x - peak).sum(axis=-1, keepdims=True)))[..., 0]


@SHAPES
@NAMES
def test_a_row_knows_its_best_entry_and_its_tokens_probability(name: str, case: Case):
    given = rows(case)
    found = implementation(name, "row_statistics")(*given[:3])
    exact = scaled(given.logits, given.temperature)
    lse, tokens = log_sum(exact), np.asarray(given.tokens)
    assert np.array_equal(found.best, largest(given.logits))
    assert np.all(np.abs(found.lse - lse) <= 2.0**-17)
    own = np.take_along_axis(exact, tokens.clip(0)[..., None], axis=-1)[..., 0] - lse
    possible = (tokens >= 0) & np.isfinite(own)
    # A logit is rounded once when divided by the temperature.
    allowed = 2.0**-17 + 2.0**-23 * np.abs(np.where(possible, own, 0))
    log_p = np.asarray(found.log_p)
    assert np.all((np.abs(log_p - np.where(possible, own, 0)) <= allowed) | ~possible)
    assert np.all(log_p[~possible] < -1e29) and np.any(possible) == (case.S > 1)


def sums(given: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most that every entry's sum of logarithm and noise may come to."""
    V = given.logits.shape[-1]
    q_logits = np.asarray(reference.in_target(given.q_logits, given.target_id, V))
    p, q = (scaled(x, given.temperature) for x in (given.logits[:, 0], q_logits))
    p, q = np.exp(p - log_sum(p)[:, None]), np.exp(q - log_sum(q)[:, None])
    noise = np.asarray(
        hashed_gumbel(given.words[:, :1], given.words[:, 1:], jnp.arange(V, dtype=jnp.uint32))
    ).astype(np.float64)
    left = p - q
    use = np.asarray(given.refused & (given.temperature > 0)) & np.any(left > 0, axis=-1)
    weight = np.where(use[:, None], np.maximum(left, 0), p)
    off = 2.0**-18 * np.where(use[:, None], p + q, p)
    greedy = np.asarray(given.temperature == 0)[:, None]
    noise, slack = np.where(greedy, 0, noise), np.where(greedy, 0, 2.0**-18 * np.abs(noise))
    with np.errstate(divide="ignore"):
        least = np.log(np.maximum(weight - off, 0)) + noise - slack
        return least, np.log(weight + off) + noise + slack


def draw(name: str, given: Rows) -> np.ndarray:
    """What an implementation draws for the first row of every sequence."""
    p_logits = given.logits[:, 0]
    lse = [jnp.asarray(log_sum(scaled(x, given.temperature)), jnp.float32)
           for x in (p_logits, given.q_logits)]  # fmt: skip
    run = implementation(name, "residual_draw")
    refused, words, temperature = given.refused, given.words, given.temperature
    return np.asarray(
        run(p_logits, given.q_logits, *lse, refused, words, temperature, given.target_id)
    )


@SHAPES
@NAMES
def test_a_draw_has_the_largest_sum_of_what_may_be_drawn(name: str, case: Case):
    given = rows(case)
    drawn, (least, most), every = draw(name, given), sums(given), np.arange(case.B)
    assert np.all(most[every, drawn] >= least.max(axis=1))
    winner = least.argmax(axis=1)
    rivals = np.where(np.arange(case.V) == winner[:, None], -np.inf, most)
    clear = least.max(axis=1) > rivals.max(axis=1)
    assert np.mean(clear) > 0.9
    assert np.array_equal(drawn[clear], winner[clear])


@NAMES
def test_where_nothing_is_left_the_draw_is_the_targets(name: str):
    given = rows(CASES[1])
    alike = given._replace(q_logits=given.logits[:, 0], refused=jnp.ones(3, bool))
    accepted = alike._replace(refused=jnp.zeros(3, bool))
    assert np.array_equal(draw(name, alike), draw(name, accepted))


@pytest.mark.parametrize("name", ["reference", pytest.param("tpu", marks=pytest.mark.slow)])
def test_judging_and_drawing_again_emits_what_the_target_would(name: str):
    """Leviathan's theorem over 6,000 sequences of one draft each: chi-square below its 99.99%."""
    B, V = 6000, 6
    rng = np.random.default_rng(5)
    p_logits, q_logits = rng.standard_normal(V), rng.standard_normal(V)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (p_logits, q_logits))
    tokens = rng.choice(V, B, p=q)
    refused = rng.random(B) >= (p / q)[tokens]
    given = Rows(
        jnp.broadcast_to(jnp.asarray(p_logits, jnp.float32), (B, 1, V)),
        jnp.asarray(tokens[:, None], jnp.int32),
        jnp.ones(B),
        jnp.broadcast_to(jnp.asarray(q_logits, jnp.float32), (B, V)),
        jnp.asarray(refused),
        jnp.asarray(rng.integers(2**32, size=(B, 2)), jnp.uint32),
        None,
    )
    emitted = np.where(refused, draw(name, given), tokens)
    expected = B * p
    assert np.sum((np.bincount(emitted, minlength=V) - expected) ** 2 / expected) < 25.7
    # And a draw that ignores the refusal would not.
    wrong = np.where(refused, draw(name, given._replace(refused=jnp.zeros(B, bool))), tokens)
    assert np.sum((np.bincount(wrong, minlength=V) - expected) ** 2 / expected) > 25.7


def test_a_row_ignores_its_neighbours():
    given = rows(CASES[1])
    spoilt = given._replace(
        logits=given.logits.at[:2].set(jnp.nan), q_logits=given.q_logits.at[:2].set(jnp.nan)
    )
    assert draw("tpu", given)[2] == draw("tpu", spoilt)[2]
    run = implementation("tpu", "row_statistics")
    for ours, theirs in zip(run(*given[:3]), run(*spoilt[:3]), strict=True):
        assert np.array_equal(ours[2], theirs[2])


def test_what_cannot_be_run_is_said():
    given = rows(CASES[2])
    p_logits = given.logits[:, 0]
    assert tpu.unsupported_row_statistics(*given[:3]) is None
    assert tpu.unsupported_residual_draw(p_logits, given.q_logits) is None
    for wrong in (
        tpu.unsupported_row_statistics(p_logits, *given[1:3]),
        tpu.unsupported_row_statistics(given.logits.astype(jnp.float16), *given[1:3]),
        tpu.unsupported_residual_draw(given.logits, given.q_logits),
        tpu.unsupported_residual_draw(p_logits, given.q_logits.astype(jnp.float16)),
    ):
        assert wrong is not None and wrong.endswith(".")


def test_a_pass_that_begins_with_nothing_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "clear", lambda *kept: None)
    given = rows(CASES[2])
    found = tpu.row_statistics(*given[:3], interpret=interpreted())
    lse = log_sum(scaled(given.logits, given.temperature))
    assert not np.all(np.abs(found.lse - lse) <= 2.0**-17)


def test_cores_that_share_a_row_are_a_race(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel", "parallel"))
    two = interpreted(num_cores_or_threads=2)
    jax.block_until_ready(tpu.row_statistics(*rows(CASES[1])[:3], interpret=two))
    assert race_found()
