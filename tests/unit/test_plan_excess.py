"""Which operations cost a step the bytes above its floor."""

import pytest

from dspark_jax.plan.excess import Excess, excesses
from dspark_jax.plan.hlo.cost import Cost, Operation
from dspark_jax.plan.hlo.labels import spoken

SCORES = Operation("scores", 110, 100, 0, 3)
VALUES = Operation("values", 105, 100, 0, 3)
COPY = Operation("copy", 80, 40, 0, 1)


def cost_of(*operations: Operation, reads: dict[tuple[str, int], int]) -> Cost:
    total = sum(one.bytes for one in operations)
    return Cost(total, 0, 0, reads, {0: "cache", 1: "router"}, operations, (), ())


def test_the_second_reader_of_a_cache_costs_it_again():
    reads = {("scores", 0): 100, ("values", 0): 100, ("copy", 1): 40}
    cost = cost_of(SCORES, VALUES, COPY, reads=reads)
    assert excesses(cost, (100.0, 40.0)) == (
        Excess("values", "cache", 3, 105, 100, 105),
        Excess("copy", "", 1, 80, 0, 40),
        Excess("scores", "", 3, 110, 0, 10),
    )


def test_all_excesses_make_the_difference_to_the_floor():
    reads = {("scores", 0): 100, ("values", 0): 100, ("copy", 1): 40}
    cost, floors = cost_of(SCORES, VALUES, COPY, reads=reads), (90.0, 60.0)
    unread = 60 - 40
    above = sum(one.above for one in excesses(cost, floors))
    assert above - unread == pytest.approx(cost.bytes - sum(floors))


def test_weights_that_nobody_may_need_are_named():
    cost = cost_of(SCORES, reads={("scores", 1): 100})
    (found,) = excesses(cost, (0.0, 87.5))
    assert (found.argument, found.again, found.above) == ("router", 12.5, 22.5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weights.target['layers'][1][0]['mlp']['gate']['kernel'].value", "mlp.gate"),
        (r"weights[\'lm_head\'][\'kernel\'].value", "lm_head"),
        ("state.target_cache[1][3].latent", "target_cache.latent"),
        ("state.draft_cache.k[2]", "draft_cache.k"),
        ("weights.target['layers'][0][0]['q_b_proj']['kernel'].value.scales", "q_b_proj.scales"),
        ("x", "x"),
    ],
)
def test_arguments_are_called_by_what_tells_them_apart(name: str, said: str):
    assert spoken(name) == said
