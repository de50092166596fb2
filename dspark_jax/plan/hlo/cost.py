"""A compiled program's bytes, operations and exchanges per run, loops counted round by round.

`compiled.cost_analysis()` counts a loop's body once and knows nothing on a GPU; here every
instruction counts as often as it runs. Bytes are those between main memory and the cores: a
fusion's operands and results, of what is only sliced the slice, of what is updated in place the
update; nothing for arrays in a core's own memory.
"""

from collections.abc import Mapping
from typing import NamedTuple

from dspark_jax.plan.hlo.collectives import KINDS, Collective, WeightShapes, collective
from dspark_jax.plan.hlo.flops import Flops, estimate, flops
from dspark_jax.plan.hlo.fusion import SLICING, UPDATING, traffic, update_bytes
from dspark_jax.plan.hlo.labels import argument_names, is_kernel, label, loop_label
from dspark_jax.plan.hlo.loops import trip_count
from dspark_jax.plan.hlo.scope import Scope, branches, origin
from dspark_jax.plan.hlo.shapes import Shape, Type, leaves, main_bytes
from dspark_jax.plan.hlo.text import (
    Estimate,
    Instruction,
    Kernel,
    Module,
    parse_module,
)

FREE = frozenset(
    {"after-all", "bitcast", "constant", "domain", "get-tuple-element", "optimization-barrier"}
    | {"parameter", "partition-id", "replica-id", "tuple"}
)
OPEN_LOOP = "runs until its data says so: it counts once"
BUFFERS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
CALLS = {"call": "to_apply", "async": "calls"}


class Operation(NamedTuple):
    """All instructions of one origin in the traced program.

    `argument_bytes` are those of `bytes` that read the program's own arguments.
    """

    name: str
    bytes: int = 0
    argument_bytes: int = 0
    flops: int = 0
    times: int = 0


class Cost(NamedTuple):
    """Of one run on one device; `operations` begin with the dearest.

    `reads` are bytes read of an argument by an operation, by the operation's name and the
    argument's number, in the program's order; `arguments` are their names. `notes` say what could
    only be guessed.
    """

    bytes: int
    flops: int
    fp8_flops: int
    reads: Mapping[tuple[str, int], int]
    arguments: Mapping[int, str]
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    notes: tuple[str, ...]
    instructions: int = 0
    """Of the program's text, however often they run."""

    def read(self, argument: int) -> int:
        """Bytes read of one argument."""
        return sum(size for (_, number), size in self.reads.items() if number == argument)


def account(
    text: str,
    weights: WeightShapes = frozenset(),
    estimates: Mapping[Kernel, Estimate] | None = None,
) -> Cost:
    """The cost of the program whose optimised HLO this is (`compiled.as_text()`).

    Exchanges of arrays of the shapes in `weights` are marked; `estimates` are of kernels whose own
    the compiler drops.
    """
    module = parse_module(text, estimates)
    tally = _Tally(weights)
    tally.walk(Scope(module, module.entry), 1)
    count = sum(len(one.instructions) for one in module.computations.values())
    return tally.cost()._replace(arguments=argument_names(module), instructions=count)


class _Tally:
    """Sums that grow while the program is walked."""

    def __init__(self, weights: WeightShapes):
        self.weights = weights
        self.flops = Flops()
        self.reads: dict[tuple[str, int], int] = {}
        self.operations: dict[str, Operation] = {}
        self.collectives: dict[tuple[str, str, int, str], Collective] = {}
        self.notes: dict[str, None] = {}

    def cost(self) -> Cost:
        operations = sorted(self.operations.values(), key=lambda o: (-o.bytes, o.name))
        exchanged = sorted(self.collectives.values(), key=lambda c: -c.sent * c.times)
        total = sum(o.bytes for o in operations)
        flops, fp8_flops = self.flops
        found = (tuple(operations), tuple(exchanged), tuple(self.notes))
        return Cost(total, flops, fp8_flops, self.reads, {}, *found)

    def walk(self, scope: Scope, times: int) -> None:
        """Every instruction of a computation, `times` over."""
        for one in scope.computation.instructions.values():
            base = one.opcode.removesuffix("-start")
            if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
                continue
            if base == "while":
                self.loop(scope, one, times)
            elif base == "conditional":
                self.choose(scope, one, times)
            elif base in CALLS:
                inner = scope.module.called(one, CALLS[base])
                self.walk(scope.enter(one, inner), times)
            else:
                self.charge(scope, one, base, times)

    def loop(self, scope: Scope, one: Instruction, times: int) -> None:
        rounds = trip_count(scope, one)
        if rounds is None:
            self.notes[f"the loop of {loop_label(scope, one)} {OPEN_LOOP}"] = None
            rounds = 1
        for part, extra in ("body", 0), ("condition", 1):
            inner = scope.enter(one, scope.module.called(one, part))
            self.walk(inner, times * (rounds + extra))

    def choose(self, scope: Scope, one: Instruction, times: int) -> None:
        """The dearest branch."""
        tallies = []
        for name in branches(one):
            tally = _Tally(self.weights)
            tally.walk(scope.enter(one, scope.module.computations[name]), times)
            tallies.append(tally)
        self.absorb(max(tallies, key=lambda tally: tally.cost().bytes))

    def absorb(self, other: "_Tally") -> None:
        for operation in other.operations.values():
            self.add(operation)
        for exchanged in other.collectives.values():
            self.exchange(exchanged)
        for reading, read in other.reads.items():
            self.reads[reading] = self.reads.get(reading, 0) + read
        self.flops = Flops(*map(sum, zip(self.flops, other.flops, strict=True)))
        self.notes |= other.notes

    def charge(self, scope: Scope, one: Instruction, base: str, times: int) -> None:
        """One instruction that moves or computes."""
        moved, read, name = movement(scope, one, base), 0, label(scope, one)
        for operand, size in moved.reads:
            source, argument = origin(scope, operand)
            if source.caller is None and argument.opcode == "parameter":
                reading = (name, int(argument.inside))
                self.reads[reading] = self.reads.get(reading, 0) + size * times
                read += size
        counted = flops(scope.module, scope.computation, one)
        self.flops = Flops(*(a + b * times for a, b in zip(self.flops, counted, strict=True)))
        total = sum(size for _, size in moved.reads) + moved.writes
        if total or counted.all:
            self.add(Operation(name, total * times, read * times, counted.all * times, times))
        for found, kind, types in exchanges(scope, one, base):
            self.exchange(collective(scope.module, found, kind, types, self.weights, times, name))
        if (
            base == "custom-call"
            and total
            and estimate(scope.module, one) is None
            and is_kernel(one)
        ):
            self.notes[f"{name} states no operations: only its bytes count"] = None

    def add(self, operation: Operation) -> None:
        before = self.operations.get(operation.name, Operation(operation.name))
        sums = (a + b for a, b in zip(before[1:], operation[1:], strict=True))
        self.operations[operation.name] = Operation(operation.name, *sums)

    def exchange(self, new: Collective) -> None:
        key = (new.kind, new.shape, new.group, new.name)
        old = self.collectives.get(key)
        self.collectives[key] = new._replace(times=new.times + (old.times if old else 0))


