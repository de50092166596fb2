"""The reader of compiled loops sees registers that spill, and where."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from tests.aot import schedule
from tests.aot.compile import MARKS, Kernel, shape

pytestmark = MARKS
ROWS, COLUMNS = 128, 1024
"""Of what a loop carries: 128 registers of 8 x 128 numbers, where a TPU has 64."""


def carrying(rows: int) -> Kernel:
    """A loop of products whose sum has so many rows."""

    def kernel(x: Any, out: Any) -> None:
        def turn(_: Any, total: Any) -> Any:
            return total + jnp.dot(total[:, :128], x[...], preferred_element_type=jnp.float32)

        begin = jnp.zeros((rows, COLUMNS), jnp.float32)
        out[...] = jax.lax.fori_loop(0, x[0, 0].astype(jnp.int32), turn, begin)

    made = jax.ShapeDtypeStruct((rows, COLUMNS), jnp.float32)
    return Kernel(
        pl.pallas_call(kernel, out_shape=made, name="carrying"),
        (shape(128, COLUMNS, dtype="float32"),),
    )


KERNELS = {"carrying, much": carrying(ROWS), "carrying, little": carrying(8)}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_loop_that_carries_more_than_the_registers_hold_spills(topology: str):
    much, little = schedule.main_loops(__name__, list(KERNELS), topology).values()
    assert much.products > 0 and little.products > 0
    assert much.spilled >= 64
    assert little.spilled == 0
