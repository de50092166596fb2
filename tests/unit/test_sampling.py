"""Draws: the same from the same keys, whatever reductions they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.sampling import draw


@pytest.mark.parametrize("size", [3, 512, 4097])
def test_draws_are_those_of_jax(size: int):
    keys = jax.random.split(jax.random.key(size), 64)
    logits = 3 * jax.random.normal(jax.random.key(1), (64, size))
    logits = jnp.where(jnp.arange(size) % 3 == 1, -jnp.inf, logits)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(draw(keys, logits), expected)
