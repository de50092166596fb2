"""What rounds are told of the sequences in slots: written once, then copied round by round."""

from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from dspark_jax.paged_words import views
from dspark_jax.serve.programs import Shape, Steps
from dspark_jax.serve.rating import Rating
from dspark_jax.serve.sequence import Sequence


class Telling:
    """A row of words for every slot. A sequence writes all of its row when it enters.

    Later rounds change its pages as they grow, its cap and the rating of drafts, nothing else.
    """

    def __init__(self, programs: Steps, draft_greedily: bool):
        self._programs, self._draft_greedily = programs, draft_greedily
        sizes = programs.sizes
        self._rows = np.array(programs.told(sizes.slots, sizes.longest).words)
        self._known = views(programs.columns(sizes.longest), self._rows)
        self._nobody: dict[tuple[int, int], np.ndarray] = {}

    def enter(self, sequence: Sequence) -> None:
        """Write all that its rounds are told until it leaves its slot."""
        slot, sampling = sequence.slot, sequence.work.sampling
        values: dict[str, Any] = {
            "slot": slot,
            "fresh": 1,
            "anchor": sequence.tokens[-1],
            "length": len(sequence.tokens) - 1,
            "key": [sequence.seed >> 32, sequence.seed & 0xFFFFFFFF],
            "temperature": sampling.temperature,
            "draft_temperature": 0 if self._draft_greedily else sampling.temperature,
            "min_p": sampling.min_p,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "pages": 0,
        }
        for name, value in values.items():
            self._known[name][slot] = value
        self._known["pages"][slot, : len(sequence.pages)] = sequence.pages

    def lend(self, sequence: Sequence, more: list[int]) -> None:
        """Its pages become more."""
        begin = len(sequence.pages)
        self._known["pages"][sequence.slot, begin : begin + len(more)] = more
        sequence.pages += more

    def round(
        self, shape: Shape, sequences: Many[Sequence], caps: Many[int], rating: Rating
    ) -> np.ndarray:
        """The words of a round of these sequences, which have entered; no longer are they fresh."""
        known, slots = self._known, np.array([s.slot for s in sequences], np.intp)
        known["cap"][slots] = caps
        known["slope"][:], known["intercept"][:] = rating.slope, rating.intercept
        words = self._empty(shape).copy()
        words[: len(slots)] = self._rows[slots, : words.shape[1]]
        known["fresh"][slots] = 0
        return words

    def leave_out(self, shape: Shape, words: np.ndarray, row: int) -> None:
        """Whoever this row was told of takes no part."""
        words[row] = self._empty(shape)[row]

    def _empty(self, shape: Shape) -> np.ndarray:
        """A round's words in which nobody takes part."""
        key = (shape.group, shape.pages)
        if key not in self._nobody:
            self._nobody[key] = np.array(self._programs.told(*key).words)
        return self._nobody[key]
