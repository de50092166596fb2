"""An estimate finds what drafts are worth, whatever it is shown, and a head's word is divided."""

import numpy as np
import pytest

from dspark_jax.calibrate import sigmoid
from dspark_jax.serve.rating import INTERCEPT, LATEST, REFIT_EVERY, SLOPE, Estimator, Head, fit

G = 3


def shown(estimator: Estimator, blocks: int, slope: float, intercept: np.ndarray) -> None:
    """Blocks whose drafts are accepted as a logistic model says, all of them verified."""
    rng = np.random.default_rng(0)
    for odds in rng.normal(1, 2, (blocks, G)):
        kept = rng.random(G) < sigmoid(slope * odds + intercept)
        estimator.learn(odds, int(np.cumprod(kept).sum()), G)


def test_the_model_that_made_the_blocks_is_found():
    estimator, intercept = Estimator(G), np.array([1.0, 0.0, -1.0])
    shown(estimator, 3000, 0.9, intercept)
    np.testing.assert_allclose(estimator.slope, 0.9, atol=0.12)
    np.testing.assert_allclose(estimator.intercept, intercept, atol=0.25)


def test_little_is_believed_little_and_nothing_not_at_all():
    estimator = Estimator(G)
    for _ in range(REFIT_EVERY - 1):
        estimator.learn(np.zeros(G), 0, G)
    assert np.all(estimator.intercept == INTERCEPT)
    estimator.learn(np.zeros(G), 0, G)
    after = estimator.intercept
    assert -5 < after[0] < INTERCEPT - 1 and np.all(after[1:] == INTERCEPT)
    estimator = Estimator(G)
    for _ in range(2 * REFIT_EVERY):
        estimator.learn(np.zeros(G), 0, 0)
    assert np.all(estimator.slope == SLOPE) and np.all(estimator.intercept == INTERCEPT)


def test_what_is_not_a_number_teaches_nothing():
    estimator = Estimator(G)
    for _ in range(2 * REFIT_EVERY):
        estimator.learn(np.array([np.nan, 1.0, 1.0]), G, G)
    assert np.all(np.isfinite(estimator.slope)) and estimator.intercept[0] == INTERCEPT
    assert estimator.intercept[1] > INTERCEPT


def test_what_was_long_ago_is_forgotten():
    estimator = Estimator(1)
    for kept in (0, 1):
        for _ in range(LATEST):
            estimator.learn(np.zeros(1), kept, 1)
    assert sigmoid(estimator.intercept)[0] > 0.97


@pytest.mark.parametrize("accepted", [0.0, 1.0])
@pytest.mark.parametrize("odds", [-40.0, 0.0, 40.0])
def test_drafts_that_are_all_alike_give_finite_numbers(odds: float, accepted: float):
    slope, intercept = fit(np.zeros(50, int), np.full(50, odds), np.full(50, accepted) > 0, G)
    chance = sigmoid(slope * odds + intercept)[0]
    assert np.all(np.isfinite(intercept)) and abs(chance - accepted) < 0.1


def test_drafts_that_can_be_told_apart_give_finite_numbers():
    odds = np.linspace(-40, 40, 101)
    slope, intercept = fit(np.arange(101) % G, odds, odds > 0, G)
    assert np.all(np.isfinite(intercept)) and 0 < slope < 100


def test_the_fit_is_the_least_of_its_loss():
    rng = np.random.default_rng(1)
    slot, odds = rng.integers(0, G, 200), rng.normal(0, 3, 200)
    accepted = rng.random(200) < 0.5
    slope, intercept = fit(slot, odds, accepted, G)
    found = np.array([slope, *intercept])

    def loss(theta: np.ndarray) -> float:
        chance = 1 / (1 + np.exp(-(theta[0] * odds + theta[1:][slot])))
        start = np.array([SLOPE, *[INTERCEPT] * G])
        apart = -np.log(np.where(accepted, chance, 1 - chance)).mean()
        return float(apart + 0.0005 * np.sum((theta - start) ** 2))

    for _ in range(100):
        assert loss(found) < loss(found + rng.normal(0, 0.05, G + 1))


def test_a_heads_word_is_divided_by_its_temperatures():
    head = Head(np.array([2.0, 0.5]))
    head.learn(np.zeros(2), 0, 2)
    assert head.slope.tolist() == [0.5, 2.0] and head.intercept.tolist() == [0, 0]
