"""A whole decode round with kernels draws what it draws without: same tokens, same verdicts."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import ops
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.generation import generate
from dspark_jax.loop import Request, init_state, prefill, prepare_weights
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.types import Rows
from tests.property.server import QWEN3
from tests.property.test_greedy_equals_plain import DRAFT, V

HEAD, CAPACITY, LIMIT = 32, 64, 20
REFERENCE = {"reference (as asked)"}
CASES = [
    ("vanilla", False, 0.0),
    ("gated", True, 0.0),
    ("gated", False, 1.0),
    ("rnn", True, 0.0),
    ("rnn", False, 1.0),
]
JUDGING = {"acceptance.row_statistics", "acceptance.residual_draw"}


def answers(head: str, reduced: bool, temperature: float) -> tuple[Any, set[str]]:
    """What two prompts are answered, and what the ops of the program ran as."""
    target = make_target(QWEN3)
    config = replace(
        DRAFT,
        vocab_size=V,
        draft_vocab_size=V - 3 if reduced else V,
        hidden_size=QWEN3.hidden_size,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD,
        aux_layer_ids=QWEN3.aux_layer_ids,
        markov_head_type=head,
    )
    draft, params = dspark_draft(config), init_params(QWEN3, 3)
    ids = jnp.arange(2, V - 1) if reduced else jnp.arange(V)
    frozen = target.frozen(params, ids)
    # Weights as wide as trained ones: fresh heads are all but silent.
    drafter = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, init_draft_params(config, 1))
    wide = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    weights = prepare_weights(target, draft, wide, drafter, frozen)
    state = init_state(target, draft, jax.random.split(jax.random.key(5), 2), CAPACITY)
    tokens = jnp.array([[3, 7, 2, 9], [4, 1, 0, 0]])
    position = jnp.array([[0, 1, 2, 3], [0, 1, CAPACITY, CAPACITY]])
    state = prefill(target, draft, weights, state, Rows(tokens, position), jnp.array([5, 6]))
    request = Request(jnp.array([9, 2]), jnp.array([temperature, temperature]), jnp.full(2, LIMIT))

    def run(state: Any) -> Any:
        return generate(target, draft, weights, state, request, LIMIT, jnp.array([V]))[1]

    made = jax.device_get(jax.jit(run)(state))
    assert ops.picked().keys() > JUDGING
    return made, set(ops.picked().values())


@pytest.mark.parametrize(
    ("head", "reduced", "temperature"),
    [
        ("vanilla", True, 1.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_a_round_of_kernels_draws_what_the_reference_draws(
    head: str, reduced: bool, temperature: float
):
    with ops.using("reference"):
        expected, ran = answers(head, reduced, temperature)
        assert ran == REFERENCE
    with ops.using("pallas"):
        found, ran = answers(head, reduced, temperature)
        assert ran == {"tpu kernel"}
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.accepted, expected.accepted)
    assert expected.accepted.sum() > 0, "nothing was accepted, so nothing was compared"
    np.testing.assert_allclose(found.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
