"""Mosaic GPU kernels on a CPU: one place that runs them with races detected."""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
import pytest

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.pallas_kernels.gpu_target import plgpu

ARCHITECTURES = ("sm_90a", "sm_100a")
"""One for each kernel body: sm_103a runs the second."""

needs_interpreter = pytest.mark.skipif(
    gpu_target.missing() is not None, reason=str(gpu_target.missing())
)


FAULTS = ("RACE DETECTED", "no threads observed phase")
"""What the interpreter says of a race, and of a barrier that filled again before anyone waited.

It follows every access but those of wgmma, so in a kernel where nothing else reads a copy a missing
wait shows in the barrier only.
"""


def run(kernel: Callable[..., Any], *arrays: Any, **settings: Any) -> tuple[Any, bool]:
    """(result, whether a fault was found); what is raised rather than printed has no result."""
    said = io.StringIO()
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    try:
        with contextlib.redirect_stdout(said):
            result = jax.block_until_ready(kernel(*arrays, **settings, interpret=interpret))
    except Exception as error:
        if not any(fault in str(error) for fault in FAULTS):
            raise
        forget_failure()
        return None, True
    return result, FAULTS[0] in said.getvalue()


def forget_failure() -> None:
    """An interpreter that was stopped in a kernel must be told before the next."""
    from jax._src.pallas.mosaic_gpu.interpret import (  # pyright: ignore[reportMissingImports]
        interpret_pallas_call,
    )

    interpret_pallas_call.reset_gpu_interpret_mode_state()
