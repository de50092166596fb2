"""What a fusion reads and writes: slices of what it only slices, and updates in place."""

import re
from functools import cache
from typing import NamedTuple

from dspark_jax.plan.hlo.shapes import Shape, leaves
from dspark_jax.plan.hlo.text import Computation, Instruction, Module

SLICING = ("dynamic-slice", "gather", "slice")
UPDATING = ("dynamic-update-slice", "scatter")
PASSING = ("bitcast", "convert", "copy", "reshape", "transpose")
ALIASED = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


class Update(NamedTuple):
    """One of a fusion's results that overwrites a part of one of its operands."""

    parameter: int
    bytes: int


class Traffic(NamedTuple):
    """Bytes that a fusion reads of every operand, and writes of every result that it updates."""

    reads: tuple[int, ...]
    updates: dict[int, Update]


def traffic(module: Module, fusion: Instruction) -> Traffic:
    """Bytes as laid out, wherever they lie; a result that is not updated is written whole."""
    computation = module.called(fusion)
    updates = _updates(_Key(module, computation))
    return Traffic(_reads(_Key(module, computation)), updates)


def aliases(module: Module, instruction: Instruction) -> dict[int, int]:
    """Results that are an operand's memory, by the operand's number."""
    if instruction.opcode == "fusion":
        found = _updates(_Key(module, module.called(instruction)))
        return {result: update.parameter for result, update in found.items()}
    if instruction.opcode in UPDATING:
        return {0: 0}
    listed = instruction.attributes.partition("output_to_operand_aliasing={")[2]
    listed = listed.partition("}, ")[0] if listed else ""
    return {int(result or 0): int(operand) for result, operand in ALIASED.findall(listed)}


def update_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes that a dynamic-update-slice or a scatter writes."""
    if instruction.opcode == "dynamic-update-slice":
        return computation[instruction.operands[1]].shape.bytes
    arrays = len(instruction.operands) // 2
    return sum(computation[name].shape.bytes for name in instruction.operands[arrays + 1 :])


class _Key:
    """A computation of a module, hashed by identity: a module may be large."""

    def __init__(self, module: Module, computation: Computation):
        self.module, self.computation = module, computation

    def __hash__(self) -> int:
        return id(self.computation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.computation is self.computation


@cache
def _updates(key: _Key) -> dict[int, Update]:
    """Results that update a parameter, by their number."""
    module, inner = key.module, key.computation
    root = inner[inner.root]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    found = {}
    for number, name in enumerate(results):
        one = _seen(inner, name)
        if one.opcode in UPDATING:
            target, size = _seen(inner, one.operands[0]), update_bytes(inner, one)
        elif one.opcode == "fusion" and 0 in (nested := _updates(_Key(module, module.called(one)))):
            target, size = _seen(inner, one.operands[nested[0].parameter]), nested[0].bytes
        else:
            continue
        if target.opcode == "parameter":
            found[number] = Update(int(target.inside), size)
    return found


@cache
def _reads(key: _Key) -> tuple[int, ...]:
    inner, updates = key.computation, _updates(key)
    updated = {update.parameter for update in updates.values()}
    return tuple(
        _read(key.module, inner, one, int(one.inside) in updated) for one in inner.parameters
    )


def _read(module: Module, inner: Computation, one: Instruction, updated: bool) -> int:
    """Bytes read of a value inside a fusion; of one that is updated, not what is overwritten."""
    full, total = _size(one), 0
    for user in inner.users[one.name]:
        if user.name != inner.root and one.name in _passed(module, user):
            total += _read(module, inner, user, updated) * full // max(1, _size(user))
        elif user.opcode in SLICING and user.operands.count(one.name) == 1:
            first = user.operands[0] == one.name
            total += _size(user) if first else full
        elif user.opcode in UPDATING and updated and user.operands[0] == one.name:
            total += full if one.name in user.operands[1:] else 0
        elif user.opcode == "fusion":
            reads = _reads(_Key(module, module.called(user)))
            pairs = zip(user.operands, reads, strict=True)
            total += sum(read for name, read in pairs if name == one.name)
        else:
            return full
    return min(total, full)


def _passed(module: Module, one: Instruction) -> tuple[str, ...]:
    """What an instruction hands on element by element, so that a slice of it needs a slice."""
    if one.opcode in PASSING:
        return one.operands
    if one.opcode != "fusion":
        return ()
    inner = module.called(one)
    seen = inner[inner.root]
    while seen.opcode in PASSING:
        seen = inner[seen.operands[0]]
    return (one.operands[int(seen.inside)],) if seen.opcode == "parameter" else ()


def _size(one: Instruction) -> int:
    return sum(shape.bytes for shape in leaves(one.type))


def _seen(inner: Computation, name: str) -> Instruction:
    """What a value is once bitcasts are removed."""
    one = inner[name]
    while one.opcode == "bitcast" and isinstance(one.type, Shape):
        one = inner[one.operands[0]]
    return one
