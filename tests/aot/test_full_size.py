"""Without hardware: the decode steps of a tiny and of the full-size target compile for TPUs, fit
their memory, exchange rows and never weights, and move few more bytes than they must."""

import importlib.util
from collections import Counter

import pytest

from dspark_jax.plan.figures import Plan, Step
from dspark_jax.plan.run import make_plan
from dspark_jax.plan.settings import PlanSettings
from dspark_jax.plan.topology import set_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed (pip install 'dspark-jax[tpu]')",
    ),
]

TINY = PlanSettings("dspark_jax/assets/tiny-glm", "v5p:2x2x1", batch=8, context=1024)
FULL = PlanSettings("glm-5.2", "tpu7x:4x4x4", batch=64, context=16384)


@pytest.fixture(scope="module")
def full() -> Plan:
    set_environment()
    return make_plan(FULL)


@pytest.fixture(scope="module")
def tiny() -> Plan:
    set_environment()
    return make_plan(TINY)


def exchanged(step: Step) -> Counter[tuple[str, int]]:
    """How often devices exchange what, by kind and group."""
    assert step.cost is not None
    found: Counter[tuple[str, int]] = Counter()
    for one in step.cost.collectives:
        assert not one.carries_weights, one
        found[one.kind, one.group] += one.times
    return found


def test_the_full_size_step_fits(full: Plan):
    memory = full.memory
    assert memory.fits and memory.temporaries is not None
    assert memory.weights + memory.cache < 20e9 and memory.temporaries < TEMPORARIES


@pytest.mark.parametrize("name", ["plain", "speculative"])
def test_full_size_bytes_are_few(full: Plan, name: str):
    step: Step = getattr(full, name)
    assert step.above_floor is not None and 1 < step.above_floor < ABOVE_FLOOR[name]


@pytest.mark.parametrize("name", ["plain", "speculative"])
def test_the_full_size_program_is_small(full: Plan, name: str):
    cost = getattr(full, name).cost
    assert cost is not None and cost.instructions < INSTRUCTIONS[name]


def test_every_layer_exchanges_what_it_must(full: Plan):
    assert exchanged(full.plain) == PLAIN


def test_drafting_exchanges_what_it_must(full: Plan):
    assert exchanged(full.speculative) == PLAIN + DRAFT
