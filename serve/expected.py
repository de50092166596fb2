"""What a round is expected to take: as measured with nobody asking, and as rounds turn out."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dspark_jax.serve.programs import Shape

COMMON, OWN = 0.05, 0.01
"""How much of a surprise what is common to all rounds takes over, and their kind beside it."""
MOST = 1.0
"""Of a surprise that is listened to, as a logarithm: one round may have met anything."""


class Expected:
    """Seconds of every kind of round.

    What slows all rounds, the host and programs that share its cores, is a common factor: learnt
    from rounds that run, it holds for kinds that do not, which would seem cheap otherwise until
    they are tried. What remains is learnt kind by kind, and slower: it was measured to begin with.
    """

    def __init__(self, measured: Mapping[Shape, float]):
        self._common = 0.0
        self._own = {shape: math.log(seconds) for shape, seconds in measured.items()}

    def of(self, shape: Shape) -> float:
        """Of one round; 0 for a kind that was not measured."""
        return math.exp(self._own[shape] + self._common) if shape in self._own else 0.0

    def curve(self, program: Shape, budgets: Sequence[int]) -> Float[np.ndarray, "rows"]:
        """Of rounds of so many rows up to the last of `budgets`, which ascend: on straight lines.

        On the stairs that they are, the first row of a step would pay for all of it and never come.
        """
        took = [self.of(program._replace(budget=budget)) for budget in budgets]
        rows = np.arange(1 + budgets[-1])
        return np.interp(rows, budgets, np.maximum.accumulate(took)).astype(np.float32)

    def took(self, shape: Shape, seconds: float) -> None:
        """One round, with nothing but rounds beside it."""
        if shape in self._own and seconds > 0:
            surprise = math.log(seconds) - self._own[shape] - self._common
            surprise = min(max(surprise, -MOST), MOST)
            self._common += COMMON * surprise
            self._own[shape] += OWN * surprise
