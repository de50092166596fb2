"""Confidences that come true: sequential temperature scaling, and how far off they are.

What is verified is chosen by survival, the product of a block's confidences up to a draft, so the
product is what is calibrated, position by position (paper §3.2.2). Host arithmetic, once per draft.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

BINS = 15
GRID = 2.0 ** np.array(sorted(np.arange(-60, 61) / 20, key=abs))
"""Temperatures tried, the mildest first: from 1 outwards to 1/8 and 8."""


class Rounds(NamedTuple):
    """What drafts said of themselves and what became of them, where all of a block was verified.

    `confidence` is before the sigmoid; `prompt` says which answer a round belongs to.
    """

    confidence: Float[np.ndarray, "n G"]
    accepted: Int[np.ndarray, "n"]
    prompt: Int[np.ndarray, "n"]


class Calibration(NamedTuple):
    """Temperatures, and the error of every position's survival without them and with them."""

    temperatures: Float[np.ndarray, "G"]
    before: Float[np.ndarray, "G"]
    after: Float[np.ndarray, "G"]
    rounds: int


def calibrate(rounds: Rounds) -> Calibration:
    """Temperatures fitted to all rounds; `after` is of rounds that they were not fitted to.

    It is measured on either half of the prompts with what the other half gives. Where that is no
    better than nothing, every temperature is 1.
    """
    G = rounds.confidence.shape[1]
    survived = survivals(rounds.accepted, G)
    before = errors(survival(rounds.confidence, np.ones(G)), survived)
    held_out, half = np.zeros(survived.shape), rounds.prompt % 2 == 1
    for mine in (half, ~half):
        fitted = fit(rounds.confidence[~mine], rounds.accepted[~mine])
        held_out[mine] = survival(rounds.confidence[mine], fitted)
    after = errors(held_out, survived)
    if not after.mean() < before.mean():
        return Calibration(np.ones(G), before, before, len(survived))
    fitted = fit(rounds.confidence, rounds.accepted)
    return Calibration(fitted, before, after, len(survived))


def fit(
    confidence: Float[np.ndarray, "n G"], accepted: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "G"]:
    """Sequential temperature scaling: T_k minimises the error of `Π_{i<=k} sigmoid(z_i / T_i)`.

    Earlier temperatures stay as they were found. Where so many rounds cannot tell a milder one from
    the best, it is taken: else those of late positions, which few drafts reach, would be chance.
    """
    survived = survivals(accepted, confidence.shape[1])
    temperatures, before = [], np.ones(len(accepted))
    for k in range(confidence.shape[1]):
        products = before * sigmoid(confidence[:, k] / GRID[:, None])
        found = np.array([error(product, survived[:, k]) for product in products])
        near = found <= found.min() + uncertainty(products[found.argmin()])
        mildest = int(near.argmax())
        temperatures.append(GRID[mildest])
        before = products[mildest]
    return np.array(temperatures)


def survival(
    confidence: Float[np.ndarray, "n G"], temperatures: Float[np.ndarray, "G"]
) -> Float[np.ndarray, "n G"]:
    """The chance that a draft and all before it are accepted, as the draft has it."""
    return np.cumprod(sigmoid(confidence / temperatures), axis=1)


def survivals(accepted: Int[np.ndarray, "n"], draft_length: int) -> Bool[np.ndarray, "n G"]:
    """Whether a draft was accepted."""
    return np.arange(draft_length) < accepted[:, None]


def errors(
    predicted: Float[np.ndarray, "n G"], survived: Bool[np.ndarray, "n G"]
) -> Float[np.ndarray, "G"]:
    """`error` of every position."""
    return np.array([error(p, s) for p, s in zip(predicted.T, survived.T, strict=True)])


def error(predicted: Float[np.ndarray, "n"], came_true: Bool[np.ndarray, "n"]) -> float:
    """Expected calibration error: over bins of equal width, |mean predicted - share come true|.

    Bins count by what they hold; 0 where there is nothing.
    """
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    off = np.bincount(place, predicted - came_true, BINS)
    return float(np.abs(off).sum() / max(len(predicted), 1))


def uncertainty(predicted: Float[np.ndarray, "n"]) -> float:
    """Standard error of the share that comes true, if each does with the chance predicted."""
    return float(np.sqrt(np.sum(predicted * (1 - predicted))) / max(len(predicted), 1))


def sigmoid(x: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """1 / (1 + exp(-x)), which no x overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))
