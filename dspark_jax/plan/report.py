"""A plan for people: tables, the verdict, and what costs more than it must."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Column, Table

from dspark_jax.ops import told
from dspark_jax.plan.bounds import sent_bytes
from dspark_jax.plan.excess import excesses
from dspark_jax.plan.figures import TOLERANCE, Plan, Step
from dspark_jax.plan.hlo.cost import Cost

UNKNOWN = "-"
Figure = Callable[[Step, Cost], str]


def show(plan: Plan, console: Console) -> None:
    """Print all of it."""
    console.print(heading(plan), highlight=False, soft_wrap=True)
    console.print(memory_table(plan))
    console.print(verdict(plan), highlight=False, soft_wrap=True)
    console.print(step_table(plan))
    console.print(speedup(plan), highlight=False, soft_wrap=True)
    for name, step in ("speculative", plan.speculative), ("plain", plan.plain):
        if step.cost is None:
            continue
        if step.cost.collectives:
            console.print(collective_table(name, plan, step.cost))
        if (step.above_floor or 0) > TOLERANCE:
            console.print(excess_table(name, plan, step))
        for note in step.cost.notes:
            console.print(f"note ({name} step): {note}", highlight=False, markup=False)


def heading(plan: Plan) -> str:
    """What is planned."""
    s, draft, chip = plan.settings, plan.models.draft, plan.machine.chip
    stored = "bfloat16" if plan.models.block is None else "FP8"
    return (
        f"{s.target} ({stored}) with a draft of {draft.num_hidden_layers} layers and "
        f"{draft.draft_length} tokens on {plan.machine.name}: {plan.machine.devices} devices as "
        f"{plan.data} data x {plan.tensor} tensor; batch {s.batch}, context {s.context:,}\n"
        f"{sharing(plan)}\n"
        f"kernels: {told(plan.kernels)}\n"
        f"peaks of a device: {chip.bytes_per_second / 1e12:.2f} TB/s of memory, "
        f"{chip.bf16_flops / 1e12:,.0f} TFLOP/s in bfloat16, {chip.fp8_flops / 1e12:,.0f} in FP8, "
        f"{shown(chip.interconnect_bytes_per_second)}/s to others"
    )


def sharing(plan: Plan) -> str:
    """Who has which sequences."""
    batch, groups = plan.settings.batch, plan.data
    if batch % groups:
        return (
            f"{batch} sequences cannot be shared evenly by {groups} groups of {plan.tensor} "
            "devices: every group holds and decodes all of them"
        )
    return f"each group of {plan.tensor} devices decodes {batch // groups} sequences"


def memory_table(plan: Plan) -> Table:
    """Bytes per device."""
    m = plan.memory
    table = Table("bytes per device", _right(""))
    table.add_row("weights", shown(m.weights))
    table.add_row("cache", shown(m.cache))
    table.add_row("temporaries", UNKNOWN if m.temporaries is None else shown(m.temporaries))
    table.add_row("total", shown(m.total))
    table.add_row(f"memory of a {plan.machine.chip.name} device", shown(m.available))
    return table


def verdict(plan: Plan) -> str:
    """Whether it fits; if not, by how much, and what would."""
    m = plan.memory
    if m.fits:
        return f"It fits, with {shown(m.available - m.total)} to spare per device."
    if m.total <= m.available:
        return "It does not fit: the compiler refused it without saying by how much."
    r, s = plan.remedies, plan.settings
    options = [f"{r.devices} such devices instead of {plan.machine.devices}"]
    if r.batch:
        options.append(f"batch {r.batch} instead of {s.batch}")
    if r.context:
        options.append(f"context {r.context:,} instead of {s.context:,}")
    alone = "" if r.batch or r.context else " No batch or context would: the weights are too large."
    return (
        f"It does not fit: {shown(m.total - m.available)} too much per device. "
        f"What would: {', or '.join(options)}.{alone}"
    )


def step_table(plan: Plan) -> Table:
    """Per device and step, and what follows for tokens."""
    steps = (plan.plain, plan.speculative)
    table = Table("one step", *(_right(name) for name in ("plain", "speculative")))

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    def of_cost(name: str, figure: Figure) -> None:
        row(name, [UNKNOWN if s.cost is None else figure(s, s.cost) for s in steps])

    row("tokens verified per sequence", [str(step.tokens) for step in steps])
    row("tokens emitted per sequence", [f"{step.yields:g}" for step in steps])
    of_cost("moved per device", lambda _, cost: shown(cost.bytes))
    row("  floor: held and needed, once", [shown(step.floor_bytes) for step in steps])
    row("  floor if nothing were held twice", [shown(step.spread_bytes) for step in steps])
    of_cost("  times the floor", lambda step, _: f"{step.above_floor or 0:.2f}")
    of_cost("TFLOP per device", lambda _, cost: f"{cost.flops / 1e12:.3f}")
    of_cost("sent per device", lambda _, cost: shown(sent_bytes(cost)))
    limits = [plan.bound(step) for step in steps]
    for name in ("moving", "computing", "exchanging", "seconds"):
        label = "step, at least" if name == "seconds" else name
        row(
            f"ms {label}",
            [UNKNOWN if x is None else f"{1e3 * getattr(x, name):.3f}" for x in limits],
        )
    rates = [plan.rate(*pair) for pair in zip(steps, limits, strict=True)]
    row("tokens/s, at most", [UNKNOWN if rate is None else f"{rate:,.0f}" for rate in rates])
    floors = [plan.rate(step, plan.floor(step)) for step in steps]
    row("tokens/s at the floor", [f"{rate:,.0f}" for rate in floors if rate is not None])
    return table


def speedup(plan: Plan) -> str:
    """What speculation brings at this acceptance length."""
    accepted = f"acceptance length {plan.settings.acceptance_length:g}"
    pairs = [
        (plan.rate(step, plan.bound(step)), plan.rate(step, plan.floor(step)))
        for step in (plan.plain, plan.speculative)
    ]
    (plain, plain_floor), (fast, fast_floor) = pairs
    at_floor = f"{(fast_floor or 0) / (plain_floor or 1):.2f} times at the floor"
    if plain is None or fast is None:
        return f"Speculation at {accepted}: {at_floor}."
    return f"Speculation at {accepted}: {fast / plain:.2f} times as compiled, {at_floor}."


def collective_table(name: str, plan: Plan, cost: Cost) -> Table:
    """What devices exchange, most bytes first."""
    layers = plan.models.target.num_hidden_layers
    numbers = map(_right, ("devices", "times", "per layer", "sent"))
    title = f"exchanges of the {name} step"
    table = Table("exchange", Column("result", overflow="fold"), *numbers, "from", title=title)
    for one in cost.collectives[: plan.settings.operations]:
        kind = f"{one.kind} of weights" if one.carries_weights else one.kind
        sent = shown(one.sent * one.times)
        per_layer = f"{one.times / layers:.2f}"
        table.add_row(kind, one.shape, f"{one.group}", f"{one.times}", per_layer, sent, one.name)
    return table


def excess_table(name: str, plan: Plan, step: Step) -> Table:
    """What costs the bytes above the floor: the operations that cost most of them."""
    cost = step.cost
    assert cost is not None
    ratio, excess = step.above_floor or 0, cost.bytes - step.floor_bytes
    title = f"the {name} step moves {ratio:.2f} times its floor; {shown(excess)} above it:"
    numbers = map(_right, ("times", "moved", "above the floor"))
    table = Table("operation", *numbers, "reads again, or for nobody", title=title)
    found = excesses(cost, step.floors)
    for one in found[: plan.settings.operations]:
        again = f"{shown(one.again)} of {one.argument}" if one.argument else ""
        table.add_row(one.name, str(one.times), shown(one.moved), shown(one.above), again)
    rest = sum(one.above for one in found[plan.settings.operations :])
    unread = sum(one.above for one in found) - excess
    table.caption = f"all other operations: {shown(rest)} above the floor"
    if unread > 0.005 * excess:
        table.caption += f"; {shown(unread)} of the floor is not read as compiled"
    return table


def shown(size: float) -> str:
    """Bytes in powers of 1000, to three digits or so."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def _right(name: str) -> Column:
    return Column(name, justify="right")
