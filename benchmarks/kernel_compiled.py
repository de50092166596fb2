"""What compilers say of every kernel for a chip that is not here: one chip in each process.

    python benchmarks/kernel_compiled.py v6e --json FILE [--only NAME]

For TPUs: the vector memory that a kernel holds and the program's temporaries. For GPUs: registers
of a thread, spills in the main loop, shared memory. `kernels.py` runs it for its table.
"""

import argparse
import json
import re
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark_jax.plan.chips import CHIPS, parse_machine
from dspark_jax.plan.ptxas import ask_for_dumps, overheard, report_of
from dspark_jax.plan.topology import COMPILERS, devices_of, set_environment

set_environment()
ask_for_dumps()

import jax  # noqa: E402  after the environment that a compiler without hardware needs
import numpy as np  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from kernel_cases import Case, chosen  # noqa: E402

from dspark_jax import ops  # noqa: E402

SHAPES = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
VECTOR_MEMORY = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


def missing(chip: str) -> str | None:
    """Why nothing can be compiled for a chip."""
    platform = CHIPS[chip].platform
    if not any(map(find_spec, COMPILERS[platform])):
        return f"no {platform} compiler is installed (pip install -e '.[{platform}]')"
    return None


def compiled_row(case: Case, chip: str) -> dict[str, Any]:
    """One kernel: what it holds, or why there is none."""
    (device, *_) = devices_of(parse_machine(f"{chip}:{SHAPES.get(chip, '1x1')}"))
    place = SingleDeviceSharding(device)
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda: case.make(np.random.default_rng(0))),
    )
    with jax.default_device(device):
        picked = ops.pick(case.op, *arrays, **case.settings)
        if not picked.is_kernel:
            return {"note": ops.picked()[case.op]}
        begin, made = time.perf_counter(), []
        step = jax.jit(partial(picked.function, **case.settings), donate_argnums=case.changed)
        said = overheard(lambda: made.append(step.trace(*arrays).lower().compile()))
    seconds = {"compile_seconds": round(time.perf_counter() - begin, 1)}
    if CHIPS[chip].platform == "cuda":
        return report_of(said)._asdict() | seconds
    held = map(int, VECTOR_MEMORY.findall(made[0].as_text()))
    temporaries = made[0].memory_analysis().temp_size_in_bytes
    return {"vector_memory": max(held, default=0), "temporaries": temporaries} | seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("chip", choices=sorted(CHIPS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    if why := missing(given.chip):
        sys.exit(f"error: {why}.")
    rows: dict[str, Any] = {}
    for name, case in chosen(given.only).items():
        try:
            rows[name] = compiled_row(case, given.chip)
        except Exception as error:  # of any compiler; the other kernels are still tried
            rows[name] = {"note": f"refused: {' '.join(str(error).split())}"[:300]}
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
