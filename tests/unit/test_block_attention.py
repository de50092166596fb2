"""Tiled attention of blocks equals the plain softmax, values and gradients, at every tile size."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool

from dspark_jax.block_attention import NOTHING, Part, attend_tiled, combine

B, HEADS, N, R, C, D = 2, 3, 13, 4, 50, 8


def plain(query: Array, key: Array, value: Array, seen: Array) -> Part:
    """The same through the whole square of scores; for blocks that see something."""
    score = jnp.einsum("bhnrd,bhcd->bhnrc", query, key)
    score = jnp.where(seen[:, None, :, None, :], score, -jnp.inf)
    out = jnp.einsum("bhnrc,bhcd->bhnrd", jax.nn.softmax(score), value)
    return Part(out, jax.nn.logsumexp(score, axis=-1))


def given(seed: int = 0) -> tuple[list[Array], Array, Array]:
    """Queries, keys and values; an upstream gradient for either result."""
    keys = jax.random.split(jax.random.key(seed), 5)
    query, context = (B, HEADS, N, R, D), (B, HEADS, C, D)
    shapes = query, context, context, query, query[:-1]
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return arrays[:3], arrays[3], arrays[4]


def documents() -> Bool[Array, "B N C"]:
    """Two documents of unequal length; block n sees its own up to its anchor, which moves on."""
    anchor = jnp.stack([jnp.linspace(1, C - 1, N).astype(int), jnp.linspace(2, 20, N).astype(int)])
    start = jnp.where(anchor > 23, 23, 0)
    row = jnp.arange(C)
    return (row < anchor[..., None]) & (row >= start[..., None])


@pytest.mark.parametrize("tile", [(64, 128), (13, 50), (4, 16), (5, 7), (1, 1)])
def test_tiles_change_neither_value_nor_gradient(tile: tuple[int, int]) -> None:
    arrays, up_out, up_lse = given()
    seen = documents()

    def total(attention: Callable[..., Part], *arrays: Array) -> Array:
        out, lse = attention(*arrays, seen)
        return jnp.vdot(out, up_out) + jnp.vdot(lse, up_lse)

    tiled = partial(attend_tiled, tile=tile)
    everything = (arrays[0], arrays[1], arrays[2], seen)
    for ours, theirs in zip(tiled(*everything), plain(*everything), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [jax.grad(total, argnums=(1, 2, 3))(f, *arrays) for f in (tiled, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_a_block_that_sees_nothing_has_no_share_and_no_gradient() -> None:
    (query, key, value), up_out, _ = given(1)
    seen = documents().at[0, 3].set(False).at[1, :].set(False)
    blind = ~seen.any(axis=-1)
    other = Part(jnp.ones((B, HEADS, N, R, D)), jnp.zeros((B, HEADS, N, R)))

    def both(query: Array, key: Array, value: Array) -> Array:
        return combine(attend_tiled(query, key, value, seen, (4, 16)), other)

    found = both(query, key, value)
    lse = attend_tiled(query, key, value, seen, (4, 16)).lse
    assert (jnp.moveaxis(lse, 2, 1)[blind] < NOTHING / 2).all()
    np.testing.assert_array_equal(jnp.moveaxis(found, 2, 1)[blind], 1.0)
    pull = jax.vjp(both, query, key, value)[1](up_out)
    assert all(bool(jnp.isfinite(g).all()) for g in pull)
    np.testing.assert_array_equal(jnp.moveaxis(pull[0], 2, 1)[blind], 0.0)
    np.testing.assert_array_equal(pull[1][1], 0.0)


def test_bfloat16_inputs_accumulate_in_float32() -> None:
    query, key, value = (x.astype(jnp.bfloat16) for x in given(2)[0])
    seen = documents()
    query32, key32, value32 = (x.astype(jnp.float32) for x in (query, key, value))
    wide = plain(query32, key32, value32, seen)
    found = attend_tiled(query, key, value, seen, (4, 16))
    assert found.out.dtype == jnp.float32
    # Only the weights are rounded, to 8 bits, before they meet the values.
    np.testing.assert_allclose(found.out, wide.out, atol=2**-8 * float(jnp.abs(value).max()))
    np.testing.assert_allclose(found.lse, wide.lse, rtol=1e-5, atol=1e-5)
