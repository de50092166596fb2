"""Without hardware: GPU kernels compile for every GPU, at full size, and spill in no loop."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_jax.pallas_kernels import gpu_target
from dspark_jax.plan.topology import COMPILERS

SCRIPT, STEP = (Path(__file__).with_name(name) for name in ("gpu_kernels.py", "gpu_step.py"))
STEPS = [("h200:1x2", "qwen3-8b"), ("h200:1x8", "glm-5.2"), ("b200:1x8", "glm-5.2")]
STEPS += [("b300:1x2", "qwen3-8b"), ("b300:1x8", "glm-5.2")]
MISSING = gpu_target.missing()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, COMPILERS["cuda"])),
        reason="the CUDA compiler is not installed (pip install -e '.[cuda]')",
    ),
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.mark.parametrize("gpu", ["h200", "b200", "b300"])
def test_every_kernel_compiles_and_spills_in_no_loop(gpu: str):
    """In a process of its own: ptxas compiles for one GPU in each."""
    done = subprocess.run([sys.executable, SCRIPT, gpu], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("mesh", "target"), STEPS)
def test_a_whole_step_compiles_with_every_op_as_a_kernel(mesh: str, target: str):
    done = subprocess.run([sys.executable, STEP, mesh, target], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    ops = [line for line in done.stdout.splitlines() if line.endswith("kernel")]
    assert len(ops) >= 5 and "reference" not in done.stdout
