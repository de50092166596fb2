"""What costs a compiled step the bytes above its floor, operation by operation."""

from collections.abc import Sequence
from typing import NamedTuple

from dspark_jax.plan.hlo.cost import Cost


class Excess(NamedTuple):
    """Bytes that an operation moves above what it must: `again` of arguments, which others have
    read already or nobody needs, named by `argument`; the rest is neither weight nor cache."""

    name: str
    argument: str
    times: int
    moved: int
    again: float
    above: float


def excesses(cost: Cost, floors: Sequence[float]) -> tuple[Excess, ...]:
    """Of all operations, the dearest first.

    The floor of every argument (`floors`, by its number) belongs to the operations that read it
    first, in the program's order. All `above` and what nobody reads of the floors make the
    difference between the bytes moved and the floor.
    """
    left = list(floors)
    again: dict[str, dict[str, float]] = {one.name: {} for one in cost.operations}
    needed = dict.fromkeys(again, 0.0)
    for (name, number), size in cost.reads.items():
        due = min(size, left[number])
        left[number] -= due
        needed[name] += due
        argument = cost.arguments.get(number, f"argument {number}")
        again[name][argument] = again[name].get(argument, 0.0) + size - due
    found = []
    for one in cost.operations:
        argument, most = max(again[one.name].items(), key=lambda pair: pair[1], default=("", 0.0))
        total = sum(again[one.name].values())
        above = one.bytes - needed[one.name]
        found.append(Excess(one.name, argument if most else "", one.times, one.bytes, total, above))
    return tuple(sorted(found, key=lambda one: -one.above))
