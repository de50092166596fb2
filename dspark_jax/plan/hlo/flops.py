"""Operations of the matrix products of a program; nothing else is counted."""

import json
import re
from functools import cache
from typing import NamedTuple

from dspark_jax.plan.hlo.shapes import Shape, leaves
from dspark_jax.plan.hlo.text import Computation, Estimate, Instruction, Module

STATED = re.compile(r'"cost_estimate":(\{[^}]*\})')
CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"\]')
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"window=\{([^}]*)\}")


class Flops(NamedTuple):
    """Multiplications and additions; `fp8` of them between FP8 numbers on both sides."""

    all: int = 0
    fp8: int = 0


def estimate(module: Module, instruction: Instruction) -> Estimate | None:
    """The `pl.CostEstimate` of a Pallas kernel, None where there is none."""
    found = STATED.search(instruction.attributes)
    if found is None:
        path = instruction.op_name.removesuffix("/pallas_call")
        first = next(leaves(instruction.type), None)
        return module.estimates.get((path.rpartition("/")[2], str(first)))
    said = json.loads(found.group(1))
    return Estimate(int(said.get("flops", 0)), int(said.get("bytes_accessed", 0)))


def flops(module: Module, inside: Computation, instruction: Instruction) -> Flops:
    """Of one instruction, with all that a fusion holds."""
    stated = estimate(module, instruction) if instruction.opcode == "custom-call" else None
    if stated is not None:
        return Flops(stated.flops)
    count = _COUNTED.get(instruction.opcode)
    if count is not None:
        number = count(inside, instruction)
        return Flops(number, number if _is_fp8(inside, instruction) else 0)
    if instruction.opcode == "fusion":
        return _of_computation(module, module.called(instruction))
    return Flops()


def _of_computation(module: Module, computation: Computation) -> Flops:
    parts = [flops(module, computation, one) for one in computation.instructions.values()]
    return Flops(*(sum(part) for part in zip(*parts, strict=True)))


def _dot(inside: Computation, dot: Instruction) -> int:
    left = inside[dot.operands[0]].shape
    terms = 1
    for axis in dot.numbers("lhs_contracting_dims"):
        terms *= left.dims[axis]
    return 2 * dot.shape.elements * terms


def _ragged_dot(inside: Computation, dot: Instruction) -> int:
    """Every row meets one matrix."""
    return 2 * dot.shape.elements * inside[dot.operands[0]].shape.dims[-1]


def _convolution(inside: Computation, one: Instruction) -> int:
    """TPU products are convolutions; a batch is a dilated spatial axis, one tap of which counts."""
    labels = LABELS.search(one.attributes)
    assert labels, one.name
    left, right, out = labels.groups()
    x, kernel = (inside[name].shape for name in one.operands[:2])
    outer = [one.shape.dims[out.index(label)] for label in "bf"]
    total = 2 * outer[0] * outer[1] * kernel.dims[right.index("i")]
    for axis in range(len(out) - 2):
        inputs, outputs = x.dims[left.index(str(axis))], one.shape.dims[out.index(str(axis))]
        total *= _taps(inputs, outputs, _window(one, axis))
    return total


class _Window(NamedTuple):
    size: int
    stride: int
    before: int
    lhs_dilate: int
    rhs_dilate: int


def _window(one: Instruction, axis: int) -> _Window:
    found = WINDOW.search(one.attributes)
    given = dict(part.split("=") for part in found.group(1).split()) if found else {}

    def of(key: str, default: int) -> int:
        return int(given[key].split("x")[axis].split("_")[0]) if key in given else default

    return _Window(
        of("size", 1), of("stride", 1), of("pad", 0), of("lhs_dilate", 1), of("rhs_dilate", 1)
    )


@cache
def _taps(inputs: int, outputs: int, window: _Window) -> int:
    """Pairs of an output and a kernel element that meet a real input along one axis."""
    last = (inputs - 1) * window.lhs_dilate
    places = (
        o * window.stride + k * window.rhs_dilate - window.before
        for o in range(outputs)
        for k in range(window.size)
    )
    return sum(1 for at in places if 0 <= at <= last and at % window.lhs_dilate == 0)


def _reduced_product(inside: Computation, one: Instruction) -> int:
    """A product that the compiler wrote as a multiplication and a sum."""
    summed = inside[one.operands[0]]
    while summed.opcode in ("convert", "bitcast"):
        summed = inside[summed.operands[0]]
    if summed.opcode != "multiply" or not one.op_name.endswith("dot_general"):
        return 0
    return 2 * summed.shape.elements


def _custom_call(inside: Computation, one: Instruction) -> int:
    """A library's matrix product."""
    contracted = CONTRACTED.search(one.attributes)
    if contracted is None or "__cublas" not in one.attributes:
        return 0
    left, result = inside[one.operands[0]].shape, next(leaves(one.type))
    return 2 * result.elements * left.dims[int(contracted.group(1))]


_COUNTED = {
    "dot": _dot,
    "ragged-dot": _ragged_dot,
    "convolution": _convolution,
    "reduce": _reduced_product,
    "custom-call": _custom_call,
}


def _is_fp8(inside: Computation, one: Instruction) -> bool:
    if one.opcode not in ("dot", "convolution", "ragged-dot"):
        return False
    types = [inside[name].type for name in one.operands[:2]]
    return all(isinstance(kind, Shape) and kind.dtype.startswith("f8") for kind in types)
