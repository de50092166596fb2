"""Where a value inside a loop or a call comes from."""

from typing import NamedTuple, TypeAlias

from dspark_jax.plan.hlo.fusion import aliases
from dspark_jax.plan.hlo.text import Computation, Instruction, Module

SAME = ("bitcast", "optimization-barrier")
COPIED = (*SAME, "copy", "copy-start", "copy-done", "convert", "reshape")


class Scope(NamedTuple):
    """A computation as some instruction of another one runs it; the entry has no caller."""

    module: Module
    computation: Computation
    caller: "Scope | None" = None
    call: Instruction | None = None

    def enter(self, call: Instruction, computation: Computation) -> "Scope":
        """The computation that one of our instructions runs."""
        return Scope(self.module, computation, self, call)


Value: TypeAlias = tuple[Scope, Instruction]


def origin(scope: Scope, name: str, through: tuple[str, ...] = SAME, fixed: bool = False) -> Value:
    """The instruction that made a value, seen through tuples, loops, calls and updates in place.

    What a loop carries counts as what it began with; with `fixed` only if the loop never changes
    it.
    """
    one = scope.computation[name]
    if one.opcode in through:
        return origin(scope, one.operands[0], through, fixed)
    if one.opcode == "get-tuple-element":
        return _element(scope, one.operands[0], one.element, through, fixed) or (scope, one)
    if one.opcode == "parameter" and scope.caller and scope.call and scope.call.opcode != "while":
        given = _operand(scope.call, scope, int(one.inside))
        return origin(scope.caller, given, through, fixed)
    if not fixed and 0 in (updated := aliases(scope.module, one)):
        return origin(scope, one.operands[updated[0]], through, fixed)
    return scope, one


def _element(
    scope: Scope, name: str, index: int, through: tuple[str, ...], fixed: bool
) -> Value | None:
    """The origin of one element of a tuple; None when an instruction makes the tuple anew."""
    one = scope.computation[name]
    if one.opcode == "tuple":
        return origin(scope, one.operands[index], through, fixed)
    if one.opcode in SAME:
        return _element(scope, one.operands[0], index, through, fixed)
    if one.opcode == "while":
        if fixed and not carried(scope.module, one, index):
            return None
        return _element(scope, one.operands[0], index, through, fixed)
    if one.opcode == "parameter" and scope.caller and scope.call:
        call, outer = scope.call, scope.caller
        if call.opcode == "while" and fixed and not carried(scope.module, call, index):
            return None
        given = _operand(call, scope, int(one.inside))
        return _element(outer, given, index, through, fixed)
    updated = {} if fixed else aliases(scope.module, one)
    if index in updated:
        return origin(scope, one.operands[updated[index]], through, fixed)
    return None


def _operand(call: Instruction, scope: Scope, parameter: int) -> str:
    """What a caller gives for a parameter; a conditional gives each branch one operand."""
    if call.opcode != "conditional":
        return call.operands[parameter]
    return call.operands[1 + branches(call).index(scope.computation.name)]


def branches(conditional: Instruction) -> list[str]:
    """The computations one of which a conditional runs."""
    listed = conditional.attributes.partition("branch_computations={")[2].partition("}")[0]
    if listed:
        return [name.strip().lstrip("%") for name in listed.split(",")]
    return [conditional.attribute(key) for key in ("true_computation", "false_computation")]


def carried(module: Module, loop: Instruction, index: int) -> bool:
    """Whether a loop hands this element on unchanged."""
    body = module.called(loop, "body")
    root = body[body.root]
    if root.opcode != "tuple":
        return False
    one = body[root.operands[index]]
    while one.opcode in SAME:
        one = body[one.operands[0]]
    if one.opcode != "get-tuple-element" or body[one.operands[0]].opcode != "parameter":
        return False
    return one.element == index
