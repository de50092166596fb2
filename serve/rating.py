"""What a draft's word is worth: the chance that is made of the confidence of every drafted slot.

Either the confidence head's, by the temperatures fitted to it, or for drafts without that head one
that is learnt while serving. `sigmoid(slope * confidence + intercept)`, slot by slot, is what the
round's program takes for the chance; what it is given is data, so nothing compiles anew.
"""

from collections import deque
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from dspark_jax.calibrate import sigmoid

SLOPE, INTERCEPT = 0.5, -0.2
"""Where an estimate begins."""
REFIT_EVERY, LATEST = 100, 4096
"""Blocks between two fits, and how many judged drafts a fit takes."""
DAMPING, PENALTY = 50, 1e-3
NEWTON_STEPS = 20


@runtime_checkable
class Rating(Protocol):
    """Slopes and intercepts, one per drafted slot, and whom to tell what became of a block."""

    slope: Float[np.ndarray, "G"]
    intercept: Float[np.ndarray, "G"]

    def learn(self, confidence: Float[np.ndarray, "G"], accepted: int, verified: int) -> None:
        """Of `verified` drafts of this confidence the first `accepted` were accepted."""
        ...


class Head:
    """A confidence head's word, divided by its temperatures; it learns nothing."""

    def __init__(self, temperatures: Float[np.ndarray, "G"]):
        self.slope, self.intercept = 1 / temperatures, np.zeros(len(temperatures))

    def learn(self, confidence: Float[np.ndarray, "G"], accepted: int, verified: int) -> None:
        """The temperatures stay."""


class Estimator:
    """A logistic model of acceptance given the log-odds of the draft's likeliest token.

    One slope for all slots, an intercept for each, as in vLLM's `acceptance_estimator.py`. A fit
    moves what it has n drafts for by n / (n + 50) of the way.
    """

    def __init__(self, draft_length: int):
        self.slope = np.full(draft_length, SLOPE)
        self.intercept = np.full(draft_length, INTERCEPT)
        self._judged: deque[tuple[int, float, bool]] = deque(maxlen=LATEST)
        self._blocks = 0

    def learn(self, confidence: Float[np.ndarray, "G"], accepted: int, verified: int) -> None:
        """Drafts after the first refused one were not judged."""
        judged = min(verified, accepted + 1)
        finite = [j for j in range(judged) if np.isfinite(confidence[j])]
        self._judged.extend((j, float(confidence[j]), j < accepted) for j in finite)
        self._blocks += 1
        if self._blocks % REFIT_EVERY == 0 and self._judged:
            self._refit()

    def _refit(self) -> None:
        slot, odds, accepted = map(np.array, zip(*self._judged, strict=True))
        slope, intercept = fit(slot, odds, accepted, len(self.slope))
        each = np.bincount(slot, minlength=len(self.slope))
        self.slope = self.slope + _share(len(slot)) * (slope - self.slope)
        self.intercept = self.intercept + _share(each) * (intercept - self.intercept)


def fit(
    slot: Int[np.ndarray, "n"],
    odds: Float[np.ndarray, "n"],
    accepted: Bool[np.ndarray, "n"],
    draft_length: int,
) -> tuple[float, Float[np.ndarray, "G"]]:
    """(slope, intercepts) of least mean logistic loss, held to where estimates begin.

    Newton's method on `loss + 0.001 / 2 * |change|²`, which keeps it finite where no draft of a
    slot was judged, or all were alike.
    """
    features = np.concatenate([odds[:, None], np.eye(draft_length)[slot]], axis=1)
    start = np.array([SLOPE, *[INTERCEPT] * draft_length])

    def loss(found: np.ndarray) -> float:
        scores = features @ found
        apart = np.logaddexp(0, scores) - accepted * scores
        return float(apart.mean() + PENALTY / 2 * np.sum((found - start) ** 2))

    found = start
    for _ in range(NEWTON_STEPS):
        chance = sigmoid(features @ found)
        gradient = features.T @ (chance - accepted) / len(odds) + PENALTY * (found - start)
        curved = (features * (chance * (1 - chance))[:, None]).T @ features / len(odds)
        step = np.linalg.solve(curved + PENALTY * np.eye(len(start)), gradient)
        while loss(found - step) > loss(found) and np.abs(step).max() > 1e-9:
            step = step / 2  # the loss is not a parabola far from its least
        found = found - step
    return float(found[0]), found[1:]


def _share(judged: np.ndarray | int) -> np.ndarray | float:
    return judged / (judged + DAMPING)
