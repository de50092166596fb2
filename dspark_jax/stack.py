"""How a model's layers are stored and run: one by one when few, stacked and scanned when many.

Scanning keeps compile time flat in depth; on a CPU it also copies every layer's weights out of the
stack at every step (measured: three times slower for a small model), hence the choice.
A model of unlike layers is cut into groups, each a short unit of layers that repeats.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

LONGEST_UNIT = 8


class Group(NamedTuple):
    """`repeats` copies of `unit` layers, beginning with layer `start`; scanned when repeats > 1."""

    start: int
    unit: int
    repeats: int

    def layer(self, member: int, repeat: int = 0) -> int:
        """Index in the model of one member of the unit at one repeat."""
        return self.start + repeat * self.unit + member


def plan_groups(kinds: Sequence[Hashable], unroll: int) -> tuple[Group, ...]:
    """Cut layers of the given kinds into groups; up to `unroll` layers each is its own."""
    if len(kinds) <= unroll:
        return tuple(Group(i, 1, 1) for i in range(len(kinds)))
    groups, start = [], 0
    while start < len(kinds):
        best = max(
            (
                Group(start, unit, _repeats(kinds, start, unit))
                for unit in range(1, LONGEST_UNIT + 1)
            ),
            key=lambda g: (g.unit * g.repeats if g.repeats > 1 else 1, -g.unit),
        )
        groups.append(best if best.repeats > 1 else Group(start, 1, 1))
        start += groups[-1].unit * groups[-1].repeats
    return tuple(groups)


def _repeats(kinds: Sequence[Hashable], start: int, unit: int) -> int:
    first, count = kinds[start : start + unit], 1
    while kinds[start + count * unit : start + (count + 1) * unit] == first:
        count += 1
    return count if len(first) == unit else 0


def build_layers(
    groups: Sequence[Group], make: Callable[[int, nnx.Rngs], nnx.Module], rngs: nnx.Rngs
) -> nnx.List:
    """Layers as a list of groups of unit members; `make(layer, rngs)` builds one layer."""

    def build(group: Group, member: int) -> nnx.Module:
        layer = group.layer(member)
        if group.repeats == 1:
            return make(layer, rngs)
        stacked = nnx.vmap(lambda r: make(layer, r), in_axes=0, out_axes=0)
        return stacked(rngs.split(group.repeats))

    return nnx.List([nnx.List([build(g, m) for m in range(g.unit)]) for g in groups])


def members(groups: Sequence[Group]) -> Iterator[tuple[int, int, int | None, int]]:
    """(group, member, repeat or None when not stacked, layer) of every layer."""
    for g, group in enumerate(groups):
        for repeat in range(group.repeats):
            for member in range(group.unit):
                stacked = repeat if group.repeats > 1 else None
                yield g, member, stacked, group.layer(member, repeat)


def run_layers(
    groups: Sequence[Group],
    layers: nnx.List,
    carry: Any,
    inputs: Sequence[Sequence[Any]],
    step: Callable[..., tuple[Any, Any]],
) -> tuple[Any, list[tuple[Any, ...]]]:
    """Run `step(layer, carry, input) -> (carry, output)` over all layers.

    `inputs[g][m]` belongs to member m of group g, with a leading repeat axis when the group is
    scanned; outputs come back in the same arrangement.
    """
    outputs = []
    for group, unit, given in zip(groups, layers, inputs, strict=True):
        if group.repeats == 1:
            carry, output = step(unit[0], carry, given[0])
            outputs.append((output,))
            continue
        graphdef, params = nnx.split(unit)

        def repeat(carry: Any, scanned: Any, graphdef: Any = graphdef) -> tuple[Any, Any]:
            params, given = scanned
            collected = []
            for layer, value in zip(nnx.merge(graphdef, params, copy=True), given, strict=True):
                carry, output = step(layer, carry, value)
                collected.append(output)
            return carry, tuple(collected)

        carry, output = jax.lax.scan(repeat, carry, (params, tuple(given)))
        outputs.append(output)
    return carry, outputs


def run_cached(
    groups: Sequence[Group],
    layers: nnx.List,
    carry: Any,
    inputs: Sequence[Sequence[Any]],
    caches: Sequence[Sequence[Any]],
    step: Callable[..., tuple[Any, Any]],
) -> tuple[Any, tuple[tuple[Any, ...], ...]]:
    """Run `step(layer, carry, input, cache, repeat) -> (carry, cache)` over all layers.

    Of a scanned group a step gets the whole stack of its member's caches and the number of its own,
    so that they are changed in place; else its own cache and None.
    """
    kept: list[tuple[Any, ...]] = []
    for group, unit, given, cached in zip(groups, layers, inputs, caches, strict=True):
        if group.repeats == 1:
            carry, cache = step(unit[0], carry, given[0], cached[0], None)
            kept.append((cache,))
            continue
        graphdef, params = nnx.split(unit)

        def repeat(state: Any, scanned: Any, graphdef: Any = graphdef) -> tuple[Any, None]:
            (carry, caches), (params, given, number) = state, scanned
            after = []
            members = nnx.merge(graphdef, params, copy=True)
            for layer, value, cache in zip(members, given, caches, strict=True):
                carry, cache = step(layer, carry, value, cache, number)
                after.append(cache)
            return (carry, tuple(after)), None

        numbered = (params, tuple(given), jnp.arange(group.repeats))
        (carry, cached), _ = jax.lax.scan(repeat, (carry, tuple(cached)), numbered)
        kept.append(cached)
    return carry, tuple(kept)


def run_weights(
    groups: Sequence[Group],
    layers: Sequence[Sequence[Any]],
    carry: Any,
    inputs: Sequence[Sequence[Any]],
    step: Callable[..., tuple[Any, Any]],
) -> tuple[Any, list[tuple[Any, ...]]]:
    """`run_layers` for layers that are plain tuples of arrays, stacked where a group repeats."""
    outputs = []
    for group, unit, given in zip(groups, layers, inputs, strict=True):

        def once(carry: Any, scanned: Any) -> tuple[Any, Any]:
            collected = []
            for layer, value in zip(*scanned, strict=True):
                carry, output = step(layer, carry, value)
                collected.append(output)
            return carry, tuple(collected)

        scanned = (tuple(unit), tuple(given))
        carry, output = (
            once(carry, scanned) if group.repeats == 1 else jax.lax.scan(once, carry, scanned)
        )
        outputs.append(output)
    return carry, outputs
