"""Logits that are not kept judge a block as those that are, to the token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.acceptance import accept
from dspark_jax.paged_loop import Control, drawn_proposal
from dspark_jax.types import Proposal, Recipe

B, G, V, RANK = 4, 3, 12, 5
TEMPERATURE = jnp.array([1.0, 0.7, 0.0, 1.3])
DRAFTED_AT = jnp.array([1.0, 0.7, 0.0, 0.0])
"""The last sequence samples, and its block was drafted greedily: from single tokens."""


def control() -> Control:
    rest = dict.fromkeys(Control._fields)
    given = rest | {"temperature": TEMPERATURE, "draft_temperature": DRAFTED_AT}
    return Control(**given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("reduced", [False, True])
def test_a_recipe_and_its_logits_give_the_same_verdicts(reduced: bool):
    target_id = jnp.arange(1, V, 2) if reduced else jnp.arange(V)
    rng, Vd = np.random.default_rng(3), len(target_id)

    def draw(*shape: int):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    base, mixed, w2 = draw(B, G, Vd), 0.4 * draw(B, G, RANK), draw(RANK, Vd)
    # As a draft makes them: a greedy block takes the largest, the others what was drawn.
    logits = base + mixed @ w2
    drawn = jnp.asarray(rng.integers(0, Vd, (B, G)))
    entry = jnp.where(DRAFTED_AT[:, None] == 0, jnp.argmax(logits, -1), drawn)
    scale = jnp.where(TEMPERATURE == 0, 1.0, TEMPERATURE)[:, None, None]
    log_q, lse = jax.nn.log_softmax(logits / scale), jax.nn.logsumexp(logits / scale, axis=-1)
    log_q = jnp.take_along_axis(log_q, entry[..., None], axis=-1)[..., 0]
    kept = Proposal(target_id[entry], logits, jnp.zeros((B, G)))
    recipe = kept._replace(logits=Recipe(base, mixed, w2, log_q, lse))
    target_logits = 0.5 * draw(B, G + 1, V)

    @jax.jit
    def verdict(proposal: Proposal, key: jax.Array):
        proposal = drawn_proposal(proposal, control())
        keys, lengths = jax.random.split(key, B), jnp.array([3, 2, 3, 3])
        return accept(proposal, target_logits, target_id, lengths, TEMPERATURE, keys)

    refused = 0
    for key in jax.random.split(jax.random.key(0), 100):
        ours, theirs = verdict(recipe, key), verdict(kept, key)
        assert np.array_equal(ours.accepted, theirs.accepted)
        assert np.array_equal(ours.bonus, theirs.bonus)
        refused += int(np.sum(ours.accepted < np.array([3, 2, 3, 3])))
    assert 50 < refused < 390, "both verdicts were meant to occur"
