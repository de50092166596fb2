"""What instructions are called: by their place in the traced program, or by what they do.

Models name their parts with `jax.named_scope`, and arguments have the names of their trees.
"""

import re
from collections import Counter

from dspark_jax.plan.hlo.scope import Scope, origin
from dspark_jax.plan.hlo.shapes import leaves
from dspark_jax.plan.hlo.text import Instruction, Module

PLUMBING = frozenset(
    {"while", "body", "cond", "branch_0_fun", "branch_1_fun", "closed_call", "shard_map"}
    | {"checkpoint", "jit", "pjit", ""}
)
WRAPPED = re.compile(r"^\w+\((.*)\)$")
KEY = re.compile(r"\['?(\w+)'?\]|(\w+)")
WRITTEN = re.compile(r"\\(.)")
UNSAID = frozenset({"weights", "state", "target", "value", "values", "kernel", "layers"})
"""Parts of an argument's name that tell a reader nothing, as numbers do."""


def label(scope: Scope, one: Instruction) -> str:
    """Where an instruction comes from: `verify/attention/scores/dot_general`.

    What the compiler added has no place in the traced program and goes by what it is, and by the
    argument it is made of.
    """
    path = place(one)
    if path:
        return "/".join(path)
    made = re.sub(r"[.0-9]+$", "", one.name)
    for operand in one.operands:
        source, argument = origin(scope, operand)
        if source.caller is None and argument.opcode == "parameter" and argument.op_name:
            return f"{made.removesuffix('-start')} of {spoken(argument.op_name)}"
    kind = " + ".join(dict.fromkeys(str(s) for s in leaves(scope.computation.result(one))))
    return f"{made} {kind}"


def place(one: Instruction) -> list[str]:
    """The path of an instruction in the traced program; empty when the compiler added it."""
    _, _, rest = one.op_name.partition("/")
    parts = (WRAPPED.sub(r"\1", part) for part in rest.split("/"))
    return [part for part in parts if part not in PLUMBING and "->" not in part]


def loop_label(scope: Scope, loop: Instruction) -> str:
    """Where most instructions of a loop come from."""
    inside = scope.module.called(loop, "body").instructions.values()
    places = Counter("/".join(path[:-1]) for one in inside if (path := place(one)))
    return (places.most_common(1)[0][0] if places else "") or label(scope, loop)


def argument_names(module: Module) -> dict[int, str]:
    """What the program's arguments are called, by their number."""
    return {int(one.inside): spoken(one.op_name) for one in module.entry.parameters}


def spoken(name: str) -> str:
    """`weights['layers'][1][0]['mlp']['gate']['kernel'].value` as mlp.gate."""
    keys = (a or b for a, b in KEY.findall(WRITTEN.sub(r"\1", name)))
    return ".".join(key for key in keys if key not in UNSAID and not key.isdigit()) or name


def is_kernel(one: Instruction) -> bool:
    """Whether it is a kernel of the traced program; the compiler's own have no place there."""
    target = one.attributes.partition('custom_call_target="')[2][:40]
    ours = target.startswith(("tpu_custom_call", "mosaic")) and bool(place(one))
    return one.opcode == "custom-call" and ours
