"""Which reading of a draft is the best one, by more than a few prompts' luck.

Every reading is judged on the same blocks, so readings are compared by their paired differences:
accepted drafts of a block, averaged per prompt (blocks of one text are no independent witnesses),
and over prompts with Student's interval.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import t as student

from dspark_jax.convert.readings import Change, Known, Reading, alternatives, blind, parts

DOUBT = 0.01
"""Chance, over all readings tried together, that luck makes one look better than it is."""
WORTH = 0.05
"""Accepted drafts a round below which a better reading is no finding."""
ROUNDS = 3
"""Mistakes that are looked for one upon the other."""

Standing = Literal["better", "worse", "same"]


class Difference(NamedTuple):
    """Accepted drafts a round more than the reading compared with, give or take `margin`."""

    mean: float
    margin: float

    @property
    def standing(self) -> Standing:
        if self.mean - self.margin > 0 and self.mean >= WORTH:
            return "better"
        return "worse" if self.mean + self.margin < 0 else "same"


class Tried(NamedTuple):
    """A reading's acceptance by position, its acceptance length, and how it compares."""

    change: Change
    by_position: list[float]
    acceptance_length: float
    difference: Difference


class Diagnosis(NamedTuple):
    """The configured reading, everything tried against it, and the mistakes found, in order.

    `blind` is the configured reading without the target's states; `final` has all mistakes undone.
    """

    configured: Tried
    blind: Tried
    tried: list[Tried]
    parts: list[Tried]
    mistakes: list[Tried]
    final: Reading

    @property
    def reads_its_target(self) -> bool:
        """Whether the draft is better than without its target's states."""
        return self.blind.difference.standing == "worse" and -self.blind.difference.mean >= WORTH

    @property
    def idle_parts(self) -> list[Tried]:
        """Parts that the draft is as good or better without."""
        return [part for part in self.parts if part.difference.standing != "worse"]


def diagnose(
    run: Callable[[Reading], np.ndarray], start: Reading, known: Known, valid: np.ndarray
) -> Diagnosis:
    """Try every reading with `run`, which gives [B, N, K] survivals; see `Patient`."""
    shared = max(start.config.block_size - 1, 1)  # drafts that both layouts have

    def compare(changes: Sequence[Change], base: np.ndarray) -> list[Tried]:
        factor = margin_factor(len(changes), int(valid.any(axis=1).sum()))
        return [
            judge(change, run(change.reading), base, valid, shared, factor) for change in changes
        ]

    configured = run(start)
    as_is = Change("configured", "as configured", start)
    without = Change("blind", "without the target's states", blind(start))
    first = compare(list(alternatives(start, known)), configured)
    mistakes, found, here = [], first, start
    while better := [t for t in found if t.difference.standing == "better"]:
        best = max(better, key=lambda tried: tried.difference.mean)
        mistakes.append(best)
        here = best.change.reading
        if len(mistakes) == ROUNDS:
            break
        kinds = {mistake.change.kind for mistake in mistakes}
        left = [c for c in alternatives(here, known) if c.kind not in kinds]
        found = compare(left, run(here))
    return Diagnosis(
        configured=compare([as_is], configured)[0],
        blind=compare([without], configured)[0],
        tried=first,
        parts=compare(list(parts(start)), configured),
        mistakes=mistakes,
        final=here,
    )


def judge(
    change: Change,
    found: np.ndarray,
    base: np.ndarray,
    valid: np.ndarray,
    shared: int,
    factor: float,
) -> Tried:
    """One reading against another, on the same blocks."""
    counted = np.maximum(valid.sum(axis=1), 1)

    def per_prompt(survivals: np.ndarray) -> np.ndarray:
        lengths = survivals[..., :shared].sum(axis=-1)
        return ((lengths * valid).sum(axis=1) / counted)[valid.any(axis=1)]

    gains = per_prompt(found) - per_prompt(base)
    error = gains.std(ddof=1) / len(gains) ** 0.5
    drafts = change.reading.config.draft_length
    by_position = found[valid][:, :drafts].mean(axis=0)
    difference = Difference(float(gains.mean()), float(factor * error))
    return Tried(change, by_position.tolist(), 1 + float(by_position.sum()), difference)


def margin_factor(readings: int, prompts: int) -> float:
    """Standard errors that a difference must exceed: Student's quantile for `DOUBT` in all."""
    return float(student.ppf(1 - DOUBT / max(readings, 1), prompts - 1))


def table_rows(diagnosis: Diagnosis) -> Iterator[tuple[str, Tried]]:
    """Everything that was tried against the configured reading, with the word for it."""
    yield "configured", diagnosis.configured
    for tried in diagnosis.tried:
        yield tried.difference.standing, tried
    for part in diagnosis.parts:
        yield part.difference.standing, part
    yield diagnosis.blind.difference.standing, diagnosis.blind


def as_json(word: str, tried: Tried) -> dict[str, Any]:
    """One line of the table."""
    return {
        "kind": tried.change.kind,
        "reading": tried.change.what,
        "acceptance_by_position": tried.by_position,
        "acceptance_length": tried.acceptance_length,
        "difference": tried.difference.mean,
        "margin": tried.difference.margin,
        "standing": word,
    }
