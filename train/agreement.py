"""A run on several hosts stops everywhere before the same step.

Their `--output` lies on a file system that all of them see.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.sharding import place
from dspark_jax.train.stopping import Stop


class Agreement:
    """Whether any process was asked to stop: all learn it before the same step.

    A question is answered one step later, so that nobody waits for the step at hand.
    """

    def __init__(self, stop: Stop):
        self.stop, self.asked = stop, None
        self.mesh = Mesh(np.array(jax.devices()), ("device",))
        self.greatest = jax.jit(
            jax.numpy.max, out_shardings=NamedSharding(self.mesh, PartitionSpec())
        )

    def reached(self) -> bool:
        """Asked once before every step, by all processes."""
        if jax.process_count() == 1:
            return self.stop.wanted
        answer, self.asked = self.asked, self._ask()
        return answer is not None and bool(answer)

    def _ask(self) -> jax.Array:
        wishes = np.full(self.mesh.size, self.stop.wanted, np.int32)
        return self.greatest(place(wishes, NamedSharding(self.mesh, PartitionSpec("device"))))