class Movement(NamedTuple):
    """Bytes of main memory: read of every operand, and written."""

    reads: tuple[tuple[str, int], ...]
    writes: int


def movement(scope: Scope, one: Instruction, base: str) -> Movement:
    """What one instruction moves; `base` is its opcode without `-start`."""
    inside = scope.computation
    types = [inside[name].type for name in one.operands]
    result = inside.result(one) if one.opcode != base else one.type
    if base == "custom-call" and any(f'target="{name}"' in one.attributes for name in BUFFERS):
        return Movement((), 0)
    if base == "fusion":
        return _fusion(scope.module, one, types, result)
    if base in SLICING and len(types) > 0:
        sliced = min(main_bytes(types[0]), sum(s.bytes for s in leaves(result)))
        rest = [(name, main_bytes(kind)) for name, kind in zip(one.operands, types, strict=True)]
        return Movement(((one.operands[0], sliced), *rest[1:]), main_bytes(result))
    reads = [(name, main_bytes(kind)) for name, kind in zip(one.operands, types, strict=True)]
    if base in UPDATING:
        written = update_bytes(inside, one) if main_bytes(result) else 0
        return Movement(tuple(reads[1:]), written)
    stated = estimate(scope.module, one) if base == "custom-call" else None
    if stated is not None:
        return _kernel(one, types, result, stated.bytes)
    return Movement(tuple(reads), main_bytes(result))


def _fusion(module: Module, one: Instruction, types: list[Type], result: Type) -> Movement:
    read, updates = traffic(module, one)
    reads = [
        (name, size if main_bytes(kind) else 0)
        for name, kind, size in zip(one.operands, types, read, strict=True)
    ]
    written = 0
    for number, part in enumerate([result] if isinstance(result, Shape) else result):
        size = main_bytes(part)
        written += updates[number].bytes if size and number in updates else size
    return Movement(tuple(reads), written)


def _kernel(one: Instruction, types: list[Type], result: Type, stated: int) -> Movement:
    """What a kernel states, less what lies in the core's own memory already.

    The rest is spread over its operands by their size, its results being written whole. Of a stack
    as high as the largest operand a kernel reads as small a part as of that: within the core it has
    its share of what is stated, where another operand has all its bytes.
    """
    sizes = [main_bytes(kind) for kind in types]
    largest = max(zip(sizes, types, strict=True), key=lambda pair: pair[0], default=(0, ()))[1]
    inside = [(kind, sum(s.bytes for s in leaves(kind)) - main_bytes(kind)) for kind in types]
    stacked = sum(size for kind, size in inside if _stacked_alike(kind, largest))
    whole = sum(size for _, size in inside) - stacked
    whole += sum(s.bytes for s in leaves(result)) - main_bytes(result)
    rest = max(0, stated - whole)
    written = min(rest, main_bytes(result))
    share = (rest - written) / max(1, sum(sizes) + stacked)
    reads = [(name, round(size * share)) for name, size in zip(one.operands, sizes, strict=True)]
    read = sum(size for _, size in reads)
    return Movement(tuple(reads), rest - read - round(stacked * share))


def _stacked_alike(kind: Type, other: Type) -> bool:
    """Whether two arrays hold something for each of as many layers."""
    if not isinstance(kind, Shape) or not isinstance(other, Shape):
        return False
    return min(len(kind.dims), len(other.dims)) > 2 and kind.dims[0] == other.dims[0]


def exchanges(
    scope: Scope, one: Instruction, base: str
) -> list[tuple[Instruction, str, tuple[Type, Type]]]:
    """The collectives that an instruction is or holds, with their operands' and results' types."""
    inside = scope.computation
    if base in KINDS:
        given = tuple(inside[name].type for name in one.operands)
        return [(one, base, (given, inside.result(one) if one.opcode != base else one.type))]
    if base != "fusion":
        return []
    inner = Scope(scope.module, scope.module.called(one))
    return [
        found
        for held in inner.computation.instructions.values()
        if not held.opcode.endswith(("-done", "-update"))
        for found in exchanges(inner, held, held.opcode.removesuffix("-start"))
    ]
