"""Attention of many rows in tiles is the attention of few rows at once."""

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.attention import FEW_ROWS, attend_rows

B, S, H, HK, D = 2, 150, 6, 2, 8


def test_tiles_are_chosen_by_size_alone() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (B, S, H, D))
    key, value = (jax.random.normal(k, (B, HK, S, D)) for k in keys[1:])
    segment = jnp.where(jnp.arange(S) < 70, 1, 2)
    order = jnp.arange(S)
    visible = (segment[:, None] == segment) & (order[:, None] >= order)
    visible = jnp.broadcast_to(visible, (B, S, S))
    assert S > FEW_ROWS
    whole = attend_rows(query, key, value, visible)
    for start in range(0, S, 50):
        rows = slice(start, start + 50)
        part = attend_rows(query[:, rows], key, value, visible[:, rows])
        np.testing.assert_allclose(whole[:, rows], part, rtol=1e-5, atol=1e-5)
