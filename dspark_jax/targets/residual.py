"""The residual stream on its way through the layers, and the states a draft reads from it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dspark_jax.config import TargetConfig
from dspark_jax.stack import Group
from dspark_jax.targets.moe import Routing
from dspark_jax.types import TargetStates


class Carry(NamedTuple):
    """What one layer hands to the next: stream, last choice of keys, captured states."""

    x: Float[Array, "B T D"]
    selected: Bool[Array, "N S C"]
    aux: Float[Array, "A B T D"]


class Choices(NamedTuple):
    """What one layer decided and saw, None where it decides no such thing.

    Unused fields cost nothing once compiled.
    """

    routing: Routing | None
    index_scores: Float[Array, "B T C"] | None
    selected: Bool[Array, "B T C"] | None
    attention: Float[Array, "B T C"] | None


def enter(x: Float[Array, "B T D"], visible: Bool[Array, "N S C"], config: TargetConfig) -> Carry:
    """The embeddings, before the first layer; id 0 captures them."""
    ids = config.aux_layer_ids
    carry = Carry(x, visible, jnp.zeros((len(ids), *x.shape), x.dtype))
    return leave(carry, x, visible, aux_slots(ids, 0)[0])


def leave(carry: Carry, x: Any, selected: Any, slot: Any) -> Carry:
    """The carry after a layer, its output kept among the aux states when a draft reads it."""
    if isinstance(slot, int) and slot >= len(carry.aux):
        return Carry(x, selected, carry.aux)
    return Carry(x, selected, carry.aux.at[slot].set(x, mode="drop"))


def states(carry: Carry) -> TargetStates:
    """The captured states side by side, and the last one."""
    aux = jnp.moveaxis(carry.aux, 0, -2)
    return TargetStates(aux.reshape(*carry.x.shape[:-1], -1), carry.x)


def aux_slots(ids: Sequence[int], num_layers: int) -> list[int]:
    """Place among the aux states of the stream entering layers 0..L; out of range if unread."""
    return [ids.index(j) if j in ids else len(ids) for j in range(num_layers + 1)]


def layer_slots(groups: Sequence[Group], config: TargetConfig) -> list[tuple[Any, ...]]:
    """The slot of every layer's output, arranged like the layers: after layer i it has id i + 1."""
    slots = aux_slots(config.aux_layer_ids, config.num_hidden_layers)

    def of(group: Group, member: int) -> Any:
        if group.repeats == 1:
            return slots[group.layer(member) + 1]
        return np.array([slots[group.layer(member, r) + 1] for r in range(group.repeats)])

    return [tuple(of(group, member) for member in range(group.unit)) for group in groups]
