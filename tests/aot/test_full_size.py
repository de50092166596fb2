"""Without hardware: the decode steps of a tiny and of the full-size target compile for TPUs, fit
their memory, exchange rows and never weights, and move no more bytes than they did."""

import importlib.util
from collections import Counter

import pytest

from dspark_jax.plan.figures import Plan
from dspark_jax.plan.hlo.cost import Cost
from dspark_jax.plan.run import make_plan
from dspark_jax.plan.settings import PlanSettings
from dspark_jax.plan.topology import set_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed (pip install -e '.[tpu]')",
    ),
]

TINY = PlanSettings("dspark_jax/assets/tiny-glm", "v5p:2x2x1", batch=8, context=1024)
FULL = PlanSettings("glm-5.2", "tpu7x:4x4x4", batch=64, context=16384)


LIMITS = {"plain": 1.3, "speculative": 1.6}
"""Of bytes moved, in times the floor: what was measured, rounded up."""
INSTRUCTIONS = {"plain": 20_000, "speculative": 30_000}
"""Likewise; layers that were not scanned would take ten times as many."""


@pytest.fixture(scope="module", params=[TINY, FULL], ids=["tiny", "full"])
def plan(request: pytest.FixtureRequest) -> Plan:
    set_environment()
    return make_plan(request.param)


@pytest.fixture(params=["plain", "speculative"])
def step(request: pytest.FixtureRequest) -> str:
    return request.param


def cost_of(plan: Plan, step: str) -> Cost:
    cost = getattr(plan, step).cost
    assert cost is not None, "the compiler refused"
    return cost


def test_it_fits(plan: Plan):
    memory = plan.memory
    assert memory.fits and memory.temporaries is not None
    if plan.settings is FULL:
        # Rotary keys and draft heads lie 128 wide, as kernels read them.
        assert memory.held < 18.2e9 and memory.temporaries < 0.5e9


def test_no_exchange_carries_weights(plan: Plan, step: str):
    assert not [one for one in cost_of(plan, step).collectives if one.carries_weights]


def test_every_layer_exchanges_what_it_must(plan: Plan, step: str):
    found: Counter[tuple[str, int]] = Counter()
    for one in cost_of(plan, step).collectives:
        # Sums of which a device keeps its own rows are the compiler's to choose.
        kind = "sum" if one.kind in ("all-reduce", "reduce-scatter") else one.kind
        found[kind, one.group] += one.times
    assert found == exchanges(plan, step == "speculative")


def exchanges(plan: Plan, drafting: bool) -> Counter[tuple[str, int]]:
    """How often devices exchange what: by kind, and how many take part."""
    target, draft, needed = plan.models.target, plan.models.draft, Counter[tuple[str, int]]()
    mixtures = sum("sparse" in kind for kind in target.layer_kinds)
    needed["all-gather", plan.data] += mixtures  # rows of all groups, for their experts
    needed["sum", plan.data] += mixtures  # and back
    needed["sum", plan.tensor] += 2 * target.num_hidden_layers + 1  # attention, MLP; embedding
    needed["all-gather", plan.tensor] += 1  # logits
    if drafting:
        needed["sum", plan.tensor] += 2 * draft.num_hidden_layers + 1
        # The fused states, what is drawn at every position, and the row a refused draft is from.
        needed["all-gather", plan.tensor] += 2 + draft.draft_length
        needed["sum", plan.data] += 1  # whether any sequence samples
    return needed


@pytest.fixture
def full(plan: Plan) -> Plan:
    if plan.settings is not FULL:
        pytest.skip("tiny arrays are mostly padding")
    return plan


def test_full_size_programs_are_small_and_move_little(full: Plan, step: str):
    assert 1 < getattr(full, step).above_floor < LIMITS[step]
    assert cost_of(full, step).instructions < INSTRUCTIONS[step]


def test_the_experts_of_a_device_are_read_once(full: Plan, step: str):
    cost, floors = cost_of(full, step), getattr(full, step).floors
    routed = [n for n, name in cost.arguments.items() if ".experts." in name]
    needed = sum(floors[n] for n in routed)
    # All are read, some of which a small batch is expected not to choose.
    assert needed <= sum(map(cost.read, routed)) < 1.2 * needed
