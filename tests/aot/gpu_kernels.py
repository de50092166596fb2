"""Compiles every GPU kernel for one GPU that is not there, at full size, and says what it takes.

    python tests/aot/gpu_kernels.py h200            # or b200, b300: one in each process
    python tests/aot/gpu_kernels.py h200 context    # only kernels of whose names this is a part

needs the CUDA compiler (pip install -e '.[cuda]'), no GPU. Prints one line for each kernel:
registers of a thread, bytes spilled, shared and tensor memory, seconds to compile. Exit status 1 if
the compiler refuses one, or one spills in its main loop with the registers that it asked for, or
more than was measured without them. Where nvdisasm is installed beside ptxas (pip install
nvidia-cuda-nvdisasm) the machine code shows where a spill is; without, all count.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from dspark_jax.plan.ptxas import ask_for_dumps, overheard, report_of  # noqa: E402

MOST_DENIED = 160
"""Spills in a main loop that is denied the registers it asks for, at most: 157 were measured."""
ARCHITECTURES = {"h200": "sm_90a", "b200": "sm_100a", "b300": "sm_103a"}


def kernels(arch: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name: (function of arrays, their shapes), with the shapes of Qwen3-8B and GLM-5.2."""
    import jax
    import jax.numpy as jnp

    from dspark_jax.pallas_kernels.acceptance import gpu as acceptance
    from dspark_jax.pallas_kernels.block_attention import gpu as block_attention
    from dspark_jax.pallas_kernels.context_append import gpu as context_append
    from dspark_jax.pallas_kernels.fp8_experts import gpu as fp8_experts
    from dspark_jax.pallas_kernels.fp8_matmul import gpu as fp8_matmul
    from dspark_jax.pallas_kernels.markov import gpu as markov
    from dspark_jax.pallas_kernels.mla_attention import gpu as mla_attention

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    integers = partial(shape, dtype=jnp.int32)

    def product(name: str, R: int, size_in: int, size_out: int) -> Any:
        blocks = (3, -(-size_in // 128), -(-size_out // 128))
        function = partial(getattr(fp8_matmul, name), block=(128, 128), arch=arch)
        values = shape(3, size_in, size_out, dtype=jnp.float8_e4m3fn)
        return function, (shape(R, size_in), values, shape(*blocks, dtype=jnp.float32), integers())

    def experts(R: int, E: int, size_in: int, size_out: int) -> Any:
        function = partial(fp8_experts.fp8_experts, block=(128, 128), arch=arch)
        values = shape(3, E, size_in, size_out, dtype=jnp.float8_e4m3fn)
        scales = shape(3, E, size_in // 128, size_out // 128, dtype=jnp.float32)
        return function, (shape(R, size_in), values, scales, integers(E), integers())

    def block(B: int, K: int, H: int, Hk: int, d: int, size: int, window: int | None = None):
        own, cache = shape(B, K, Hk, d), shape(B * 16384 // size, Hk, size, d)
        function = partial(
            block_attention.block_attention, window=window, causal=window is not None, arch=arch
        )
        table = integers(B, 16384 // size)
        return function, (shape(B, K, H, d), own, own, cache, cache, table, integers(B))

    def latents(B: int, H: int, size: int, sparse: bool) -> Any:
        cache = (shape(B * 16384 // size, size, 512), shape(B * 16384 // size, size, 64))
        function = partial(mla_attention.mla_attention, scale=256**-0.5, arch=arch)
        selected = (shape(B, 8, 16384, dtype=jnp.bool_),) if sparse else ()
        table = integers(B, 16384 // size)
        asked = (shape(B, 8, H, 512), shape(B, 8, H, 64))
        return function, (*asked, *cache, table, integers(B, 8), *selected)

    def drawing(B: int, Vd: int) -> Any:
        base, words = shape(8, B, Vd, dtype=jnp.float32), shape(B, 2, dtype=jnp.uint32)
        heat = shape(B, dtype=jnp.float32)
        factors = (shape(B, 256), shape(256, Vd))
        return partial(markov.markov_step, arch=arch), (
            *(base, *factors, words, heat, integers(), integers()),
        )

    def append(R: int, D: int, L: int, Hk: int, d: int, size: int) -> Any:
        cache = (shape(64 * 16384 // size, Hk, size, d),) * L
        function = partial(context_append.context_append, eps=1e-6, theta=1e6, arch=arch)
        cells = (integers(R),) * 3
        return function, (
            *(shape(R, D), shape(D, 2 * L * Hk * d), shape(L, d), *cells, cache, cache),
        )

    numbers = partial(shape, dtype=jnp.float32)

    def judging(B: int, V: int, dtype: Any) -> Any:
        function = partial(acceptance.row_statistics, arch=arch)
        return function, (shape(B, 8, V, dtype=dtype), integers(B, 8), numbers(B))

    def redrawing(B: int, V: int, dtype: Any) -> Any:
        refused, words = shape(B, dtype=jnp.bool_), shape(B, 2, dtype=jnp.uint32)
        logits, heat = shape(B, V, dtype=dtype), numbers(B)
        function = partial(acceptance.residual_draw, arch=arch)
        return function, (logits, logits, heat, heat, refused, words, heat)

    return {
        "fp8_matmul 8 x 6144 x 2048": product("fp8_matmul", 8, 6144, 2048),
        "fp8_matmul 64 x 6144 x 576": product("fp8_matmul", 64, 6144, 576),
        "fp8_matmul 512 x 16384 x 6144": product("fp8_matmul", 512, 16384, 6144),
        "fp8_matmul_w8a8 8 x 2048 x 16384": product("fp8_matmul_w8a8", 8, 2048, 16384),
        "fp8_matmul_w8a8 512 x 6144 x 12288": product("fp8_matmul_w8a8", 512, 6144, 12288),
        "fp8_experts 512 rows of 32, 6144 x 2048": experts(512, 32, 6144, 2048),
        "fp8_experts 512 rows of 32, 2048 x 6144": experts(512, 32, 2048, 6144),
        "fp8_experts 64 rows of 256, 6144 x 2048": experts(64, 256, 6144, 2048),
        "fp8_experts 4096 rows of 2, 2048 x 6144": experts(4096, 2, 2048, 6144),
        "block_attention Qwen3-8B, pages": block(64, 7, 32, 8, 128, 16),
        "block_attention Qwen3-8B, window": block(64, 7, 32, 8, 128, 16, window=2048),
        "block_attention Qwen3-8B, one request": block(1, 7, 32, 8, 128, 16384),
        "block_attention GLM-5.2, pages": block(8, 8, 64, 32, 96, 16),
        "block_attention GLM-5.2 of 8 devices": block(64, 8, 8, 4, 96, 16384),
        "mla_attention, pages": latents(8, 64, 16, sparse=False),
        "mla_attention of 8 devices, pages": latents(64, 8, 16, sparse=False),
        "mla_attention of 8 devices, sparse": latents(64, 8, 16, sparse=True),
        "mla_attention of 8 devices, one request": latents(1, 8, 16384, sparse=True),
        "markov Qwen3-8B": drawing(64, 151936),
        "markov GLM-5.2": drawing(64, 154880),
        "markov GLM-5.2 of 8 devices": drawing(8, 19360),
        "context_append Qwen3-8B, pages": append(512, 4096, 5, 8, 128, 16),
        "context_append Qwen3-8B, one request": append(8, 4096, 5, 8, 128, 16384),
        "context_append GLM-5.2, pages": append(512, 6144, 5, 32, 96, 16),
        "context_append GLM-5.2 of 8 devices": append(512, 6144, 5, 4, 96, 16),
        "context_append heads of 112": append(512, 4096, 5, 8, 112, 16),
        "row_statistics Qwen3-8B": judging(64, 151936, jnp.float32),
        "row_statistics GLM-5.2": judging(64, 154880, jnp.bfloat16),
        "row_statistics GLM-5.2, one request": judging(1, 154880, jnp.float32),
        "residual_draw Qwen3-8B": redrawing(64, 151936, jnp.float32),
        "residual_draw GLM-5.2": redrawing(64, 154880, jnp.bfloat16),
        "residual_draw GLM-5.2, one request": redrawing(1, 154880, jnp.float32),
    }


def compile_kernel(function: Callable[..., Any], shapes: tuple[Any, ...], device: Any) -> None:
    """The whole program; what a compiler refuses, it raises.

    Tuples of arrays are caches, which the program is given for good. ValueError if it copies one.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    place = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    given = tuple(i for i, one in enumerate(shapes) if type(one) is tuple)
    with jax.default_device(device):
        program = jax.jit(function, donate_argnums=given).trace(*placed).lower().compile()
    caches = [x.size * x.dtype.itemsize for x in jax.tree.leaves([shapes[i] for i in given])]
    memory: Any = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    if caches and new >= min(caches):
        raise ValueError(f"a cache is copied: {memory}")


def main(name: str, part: str = "") -> int:
    """Prints the table of kernels whose names have this part.

    0 if each of them compiled and none spilled in its main loop.
    """
    ask_for_dumps()
    from dspark_jax.plan.chips import parse_machine
    from dspark_jax.plan.topology import devices_of, set_environment

    set_environment()
    (device,) = devices_of(parse_machine(f"{name}:1x1"))
    bad = 0
    print(f"{name:40} regs spilled in loop  shared tensor seconds")
    chosen = {k: v for k, v in kernels(ARCHITECTURES[name]).items() if part in k}
    if not chosen:
        raise ValueError(f"no kernel's name has {part!r} in it.")
    for kernel, (function, shapes) in chosen.items():
        began = time.perf_counter()
        try:
            said = overheard(partial(compile_kernel, function, shapes, device))
        except Exception as error:  # of any compiler; the other kernels are still tried
            print(f"{kernel:40} refused: {str(error).splitlines()[-1]}", flush=True)
            bad += 1
            continue
        one, seconds = report_of(said), time.perf_counter() - began
        in_loop = "-" if one.spilled_in_loop is None else one.spilled_in_loop
        print(
            f"{kernel:40} {one.registers:4} {one.spilled:7} {in_loop:>7} {one.shared:7} "
            f"{one.tensor:6} {seconds:7.1f}{'  spills' if one.spills else ''}"
            f"{', denied the registers it asks for' if one.spills and one.unasked else ''}",
            flush=True,
        )
        bad += one.spills and not (one.unasked and (one.spilled_in_loop or 0) <= MOST_DENIED)
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in ARCHITECTURES:
        sys.exit(f"usage: python tests/aot/gpu_kernels.py {'|'.join(ARCHITECTURES)} [PART]")
    sys.exit(main(*sys.argv[1:]))
