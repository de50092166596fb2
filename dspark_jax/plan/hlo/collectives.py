"""What devices send one another."""

import re
from typing import NamedTuple

from dspark_jax.plan.hlo.shapes import Shape, Type, leaves
from dspark_jax.plan.hlo.text import Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=")
LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
MESH = re.compile(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}")
AXIS = re.compile(r"'(\w+)'=(\d+)")
USED = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")

WeightShapes = frozenset[tuple[str, tuple[int, ...]]]


class Collective(NamedTuple):
    """One kind of exchange: `times` per step, each among `group` devices.

    `bytes` is the larger of what a device has before and after; `sent` what it sends over its
    links when the exchange goes round a ring. `carries_weights` when an array that is gathered,
    or a part of it, has the shape of a weight.
    """

    kind: str
    shape: str
    bytes: int
    sent: int
    group: int
    times: int
    carries_weights: bool
    name: str


def collective(
    module: Module,
    instruction: Instruction,
    kind: str,
    types: tuple[Type, Type],
    weights: WeightShapes,
    times: int,
    name: str,
) -> Collective:
    """An exchange with operands and results of these types."""
    given, result = types
    before, after = (sum(s.packed_bytes for s in leaves(t)) for t in (given, result))
    group = group_size(module, instruction)
    shape = " + ".join(dict.fromkeys(str(s) for s in leaves(result)))
    carried = any(same_shape(s) in weights for t in types for s in leaves(t))
    sent = sent_bytes(kind, before, after, group)
    return Collective(kind, shape, max(before, after), sent, group, times, carried, name)


def sent_bytes(kind: str, before: int, after: int, group: int) -> int:
    """Per device, round a ring."""
    share = (group - 1) / group if group else 0
    if kind == "all-reduce":
        return round(2 * before * share)
    if kind in ("collective-permute", "collective-broadcast"):
        return before
    return round(max(before, after) * share)


def group_size(module: Module, instruction: Instruction) -> int:
    """Devices that take part in one exchange, in any of the three spellings."""
    text = instruction.attributes
    if found := IOTA.search(text):
        return int(found.group(1).split(",")[-1])
    if found := LISTED.search(text):
        return found.group(1).count(",") + 1
    if found := MESH.search(text):
        sizes = dict(AXIS.findall(found.group(1)))
        total = 1
        for axis, part in USED.findall(found.group(2)):
            total *= int(part or sizes[axis])
        return total
    return 2 if "source_target_pairs" in text else module.partitions


def same_shape(shape: Shape) -> tuple[str, tuple[int, ...]]:
    """Type and dimensions but those of one: a layer of a stack is that layer."""
    return shape.dtype, tuple(size for size in shape.dims if size != 1)
