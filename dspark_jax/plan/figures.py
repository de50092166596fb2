"""A plan's numbers: what is printed, and written as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspark_jax.plan.bounds import Bound, Remedies, accounted, bound, remedies, sent_bytes
from dspark_jax.plan.chips import Machine
from dspark_jax.plan.excess import excesses
from dspark_jax.plan.hlo.cost import Cost
from dspark_jax.plan.memory import Memory
from dspark_jax.plan.models import Models
from dspark_jax.plan.settings import PlanSettings

TOLERANCE = 1.25
"""How far above the floor a step's bytes may be before the plan names what costs the rest."""


class Step(NamedTuple):
    """One compiled step: `cost` is None when the compiler refused.

    `floors` are what a device that reads once all it holds and needs would read of every argument;
    `spread_bytes` all of it if nothing were held twice. `yields` tokens per sequence.
    """

    tokens: int
    yields: float
    cost: Cost | None
    floors: tuple[float, ...]
    spread_bytes: float
    compile_seconds: float

    @property
    def floor_bytes(self) -> float:
        return sum(self.floors)

    @property
    def above_floor(self) -> float | None:
        return None if self.cost is None else self.cost.bytes / self.floor_bytes


class Plan(NamedTuple):
    """All of it. `memory` is of the speculative step, the larger one."""

    settings: PlanSettings
    machine: Machine
    models: Models
    tensor: int
    memory: Memory
    plain: Step
    speculative: Step
    kernels: Mapping[str, str] = {}
    """What every op of the steps runs as."""

    @property
    def data(self) -> int:
        return self.machine.devices // self.tensor

    def bound(self, step: Step) -> Bound | None:
        """What the compiled program allows."""
        return None if step.cost is None else accounted(self.machine.chip, step.cost)

    def floor(self, step: Step) -> Bound:
        """What reading alone allows any program."""
        return bound(self.machine.chip, step.floor_bytes, 0, 0, 0)

    def rate(self, step: Step, limit: Bound | None) -> float | None:
        """Tokens per second of all sequences together."""
        return None if limit is None else self.settings.batch * step.yields / limit.seconds

    @property
    def remedies(self) -> Remedies:
        m, s = self.memory, self.settings
        sizes = (self.machine.devices, s.batch, s.context)
        return remedies(m.available, m.weights, m.cache, m.temporaries or 0, sizes)


def as_json(plan: Plan) -> dict[str, Any]:
    """The same figures under plain names."""
    s, m, chip = plan.settings, plan.memory, plan.machine.chip
    return {
        "target": s.target,
        "mesh": plan.machine.name,
        "chip": {
            "name": chip.name,
            "memory_bytes": chip.memory_bytes,
            "bytes_per_second": chip.bytes_per_second,
            "bf16_flops": chip.bf16_flops,
            "fp8_flops": chip.fp8_flops,
            "interconnect_bytes_per_second": chip.interconnect_bytes_per_second,
        },
        "devices": plan.machine.devices,
        "data_parallel": plan.data,
        "tensor_parallel": plan.tensor,
        "batch": s.batch,
        "context": s.context,
        "acceptance_length": s.acceptance_length,
        "bytes_per_device": {
            "weights": m.weights,
            "cache": m.cache,
            "temporaries": m.temporaries,
            "total": m.total,
            "available": m.available,
        },
        "kernels": dict(plan.kernels),
        "fits": m.fits,
        "would_fit": None if m.fits else plan.remedies._asdict(),
        "tokens_per_second": {
            "plain": plan.rate(plan.plain, plan.bound(plan.plain)),
            "speculative": plan.rate(plan.speculative, plan.bound(plan.speculative)),
            "plain_floor": plan.rate(plan.plain, plan.floor(plan.plain)),
            "speculative_floor": plan.rate(plan.speculative, plan.floor(plan.speculative)),
        },
        "steps": {
            "plain": _step(plan, plan.plain),
            "speculative": _step(plan, plan.speculative),
        },
    }


def write_json(path: Path, plan: Plan) -> None:
    """Raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(plan), indent=2) + "\n")


def _step(plan: Plan, step: Step) -> dict[str, Any]:
    cost, limit = step.cost, plan.bound(step)
    figures: dict[str, Any] = {
        "tokens_per_sequence": step.tokens,
        "floor_bytes": round(step.floor_bytes),
        "spread_floor_bytes": round(step.spread_bytes),
        "compile_seconds": round(step.compile_seconds, 1),
    }
    if cost is None or limit is None:
        return figures
    return figures | {
        "bytes": cost.bytes,
        "bytes_above_floor": step.above_floor,
        "instructions": cost.instructions,
        "flops": cost.flops,
        "fp8_flops": cost.fp8_flops,
        "sent_bytes": sent_bytes(cost),
        "seconds": {**limit._asdict(), "total": limit.seconds},
        "collectives": [one._asdict() for one in cost.collectives],
        "operations": [one._asdict() for one in cost.operations[: plan.settings.operations]],
        "above_floor": [one._asdict() for one in excesses(cost, step.floors)],
        "notes": list(cost.notes),
    }
