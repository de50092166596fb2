"""Rows of a cache: written where they stand, overwritten rather than rolled back."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Memory = TypeVar("Memory")


class Cached(NamedTuple):
    """A layer's memory: arrays [B C …], or [layers B C …] of which `layer` says the one.

    Stacked arrays are written in place, row by row; to take a layer out and put it back would copy
    the whole cache at every step.
    """

    arrays: Any
    layer: Any = None

    def write(self, new: Any, position: Int[Array, "B S"]) -> "Cached":
        """With `new` [B S …] at `position`; one past the capacity is dropped."""
        front = () if self.layer is None else (self.layer,)
        return self._replace(arrays=write_rows(self.arrays, new, position, *front))

    def write_heads(self, new: Any, position: Int[Array, "B S"]) -> "Cached":
        """The same for arrays [… B H C …] and `new` [B S H …]."""
        front = () if self.layer is None else (self.layer,)
        row = jnp.arange(position.shape[0])[:, None]
        return self._replace(
            arrays=jax.tree.map(
                lambda old, rows: old.at[(*front, row, slice(None), position)].set(
                    # Indices apart from one another put what they index in front: [B S H …].
                    rows.astype(old.dtype),
                    mode="drop",
                ),
                self.arrays,
                new,
            )
        )

    def read(self) -> Any:
        """This layer's arrays, as they are now."""
        if self.layer is None:
            return self.arrays
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), self.arrays
        )


def write_rows(cached: Memory, new: Memory, position: Int[Array, "B S"], *front: Any) -> Memory:
    """Arrays [… B C …] with `new` [B S …] at `position`; one past the capacity is dropped."""
    row = jnp.arange(position.shape[0])[:, None]
    return jax.tree.map(
        lambda old, rows: old.at[(*front, row, position)].set(rows.astype(old.dtype), mode="drop"),
        cached,
        new,
    )
