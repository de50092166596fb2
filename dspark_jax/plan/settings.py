"""What a plan is asked for: the flags of the command line."""

from dataclasses import dataclass
from pathlib import Path


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
    """Devices that share one sequence's work; the rest share the batch. None chooses."""
    draft: str | None = None
    """Folder of a draft checkpoint; None takes the recipe's for this target."""
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


def tensor_size(asked: int | None, devices: int, batch: int, heads: int) -> int:
    """Devices per sequence; the smallest from 8 up that divides everything when none is asked.

    ValueError when devices, batch or heads do not divide.
    """
    if asked is None:
        fitting = [
            n
            for n in range(1, devices + 1)
            if devices % n == 0 and batch % (devices // n) == 0 and heads % n == 0
        ]
        if not fitting:
            raise ValueError(
                f"batch {batch} cannot be split over {devices} devices with {heads} attention "
                f"heads; use a multiple of {devices // _largest(devices, heads)}."
            )
        return next((n for n in fitting if n >= min(8, devices)), fitting[-1])
    if asked < 1 or devices % asked or heads % asked:
        allowed = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
        raise ValueError(
            f"tensor_parallel {asked} does not divide {devices} devices and {heads} attention "
            f"heads; use one of {', '.join(map(str, allowed))}."
        )
    if batch % (devices // asked):
        raise ValueError(
            f"batch {batch} is not a multiple of {devices // asked}, the groups of "
            f"tensor_parallel {asked} devices; change either."
        )
    return asked


def _largest(devices: int, heads: int) -> int:
    return max(n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0)
