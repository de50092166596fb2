"""How many rows a round verifies: as many as pay for their time, by what the drafts say themselves.

The budget of a round is chosen from confidences of blocks drafted before it, the drafts that fill
it from their own round's (`schedule.py`), so nothing that is verified was chosen by its outcome.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

PROBE_EVERY = 256
"""Rounds without drafts after which one drafts again, to see whether it would pay by now."""
MARGIN = 1.03
"""A change between drafting and not drafting must promise this much more tokens per second."""


@dataclass
class Policy:
    """Chooses budgets: all that there is to verify, or what promises most tokens per second."""

    kind: Literal["fixed", "adaptive"]
    draft_length: int
    drafting: bool = True
    plain_rounds: int = 0
    survival: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Running mean of the share of rounds in which draft j was accepted, verified or not."""
    claimed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Running means of the chance of draft j, and of its acceptance, where those before it
    were accepted: what a draft says of itself is taken as it has turned out to be."""

    def __post_init__(self) -> None:
        self.survival = np.full(self.draft_length, 0.5) ** np.arange(1, self.draft_length + 1)
        self.claimed, self.kept = (np.full(self.draft_length, 0.5) for _ in range(2))

    def budget(
        self,
        seconds: Mapping[int, float],
        chances: Sequence[Sequence[float]],
        caps: Sequence[int],
    ) -> int:
        """One of the budgets of `seconds`, ascending, of which the first drafts nothing.

        `seconds` are what a round of each takes, as measured; a fixed policy does not ask.
        `chances` are those of every sequence's last block, empty where there was none; `caps` bound
        the drafts of each sequence.
        """
        budgets = list(seconds)
        if not any(caps):
            return budgets[0]
        if self.kind == "fixed":
            return next(b for b in budgets if b >= len(caps) + sum(caps) or b == budgets[-1])
        gains = np.concatenate(
            [self._survival(c)[:cap] for c, cap in zip(chances, caps, strict=True)]
        )
        promised = np.concatenate([[0.0], np.cumsum(np.sort(gains)[::-1])])
        active = len(caps)

        def rate(budget: int) -> float:
            drafts = min(max(budget - active, 0), len(gains))
            drafts = 0 if budget == budgets[0] else drafts
            return (active + promised[drafts]) / seconds[budget]

        plain, best = budgets[0], max(budgets[1:], key=rate)
        likes = rate(best) > rate(plain) * (MARGIN if not self.drafting else 1 / MARGIN)
        if likes:
            self.drafting, self.plain_rounds = True, 0
            return best
        self.drafting = False
        self.plain_rounds += 1
        if self.plain_rounds % PROBE_EVERY == 0:
            return best
        return plain

    def observe(self, accepted: int, verified: int, chance: Sequence[float] = ()) -> None:
        """What became of a block, and what it had said of itself."""
        judged = self.draft_length if accepted < verified else verified
        for j in range(judged):  # after a refusal none survives, verified or not
            survived = float(j < accepted)
            self.survival[j] += 0.02 * (survived - self.survival[j])

        for j in range(min(verified, accepted + 1) if len(chance) else 0):
            self.claimed[j] += 0.02 * (chance[j] - self.claimed[j])
            self.kept[j] += 0.02 * (float(j < accepted) - self.kept[j])

    def _survival(self, chance: Sequence[float]) -> np.ndarray:
        """Of the drafts that are ever verified, which may be fewer than a block has."""
        if not len(chance):
            return self.survival
        trust = self.kept / np.maximum(self.claimed, 1e-6)
        return np.cumprod(np.minimum(np.asarray(chance)[: self.draft_length] * trust, 1.0))
