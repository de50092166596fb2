"""Temperatures repair confidences that are wrong, and leave those alone that are right."""

import numpy as np
import pytest

from dspark_jax import calibrate
from dspark_jax.calibrate import Rounds

G, N = 4, 10_000


def drawn(temperatures: tuple[float, ...], rounds: int = N, seed: int = 0) -> Rounds:
    """Rounds whose drafts are accepted as sigmoid(z / T) says, but speak of z."""
    rng = np.random.default_rng(seed)
    confidence = rng.normal(1.5, 1.5, (rounds, G))
    accepts = rng.random((rounds, G)) < calibrate.sigmoid(confidence / np.array(temperatures))
    accepted = np.cumprod(accepts, axis=1).sum(axis=1)
    return Rounds(confidence, accepted, np.arange(rounds) // 20)


@pytest.mark.parametrize(
    "temperatures", [(2.0,) * G, (0.5, 0.5, 0.5, 0.5), (1.0, 3.0, 0.6, 1.5)], ids=str
)
def test_the_temperatures_that_spoiled_confidences_are_found(temperatures: tuple[float, ...]):
    found = calibrate.calibrate(drawn(temperatures))
    assert found.after.mean() < 0.35 * found.before.mean() and found.rounds == N
    assert np.all(found.after < 0.02)
    np.testing.assert_allclose(found.temperatures[:2], temperatures[:2], rtol=0.25)


def test_confidences_that_come_true_stay_as_they_are():
    found = calibrate.calibrate(drawn((1.0,) * G))
    assert np.all(found.before < 0.015) and np.all(found.after <= found.before + 0.003)
    assert np.array_equal(found.temperatures, np.ones(G))


def test_what_does_not_help_elsewhere_is_not_taken():
    """Few rounds, whose errors are chance: temperatures of 1 unless both halves gain."""
    kept = [calibrate.calibrate(drawn((1.0,) * G, 30, seed)) for seed in range(20)]
    left = [bool(np.all(c.temperatures == 1)) for c in kept]
    assert sum(left) > 5
    for untouched, c in zip(left, kept, strict=True):
        assert np.array_equal(c.before, c.after) if untouched else c.after.mean() < c.before.mean()


def test_every_temperature_is_the_mildest_of_those_as_good_as_the_best():
    rounds = drawn((2.0, 0.6, 1.0, 1.0), 3000)
    found = calibrate.fit(rounds.confidence, rounds.accepted)
    for k in range(G):
        before = np.prod(1 / (1 + np.exp(-rounds.confidence[:, :k] / found[:k])), axis=1)
        tried = []
        for t in calibrate.GRID:
            product = before / (1 + np.exp(-rounds.confidence[:, k] / t))
            sure = np.sqrt(np.sum(product * (1 - product))) / 3000
            tried.append((by_loop(product, rounds.accepted > k), sure, abs(np.log(t)), t))
        best, sure, _, _ = min(tried)
        as_good = [(far, t) for error, _, far, t in tried if error <= best + sure]
        assert min(as_good)[0] == pytest.approx(abs(np.log(found[k])))


def by_loop(predicted: np.ndarray, came_true: np.ndarray) -> float:
    """The definition: bins of equal width, the last one closed."""
    total, width = 0.0, 1 / calibrate.BINS
    for b in range(calibrate.BINS):
        last = b == calibrate.BINS - 1
        inside = (predicted >= b * width) & ((predicted < (b + 1) * width) | last)
        if inside.any():
            gap = abs(predicted[inside].mean() - came_true[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_what_its_definition_says(seed: int):
    rng = np.random.default_rng(seed)
    predicted, came_true = rng.random(400), rng.random(400) < 0.4
    predicted[:2] = 0, 1
    assert calibrate.error(predicted, came_true) == pytest.approx(by_loop(predicted, came_true))


def test_no_rounds_leave_everything_as_it_is():
    nothing = Rounds(np.zeros((0, G)), np.zeros(0, int), np.zeros(0, int))
    assert np.array_equal(calibrate.calibrate(nothing).temperatures, np.ones(G))


def test_certain_drafts_are_numbers_too():
    odds = np.array([[np.inf, -np.inf, 500.0, -500.0]] * 4)
    certain = Rounds(odds, np.ones(4, int), np.arange(4))
    assert np.all(np.isfinite(calibrate.calibrate(certain).before))
