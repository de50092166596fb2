"""How often a loop runs: as the compiler notes it, or read off its counter."""

import re

from dspark_jax.plan.hlo.scope import COPIED, Scope, origin
from dspark_jax.plan.hlo.text import Computation, Instruction, Module

KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def trip_count(scope: Scope, loop: Instruction) -> int | None:
    """Rounds of a while loop; None when they depend on data.

    Without a note the loop must count up: `index < bound` with a constant start, step and bound,
    as every scan and fori_loop does (the TPU compiler drops the note).
    """
    known = KNOWN.search(loop.attributes)
    if known:
        return int(known.group(1))
    module = scope.module
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    compare, names = _unfused(module, condition, condition.root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    index = _index(condition, names[0])
    if index is None:
        return None
    bound = _constant(scope.enter(loop, condition), names[1])
    start = _initial(scope, loop, index)
    step = _step(scope.enter(loop, body), index)
    if bound is None or start is None or step is None or step < 1:
        return None
    return max(0, -(-(bound - start) // step))


def _step(scope: Scope, index: int) -> int | None:
    """What a round adds to its counter."""
    body = scope.computation
    root = body[body.root]
    if root.opcode != "tuple":
        return None
    add, names = _unfused(scope.module, body, root.operands[index])
    if add.opcode != "add":
        return None
    own = [_index(body, name) == index for name in names]
    if own.count(True) != 1:
        return None
    return _constant(scope, names[own.index(False)])


def _unfused(module: Module, computation: Computation, name: str) -> tuple[Instruction, list[str]]:
    """An instruction and its operands' names, out of the fusion that may wrap it."""
    one = computation[name]
    while one.opcode in COPIED:
        one = computation[one.operands[0]]
    if one.opcode != "fusion":
        return one, list(one.operands)
    inner = module.called(one)
    wrapped, names = inner[inner.root], []
    for operand in wrapped.operands:
        given = inner[operand]
        if given.opcode == "parameter":
            names.append(one.operands[int(given.inside)])
        elif given.opcode == "constant":
            names.append(f"={given.inside}")
        else:
            return one, []
    return wrapped, names


def _index(computation: Computation, name: str) -> int | None:
    """Which element of the loop's tuple a value is."""
    if name.startswith("="):
        return None
    one = computation[name]
    while one.opcode in COPIED:
        one = computation[one.operands[0]]
    return one.element if one.opcode == "get-tuple-element" else None


def _initial(scope: Scope, loop: Instruction, index: int) -> int | None:
    start = scope.computation[loop.operands[0]]
    if start.opcode == "tuple":
        return _constant(scope, start.operands[index])
    return None


def _constant(scope: Scope, name: str) -> int | None:
    if name.startswith("="):
        return _integer(name[1:])
    _, one = origin(scope, name, COPIED, fixed=True)
    return _integer(one.inside) if one.opcode == "constant" else None


def _integer(literal: str) -> int | None:
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None
