"""The text of an optimised HLO module as computations of instructions."""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from dspark_jax.plan.hlo.shapes import Shape, Type, parse_type

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
LEFT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
OPERAND = re.compile(r"%([\w.\-]+)")
COMMENT = re.compile(r"/\*.*?\*/")
INDEX = re.compile(r"\bindex=(\d+)")
PARTITIONS = re.compile(r"num_partitions=(\d+)")
OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


class Instruction(NamedTuple):
    """One line; `inside` is what stands between the parentheses, `attributes` all after them."""

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def attribute(self, key: str) -> str:
        """The computation that an attribute names; empty when there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute like `dimensions={0,2}`."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    @property
    def element(self) -> int:
        """The element that a get-tuple-element takes."""
        found = INDEX.search(self.attributes)
        assert found, self.name
        return int(found.group(1))

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty when the compiler does not say."""
        found = OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def shape(self) -> Shape:
        """The type of an instruction that gives one array."""
        assert isinstance(self.type, Shape), self.name
        return self.type


class Computation:
    """Instructions by name, in their order."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self.root = ""

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """In the order in which a caller gives them."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return tuple(sorted(found, key=lambda one: int(one.inside)))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """What reads an instruction, once each."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self.instructions.values():
            for operand in dict.fromkeys(one.operands):
                found[operand].append(one)
        return found

    def result(self, start: Instruction) -> Type:
        """What the asynchronous `start` gives when it is done; its own type if nothing waits."""
        for user in self.users[start.name]:
            if user.opcode.endswith("-done"):
                return user.type
            if user.opcode.endswith("-update"):
                return self.result(user)
        return start.type


Kernel = tuple[str, str]
"""A kernel's name and its first result, as `f32[8,128]`."""


class Estimate(NamedTuple):
    """What a kernel states of itself."""

    flops: int
    bytes: int


class Module(NamedTuple):
    """A program; `partitions` is how many devices run it.

    `estimates` are those of kernels that the text itself does not repeat.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    estimates: Mapping[Kernel, Estimate]

    def called(self, instruction: Instruction, key: str = "calls") -> Computation:
        """The computation that an instruction names."""
        return self.computations[instruction.attribute(key)]


def parse_module(text: str, estimates: Mapping[Kernel, Estimate] | None = None) -> Module:
    """Read `compiled.as_text()` of any backend."""
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            found = HEADER.match(line)
            if found and not line.startswith("HloModule"):
                current = computations[found.group(2)] = Computation(found.group(2))
                entry = current if found.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif found := LEFT.match(line):
            one = _instruction(found.group(2), COMMENT.sub("", line[found.end() :]))
            current.instructions[one.name] = one
            current.root = one.name if found.group(1) else current.root
    if entry is None:
        raise ValueError("this is not the text of an HLO module: no line begins with ENTRY.")
    partitions = PARTITIONS.search(text.split("\n", 1)[0])
    count = int(partitions.group(1)) if partitions else 1
    return Module(computations, entry, count, estimates or {})


def _instruction(name: str, text: str) -> Instruction:
    kind, at = parse_type(text)
    opening = text.index("(", at)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    operands = () if "%" not in inside else tuple(OPERAND.findall(inside))
    opcode = text[at:opening].strip()
    return Instruction(name, kind, opcode, operands, inside, text[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for found in re.compile(r'[()]|"(?:[^"\\]|\\.)*"').finditer(text, opening):
        depth += {"(": 1, ")": -1}.get(found.group(), 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is never closed in {text[:80]!r}.")
