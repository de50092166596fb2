"""Every product of rows with their experts against the definition in float64, over odd shapes.

Tolerance: float32 sums of n terms in any order are off by about √n half units (2^-24) of the sum of
magnitudes; allowed is √n + 8 of them. Beyond 1,024 rows the reference rounds matrices to x's type
first: up to 2^-8 of every term, of which the root of the sum of squares is allowed three times.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import fp8
from dspark_jax.fp8 import BlockScaled
from dspark_jax.pallas_kernels.fp8_experts import reference, tpu
from tests.kernels.races import interpreted, race_found

BLOCK = (128, 128)


class Case(NamedTuple):
    """Rows of every expert and rows past them, sizes, how many sets are stacked, x's type."""

    sizes: tuple[int, ...]
    idle: int
    size_in: int
    size_out: int
    stack: int
    dtype: Any


CASES = [
    Case((1,), 0, 128, 128, 0, jnp.float32),
    Case((0, 3, 0, 0, 5, 0), 2, 256, 128, 0, jnp.bfloat16),  # few are hit
    Case((0, 0), 4, 128, 64, 0, jnp.float32),  # none is
    Case((17, 0, 1, 40, 6), 0, 128, 200, 3, jnp.bfloat16),  # windows across experts' borders
    Case((5, 2), 1, 2304, 130, 2, jnp.float32),  # a sum in two tiles
    Case((7, 9, 0), 0, 200, 1216, 0, jnp.float32),  # a block cut short, two tiles of columns
    Case((200, 0, 31, 300), 9, 128, 128, 0, jnp.bfloat16),  # rows for many windows
    Case((1000, 0, 30, 50), 0, 128, 128, 0, jnp.bfloat16),  # a long prompt: two tiles of rows
]
IMPLEMENTATIONS = ("reference", "tpu")


def named(case: Case) -> str:
    return f"{'-'.join(map(str, case.sizes))}x{case.size_in}x{case.size_out}"


def interpreted_kernel(*arguments: Any, **settings: Any) -> Any:
    y = tpu.fp8_experts(*arguments, **settings, interpret=interpreted())
    jax.block_until_ready(y)
    assert not race_found()
    return y


def implementation(name: str) -> Callable[..., Any]:
    if name == "reference":
        return jax.jit(reference.fp8_experts, static_argnames="block")
    return interpreted_kernel


@functools.cache
def arguments(case: Case) -> tuple[Any, ...]:
    """(x, values, scales, sizes, layer); rows past the experts' are no numbers."""
    rng = np.random.default_rng(len(case.sizes))
    lead = (case.stack,) if case.stack else ()

    def draw(*shape: int) -> jax.Array:
        wide = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))
        return jnp.asarray(wide, jnp.float32)

    kernel = fp8.quantise(draw(*lead, len(case.sizes), case.size_in, case.size_out), BLOCK)
    x = draw(sum(case.sizes) + case.idle, case.size_in).astype(case.dtype)
    x = x.at[sum(case.sizes) :].set(jnp.nan)
    layer = jnp.int32(case.stack - 1) if case.stack else None
    return x, kernel.values, kernel.scales, jnp.asarray(case.sizes, jnp.int32), layer


def exact(case: Case) -> tuple[Any, Any, Any]:
    """In float64: the products of real rows, their terms' magnitudes, the root of their squares."""
    x, values, scales, sizes, layer = arguments(case)
    own = fp8.dequantise(BlockScaled(values, scales, BLOCK, layer), jnp.float32)
    w, wide = np.asarray(own, np.float64), np.asarray(x, np.float64)
    parts = np.split(wide, np.cumsum(sizes))[: len(sizes)]

    def products(change: Callable[[Any], Any]) -> np.ndarray:
        return np.concatenate([change(a) @ change(b) for a, b in zip(parts, w, strict=True)])

    return products(lambda a: a), products(np.abs), np.sqrt(products(np.square))


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_row_meets_its_expert(name: str, case: Case):
    y = implementation(name)(*arguments(case), block=BLOCK)
    truth, magnitude, root = exact(case)
    assert y.dtype == jnp.float32 and y.shape == (len(truth) + case.idle, case.size_out)
    allowed = 2.0**-24 * (np.sqrt(case.size_in) + 8) * magnitude
    if name == "reference" and len(y) > 1024:
        allowed += 3 * 2.0**-8 * root
    assert np.all(np.abs(np.asarray(y[: len(truth)], np.float64) - truth) <= allowed)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5], CASES[7]], ids=named)
def test_the_reference_computes_what_the_core_does_to_the_last_bit(case: Case):
    x, values, scales, sizes, layer = arguments(case)
    core = fp8.ragged_matmul(x, BlockScaled(values, scales, BLOCK, layer), sizes)
    ours = reference.fp8_experts(*arguments(case), block=BLOCK)
    assert np.array_equal(ours[: sum(case.sizes)], core[: sum(case.sizes)])


def test_experts_without_rows_are_left_alone():
    x, values, scales, sizes, layer = arguments(CASES[1])
    idle = sizes == 0
    spoilt = scales.at[jnp.where(idle)[0]].set(jnp.nan)
    ours, theirs = (
        interpreted_kernel(x, values, s, sizes, layer, block=BLOCK) for s in (scales, spoilt)
    )
    assert np.array_equal(ours[:8], theirs[:8])


def test_the_list_of_visits_names_experts_with_rows_and_stays_at_the_last():
    visits = tpu.visited(jnp.array([0, 20, 0, 15, 0]), None, tiles=3, high=16)
    assert visits.hit.tolist() == [[1] * 5, [1, 3, 3, 3, 3], [3] * 5]
    assert visits.hits.tolist() == [1, 2, 1]
    assert tpu.visited(jnp.array([0, 0]), None, 1, 16).hits.tolist() == [0]


def test_a_row_ignores_its_neighbours():
    x, *rest = arguments(CASES[3])
    spoilt = x.at[jnp.arange(len(x)) != 17].set(jnp.nan)
    ours, theirs = (interpreted_kernel(rows, *rest, block=BLOCK) for rows in (x, spoilt))
    assert np.array_equal(ours[17], theirs[17])


def test_what_cannot_be_run_is_said():
    x, *rest = arguments(CASES[3])
    sizes, layer = rest[2:]
    assert tpu.unsupported(x, *rest, block=BLOCK) is None
    for wrong in (
        tpu.unsupported(x, *rest, block=(64, 128)),
        tpu.unsupported(x.astype(jnp.float16), *rest, block=BLOCK),
        tpu.unsupported(x, rest[0], rest[1], sizes, block=BLOCK),
        tpu.unsupported(x, rest[0], rest[1], sizes[:1], layer, block=BLOCK),
        tpu.unsupported(x[:0], *rest, block=BLOCK),
    ):
        assert wrong is not None and wrong.endswith(".")


def test_sums_that_are_not_cleared_are_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "clear", lambda y: None)
    y = tpu.fp8_experts(*arguments(CASES[1]), block=BLOCK, interpret=interpreted())
    truth, magnitude, _ = exact(CASES[1])
    assert not np.all(np.abs(np.asarray(y[: len(truth)], np.float64) - truth) <= 1e-5 * magnitude)


def test_cores_that_share_a_sum_are_a_race(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel",) * 4)
    two = interpreted(num_cores_or_threads=2)
    jax.block_until_ready(tpu.fp8_experts(*arguments(CASES[4]), block=BLOCK, interpret=two))
    assert race_found()
