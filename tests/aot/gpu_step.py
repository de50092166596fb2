"""Compile a whole fused decode step with its kernels for GPUs that are not here.

    python tests/aot/gpu_step.py h200:1x2 qwen3-8b     (b300:1x8 glm-5.2; one target per process)

Prints what every op runs as; exits with 1 where no op runs as a kernel.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from dspark_jax.plan.chips import parse_machine  # noqa: E402
from dspark_jax.plan.topology import devices_of, set_environment  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mesh")
    parser.add_argument("target")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=16384)
    given = parser.parse_args()
    set_environment()
    import jax

    from dspark_jax import ops
    from dspark_jax.plan.groups import tensor_size
    from dspark_jax.plan.models import find_models
    from dspark_jax.plan.program import decode_program, kept_block
    from dspark_jax.sharding import target_mesh

    machine, models = parse_machine(given.mesh), find_models(given.target, None)
    mesh = target_mesh(devices_of(machine), tensor_size(None, machine.devices, given.batch, models))
    block = kept_block(models.target, models.block, mesh)
    begin = time.perf_counter()
    with jax.default_device(mesh.devices.flat[0]):
        program = decode_program(
            models.target, block, models.draft, mesh, given.batch, given.context
        )
        compiled = program.step.trace(*program.arguments).lower().compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"{given.target} on {machine.name}: compiled in {time.perf_counter() - begin:.0f} s")
    print(f"arguments and temporaries of a device: {held / 1e9:.2f} GB")
    for op, how in ops.picked().items():
        print(f"{op}: {how}")
    return 0 if any("kernel" in how for how in ops.picked().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
