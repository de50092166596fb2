"""Verdicts on blocks under targets that forbid tokens, by formulas and by kernels alike."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import ops
from dspark_jax.acceptance import accept
from dspark_jax.types import Candidates, Proposal, Verdict

B, G, V = 64, 3, 40
TARGET_ID = jnp.arange(1, V, 3)
TEMPERATURE = jnp.asarray(np.resize([1.0, 0.0, 0.01, 2.0], B), jnp.float32)


@pytest.fixture(params=["reference", "pallas"], autouse=True)
def choice(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.using(request.param):
        yield request.param


def proposal(candidates: bool, certain: bool) -> Proposal:
    """Blocks of any tokens; every other was drawn from single tokens where some are `certain`."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((B, G, len(TARGET_ID))), jnp.float32)
    drawn = jnp.asarray(rng.integers(len(TARGET_ID), size=(B, G)))
    made = Candidates(*jax.lax.top_k(logits, len(TARGET_ID))[::-1]) if candidates else logits
    single = jnp.arange(B) % 2 == 0 if certain else None
    return Proposal(TARGET_ID[drawn], made, jnp.zeros((B, G)), single)


def masked(allowed: int, seed: int = 1) -> tuple[jax.Array, np.ndarray]:
    """Logits of which all but `allowed` of a row are -inf, and which those are."""
    rng = np.random.default_rng(seed)
    rank = rng.random((B, G + 1, V)).argsort(axis=-1).argsort(axis=-1)
    logits = np.where(rank < allowed, rng.standard_normal(rank.shape), -np.inf)
    return jnp.asarray(logits, jnp.float32), rank < allowed


def verdicts(given: Proposal, logits: jax.Array, key: jax.Array) -> Verdict:
    keys, lengths = jax.random.split(key, B), jnp.arange(B) % (G + 1)
    # A function of its own: what was traced before a test changed something is not used again.
    judge = jax.jit(lambda *given: accept(*given))
    return judge(given, logits, TARGET_ID, lengths, TEMPERATURE, keys)


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("allowed", [1, 5])
def test_forbidden_tokens_are_neither_kept_nor_added(allowed: int, candidates: bool):
    logits, may = masked(allowed)
    given = proposal(candidates, certain=True)
    for key in jax.random.split(jax.random.key(3), 5):
        check_allowed(given, verdicts(given, logits, key), may)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2.0**-23])
def test_no_draw_is_so_low_or_high_that_it_keeps_a_forbidden_token(
    drawn: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax.random, "uniform", lambda _, shape: jnp.full(shape, drawn))
    (logits, may), given = masked(5), proposal(candidates=False, certain=True)
    check_allowed(given, verdicts(given, logits, jax.random.key(4)), may)


def check_allowed(given: Proposal, verdict: Verdict, may: np.ndarray) -> None:
    accepted, every = np.asarray(verdict.accepted), np.arange(B)
    assert may[every, accepted, np.asarray(verdict.bonus)].all()
    kept = np.arange(G) < accepted[:, None]
    own = np.take_along_axis(may[:, :-1], np.asarray(given.tokens)[..., None], axis=-1)[..., 0]
    assert own[kept].all()


def test_all_candidates_are_judged_as_the_whole_vocabulary():
    logits, kept = masked(V)[0], 0
    for key in jax.random.split(jax.random.key(5), 8):
        ours, theirs = (verdicts(proposal(c, certain=False), logits, key) for c in (True, False))
        assert np.array_equal(ours.accepted, theirs.accepted)
        assert np.array_equal(ours.bonus, theirs.bonus)
        kept += int(ours.accepted.sum())
    assert kept > 50, "little was kept, so little was compared"


def test_a_token_drawn_alone_is_kept_with_the_targets_chance_and_never_added_again():
    """A point mass: p(x) of acceptance, and x is left out of what a refusal emits."""
    logits, sampling = masked(V)[0], np.asarray(TEMPERATURE) == 1
    given = proposal(candidates=False, certain=True)._replace(certain=jnp.ones(B, bool))
    p = np.asarray(jax.nn.softmax(logits[:, 0]))[np.arange(B), np.asarray(given.tokens[:, 0])]
    often, rounds = np.zeros(B), 200
    run = jax.jit(accept)
    for key in jax.random.split(jax.random.key(6), rounds):
        keys = jax.random.split(key, B)
        verdict = run(given, logits, TARGET_ID, jnp.ones(B, jnp.int32), TEMPERATURE, keys)
        refused = np.asarray(verdict.accepted) == 0
        often += ~refused
        again = np.asarray(verdict.bonus) == np.asarray(given.tokens[:, 0])
        assert not np.any(again & refused & sampling)
    expected, seen = rounds * p[sampling].sum(), often[sampling].sum()
    deviation = np.sqrt((rounds * p * (1 - p))[sampling].sum())
    assert abs(seen - expected) < 4.5 * deviation
