"""What a round is expected to take: as measured with nobody asking, and as rounds turn out."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dspark_jax.serve.programs import Shape

LEARNING = 0.05
"""How much of a surprise a kind of round, and again what is common to all, takes over."""
LEAST = 0.25
"""Of what was measured: no round is expected to take less."""


class Expected:
    """Seconds of every kind of round.

    What serving adds, on the host and by programs that share its cores, is added to rounds of every
    kind: `beyond` is learnt from those that run and holds for those that do not, which would seem
    cheap otherwise until they are tried. What remains is learnt kind by kind.
    """

    def __init__(self, measured: Mapping[Shape, float]):
        self.measured = dict(measured)
        self.beyond = 0.0
        self._own = dict(measured)

    def of(self, shape: Shape) -> float:
        """Of one round; 0 for a kind that was not measured."""
        if shape not in self._own:
            return 0.0
        return max(self._own[shape] + self.beyond, LEAST * self.measured[shape])

    def curve(self, program: Shape, budgets: Sequence[int]) -> Float[np.ndarray, "rows"]:
        """Of rounds of so many rows up to the last of `budgets`, which ascend: on straight lines.

        On the stairs that they are, the first row of a step would pay for all of it and never come.
        """
        took = [self.of(program._replace(budget=budget)) for budget in budgets]
        rows = np.arange(1 + budgets[-1])
        return np.interp(rows, budgets, np.maximum.accumulate(took)).astype(np.float32)

    def took(self, shape: Shape, seconds: float) -> None:
        """One round, with nothing but rounds beside it."""
        if shape in self._own:
            # Not of what `of` says, which never falls below a floor: the error would never end.
            off = LEARNING * (seconds - self._own[shape] - self.beyond)
            self.beyond += off
            self._own[shape] += off
