"""Rows of a cache: written where they stand, overwritten rather than rolled back."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Memory = TypeVar("Memory")


def write_rows(cached: Memory, new: Memory, position: Int[Array, "B S"]) -> Memory:
    """Arrays [B C …] with `new` [B S …] at `position`; one past the capacity is dropped."""
    row = jnp.arange(position.shape[0])[:, None]
    return jax.tree.map(
        lambda old, rows: old.at[row, position].set(rows.astype(old.dtype), mode="drop"),
        cached,
        new,
    )


def write_heads(cached: Memory, new: Memory, position: Int[Array, "B S"]) -> Memory:
    """`write_rows` for arrays [B H C …], every head alike."""
    return jax.vmap(write_rows, in_axes=(1, 1, None), out_axes=1)(cached, new, position)
