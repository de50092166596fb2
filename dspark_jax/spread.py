"""A model's share of a mesh: the collectives that its code asks for, by what they are for.

A target and a draft that are spread over devices run as one program per device, on that device's
part of the weights. `data` groups of devices hold different sequences, and the `tensor` devices of
a group share every layer's heads and columns; the routed experts are shared by all of them. Without
a mesh every collective is nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from dspark_jax.sharding import DATA, TENSOR
from dspark_jax.types import Recipe


@dataclass(frozen=True)
class Spread:
    """How many devices share the work, and whether each group has sequences of its own.

    A batch that the groups cannot share evenly is whole on every one of them.
    """

    data: int = 1
    tensor: int = 1
    rows_split: bool = False

    def sum(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The sum of what the devices of a group have computed, each from its own columns."""
        return jax.lax.psum(x, TENSOR) if self.tensor > 1 else x

    def columns(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows N"]:
        """The columns of all devices of a group, side by side.

        Gathered so at once, a TPU would lay each column out for itself and pad every row of it.
        """
        if self.tensor == 1:
            return x
        return jnp.moveaxis(self.stacked(x), 0, -2).reshape(*x.shape[:-1], -1)

    def stacked(self, x: Shaped[Array, "*rest"]) -> Shaped[Array, "devices *rest"]:
        """What all devices of a group have, one behind the other."""
        return jax.lax.all_gather(x, TENSOR) if self.tensor > 1 else x[None]

    def anywhere(self, said: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether any group says so, of what a group's devices say alike."""
        return jax.lax.psum(said.astype(jnp.int32), DATA) > 0 if self.rows_split else said

    def embed(
        self, table: Float[Array, "V D"], tokens: Int[Array, "*rows"]
    ) -> Float[Array, "*rows D"]:
        """Rows of a table of which every device of a group has a part."""
        if self.tensor == 1:
            return table[tokens]
        local = tokens - self.first(len(table))
        here = (local >= 0) & (local < len(table))
        with jax.named_scope("embed"):
            return self.sum(jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0))

    def first(self, size: int) -> int | Int[Array, ""]:
        """Where this device's `size` columns begin."""
        return jax.lax.axis_index(TENSOR) * size if self.tensor > 1 else 0

    def first_of_all(self, size: int) -> int | Int[Array, ""]:
        """Where this device's `size` experts begin, which all devices share."""
        group = jax.lax.axis_index(DATA) if self.data > 1 else 0
        return (group * self.tensor) * size + self.first(size)

    def once(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """What all devices of a group have alike, on one of them, so that a sum counts it once."""
        return jnp.where(jax.lax.axis_index(TENSOR) == 0, x, 0) if self.tensor > 1 else x

    def all_rows(self, x: Float[Array, "B *rest"]) -> Float[Array, "all *rest"]:
        """The rows of all groups."""
        return jax.lax.all_gather(x, DATA, axis=0, tiled=True) if self.rows_split else x

    def own_rows(self, x: Shaped[Array, "all *rest"]) -> Shaped[Array, "B *rest"]:
        """This group's part of rows that all groups have."""
        if not self.rows_split:
            return x
        size = x.shape[0] // self.data
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DATA) * size, size)

    def sum_experts(
        self, routed: Float[Array, "all *rest"], shared: Float[Array, "B *rest"] | None
    ) -> Float[Array, "B *rest"]:
        """Own rows of what every device's experts give all rows, and of a group's own part."""
        if self.rows_split:
            routed = jax.lax.psum_scatter(routed, DATA, scatter_dimension=0, tiled=True)
        elif self.data > 1:
            # All groups have the same rows: one of them adds the shared part, one sum is enough.
            if shared is not None:
                routed = routed + jnp.where(jax.lax.axis_index(DATA) == 0, shared, 0)
            return jax.lax.psum(routed, (DATA, TENSOR) if self.tensor > 1 else DATA)
        return self.sum(routed if shared is None else routed + shared)


ALONE = Spread()


def over(mesh: Mesh | None, batch: int, split: bool = True) -> Spread:
    """The spread of a batch over a mesh; `split` False keeps the batch whole on every group."""
    if mesh is None:
        return ALONE
    data, tensor = mesh.shape[DATA], mesh.shape[TENSOR]
    return Spread(data, tensor, split and data > 1 and batch % data == 0)


def rows(spread: Spread) -> PartitionSpec:
    """Where the sequences of arrays [B …] lie."""
    return PartitionSpec(DATA) if spread.rows_split else PartitionSpec()


def recipe_lies(spread: Spread) -> Any:
    """Where the arrays of a `Recipe` lie: each device of a group has its own columns."""
    rows_axis: Any = DATA if spread.rows_split else None
    base, w2 = PartitionSpec(rows_axis, None, TENSOR), PartitionSpec(None, TENSOR)
    found: Any = {"base": base, "w2": w2}
    return Recipe(**dict.fromkeys(Recipe._fields, rows(spread)) | found)


def run(
    mesh: Mesh | None, function: Callable[..., Any], ins: tuple[Any, ...], outs: Any, *given: Any
) -> Any:
    """`function(*given)`, on every device with its own part of what is given."""
    if mesh is None:
        return function(*given)
    # What a collective leaves equal everywhere is for the tests to prove, not for the tracer.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return mapped(*given)
