"""What a plan is asked for: the flags of the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PlanSettings:
    """Compile a decode step for a machine that is not there, and say what it costs."""

    target: str
    """A known name (glm-5.2, qwen3-8b, …), a folder, a config.json or a hub id."""
    mesh: str
    """Chip and arrangement: tpu7x:4x4x4, v5p:2x2x1, v6e:8x8 (chips per axis), h200:1x8, b300:1x8
    (hosts x GPUs)."""
    batch: int = 64
    """Sequences decoded together, on all devices."""
    context: int = 16384
    """Tokens of every sequence in the caches."""
    acceptance_length: float = 3.5
    """Tokens that a speculative step yields per sequence: accepted drafts + 1."""
    tensor_parallel: int | None = None
    """Devices that share one sequence's work; such groups share the batch. None chooses."""
    draft: str | None = None
    """Folder of a draft checkpoint; None takes the recipe's for this target."""
    kernels: Literal["auto", "pallas", "reference"] = "auto"
    """auto: kernels where there are some for the TPU and the shapes; pallas: an error where there
    are none; reference: what XLA makes of the plain formulas."""
    operations: int = 8
    """Dearest operations to list."""
    json: Path | None = None
    """Write the figures to this file."""


def check(settings: PlanSettings) -> None:
    """Raise ValueError for numbers that mean nothing."""
    for name in ("batch", "context", "operations"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; use at least 1.")
    if settings.acceptance_length < 1:
        raise ValueError(
            f"acceptance_length is {settings.acceptance_length:g}; a step always yields at least "
            "one token."
        )
