"""Every kernel at real shapes: right, how fast, and how far from what its bytes allow.

    python benchmarks/kernels.py [--only NAME] [--repeats 20] [--json FILE] [--chip v6e h200 …]

On a TPU or a GPU each kernel that `dspark_jax.ops` would pick is run beside XLA's program of its
reference, compared with it, and timed in turn with it; where torch sees a GPU, PyTorch's own for
the same work too. The floor reads every byte once at the bandwidth that a large copy reaches here,
or multiplies at the rate of a large product, whichever takes longer; both are measured first.

Without an accelerator nothing is run: bytes, operations and the floors on the chips of --chip are
predictions, marked so. Where the TPU compiler is installed (`pip install -e '.[tpu]'`), each kernel
is compiled for those TPUs and its vector memory and temporaries are reported; registers, spills and
shared memory of the GPU kernels are reported by `python tests/aot/gpu_kernels.py`.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dspark_jax.plan.chips import CHIPS, parse_machine
from dspark_jax.plan.topology import devices_of, set_environment

ACCELERATOR = os.environ.get("JAX_PLATFORMS", "") != "cpu" and (
    Path("/dev/nvidia0").exists() or Path("/dev/accel0").exists() or Path("/dev/vfio").exists()
)
if not ACCELERATOR:
    set_environment()

import jax  # noqa: E402  after the environment that a compiler without hardware needs
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dspark_jax import ops  # noqa: E402

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
VECTOR_MEMORY = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
COPIED_BYTES, MULTIPLIED = 1 << 30, 8192
TOGETHER = 8
BLOCK = (128, 128)


class Case(NamedTuple):
    """An op at one shape: what it is given, and what it has to move and compute."""

    op: str
    make: Callable[[Any], tuple[Any, ...]]
    """Its arrays, drawn by a NumPy generator; real lengths and sizes among them."""
    settings: dict[str, Any]
    bytes: float
    flops: float
    eight_bit: bool = False


def normal(rng: Any, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Numbers of the size that a normed model has; a large array repeats a small one."""
    few = rng.standard_normal(min(int(np.prod(shape)), 1 << 20)).astype(np.float32)
    return jnp.resize(jnp.asarray(few, dtype), shape)


def block_attention(B: int, K: int, H: int, Hk: int, d: int, C: int, page: int) -> Case:
    """A block of every sequence over C context rows in pages."""
    wide, pages = -(-d // 128) * 128, C // page

    def make(rng: Any) -> tuple[Any, ...]:
        own = (normal(rng, B, K, Hk, d) for _ in range(2))
        context = (normal(rng, B * pages, Hk, page, wide) for _ in range(2))
        table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
        query = normal(rng, B, K, H, d)
        return query, *own, *context, jnp.asarray(table), jnp.full(B, C, jnp.int32)

    read = 2 * B * Hk * C * wide * 2 + 2 * B * K * (2 * H + 2 * Hk) * d
    settings = {"window": None, "causal": False}
    return Case("block_attention", make, settings, read, 4 * B * H * K * (C + K) * d)


def mla_attention(B: int, S: int, H: int, C: int, page: int) -> Case:
    """The rows of a verify step over C latents of 512 numbers and 64 rotated ones."""
    pages = C // page

    def make(rng: Any) -> tuple[Any, ...]:
        asked = normal(rng, B, S, H, 512), normal(rng, B, S, H, 64)
        held = normal(rng, B * pages, page, 512), normal(rng, B * pages, page, 128)
        table = rng.permutation(B * pages).reshape(B, pages).astype(np.int32)
        position = np.tile(C - S + np.arange(S), (B, 1)).astype(np.int32)
        seen = np.arange(C) <= position[:, :, None]
        return *asked, *held, jnp.asarray(table), jnp.asarray(position), jnp.asarray(seen)

    read = B * C * (512 + 128) * 2 + B * S * H * (576 * 2 + 512 * 4) + B * S * C
    return Case("mla_attention", make, {"scale": 1 / 16}, read, 2 * B * S * H * C * (576 + 512))


def fp8_matmul(R: int, size_in: int, size_out: int, function: str = "fp8_matmul") -> Case:
    """R rows by one matrix of a stack of two."""

    def make(rng: Any) -> tuple[Any, ...]:
        values = normal(rng, 2, size_in, size_out).astype(jnp.float8_e4m3fn)
        scales = jnp.ones((2, -(-size_in // 128), -(-size_out // 128)), jnp.float32)
        return normal(rng, R, size_in), values, scales, jnp.int32(1)

    read = size_in * size_out + 2 * R * (size_in + size_out)
    flops = 2 * R * size_in * size_out
    op = "fp8_matmul" if function == "fp8_matmul" else f"fp8_matmul.{function}"
    return Case(op, make, {"block": BLOCK}, read, flops, eight_bit=function != "fp8_matmul")


def fp8_experts(R: int, E: int, size_in: int, size_out: int) -> Case:
    """R rows spread evenly over E experts."""

    def make(rng: Any) -> tuple[Any, ...]:
        values = normal(rng, E, size_in, size_out).astype(jnp.float8_e4m3fn)
        scales = jnp.ones((E, size_in // 128, size_out // 128), jnp.float32)
        sizes = jnp.full(E, R // E, jnp.int32)
        return normal(rng, R, size_in), values, scales, sizes, None

    read = min(R, E) * size_in * size_out + R * (2 * size_in + 4 * size_out)
    return Case("fp8_experts", make, {"block": BLOCK}, read, 2 * R * size_in * size_out)


def markov_step(B: int, r: int, V: int) -> Case:
    """One slot of a block: G of them are a chain."""

    def make(rng: Any) -> tuple[Any, ...]:
        words = jnp.asarray(rng.integers(0, 1 << 32, (B, 2), dtype=np.uint32))
        arrays = normal(rng, 2, B, V, dtype=jnp.float32), normal(rng, B, r), normal(rng, r, V)
        return *arrays, words, jnp.ones(B), jnp.int32(1), jnp.int32(V)

    return Case("markov.markov_step", make, {}, 2 * r * V + 4 * B * V, 2 * B * r * V)


CASES = {
    "block attention, Qwen3-8B, 4k": block_attention(64, 7, 32, 8, 128, 4096, 16),
    "block attention, Qwen3-8B, 16k": block_attention(16, 7, 32, 8, 128, 16384, 16),
    "block attention, GLM-5.2 of 8": block_attention(32, 8, 8, 4, 96, 16384, 16),
    "MLA verify, GLM-5.2 of 8, 4k": mla_attention(32, 8, 8, 4096, 16),
    "MLA verify, GLM-5.2 of 8, 16k": mla_attention(8, 8, 8, 16384, 16),
    "MLA verify, GLM-5.2, 16k": mla_attention(8, 8, 64, 16384, 16),
    "FP8 W8A16, 1 row": fp8_matmul(1, 6144, 12288),
    "FP8 W8A16, 64 rows": fp8_matmul(64, 6144, 12288),
    "FP8 W8A16, 512 rows": fp8_matmul(512, 6144, 12288),
    "FP8 W8A8, 64 rows": fp8_matmul(64, 6144, 12288, "fp8_matmul_w8a8"),
    "FP8 W8A8, 512 rows": fp8_matmul(512, 6144, 12288, "fp8_matmul_w8a8"),
    "FP8 experts, 32 of 256": fp8_experts(1024, 32, 6144, 2048),
    "FP8 experts, 32 of 256, down": fp8_experts(1024, 32, 2048, 6144),
    "Markov step, GLM-5.2, B=1": markov_step(1, 256, 154880),
    "Markov step, GLM-5.2, B=64": markov_step(64, 256, 154880),
}


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median over passes of `TOGETHER` calls, dispatched at once so that the host is not waited
    for between them; two passes warm up."""
    taken = []
    for number in range(repeats + 2):
        begin = time.perf_counter()
        jax.block_until_ready([run() for _ in range(TOGETHER)])
        if number >= 2:
            taken.append((time.perf_counter() - begin) / TOGETHER)
    return statistics.median(taken)


def measured_peaks(repeats: int) -> tuple[float, float]:
    """(bytes per second of a large copy, operations per second of a large bfloat16 product)."""
    x = jnp.ones(COPIED_BYTES // 4, jnp.float32)
    copied = seconds_of(partial(jax.jit(lambda x: x + 1), x), repeats)
    a = jnp.ones((MULTIPLIED, MULTIPLIED), jnp.bfloat16)
    multiplied = seconds_of(partial(jax.jit(jnp.matmul), a, a), repeats)
    return 2 * COPIED_BYTES / copied, 2 * MULTIPLIED**3 / multiplied


def run_case(case: Case, peaks: tuple[float, float], repeats: int) -> dict[str, Any]:
    """Kernel and reference, compared and timed."""
    arrays, row = case.make(np.random.default_rng(0)), {}
    floor = max(case.bytes / peaks[0], case.flops / peaks[1])
    results = {}
    for choice in ("reference", "auto"):
        with ops.using(choice):  # pyright: ignore[reportArgumentType]
            picked = ops.pick(case.op, *arrays, **case.settings)
        if choice == "auto" and not picked.is_kernel:
            row["note"] = ops.picked()[case.op]
            continue
        step = jax.jit(partial(picked.function, **case.settings))
        results[choice] = jax.block_until_ready(step(*arrays))
        row[choice] = seconds_of(partial(step, *arrays), repeats)
    if len(results) == 2:
        row["error"] = largest_error(results["auto"], results["reference"])
    return row | {"floor": floor, "torch": torch_seconds(case, arrays, repeats)}


def largest_error(found: Any, expected: Any) -> float:
    """The largest difference, in parts of the largest number; of draws, the share that differ."""
    found, expected = (jax.tree.leaves(x)[0] for x in (found, expected))
    if jnp.issubdtype(found.dtype, jnp.integer):
        return float(jnp.mean(found != expected))
    found, expected = (x.astype(jnp.float32) for x in (found, expected))
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def torch_seconds(case: Case, arrays: tuple[Any, ...], repeats: int) -> float | None:
    """PyTorch's own for the same work on the same GPU; None where it has none or there is none."""
    if find_spec("torch") is None:
        return None
    from torch_kernels import yardstick

    run = yardstick(case.op, arrays)
    return None if run is None else seconds_of(run, repeats)


def compiled_row(case: Case, topology: str) -> dict[str, Any]:
    """What the compiler of a TPU that is not there says of the kernel."""
    device = devices_of(parse_machine(topology))[0]
    arrays = jax.eval_shape(lambda: case.make(np.random.default_rng(0)))
    place = SingleDeviceSharding(device)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays)
    with jax.default_device(device):
        picked = ops.pick(case.op, *arrays, **case.settings)
        if not picked.is_kernel:
            return {"note": ops.picked()[case.op]}
        begin = time.perf_counter()
        step = partial(picked.function, **case.settings)
        compiled = jax.jit(step).trace(*arrays).lower().compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "the TPU compiler always says what a program holds"
    vector = map(int, VECTOR_MEMORY.findall(compiled.as_text() or ""))
    return {
        "vector_memory_bytes": max(vector, default=0),
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def measured(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every case on the device that is here."""
    peaks = measured_peaks(given.repeats)
    console.print(
        f"{jax.devices()[0].device_kind}: a copy moves {peaks[0] / 1e12:.2f} TB/s, a bfloat16 "
        f"product makes {peaks[1] / 1e12:.0f} TFLOP/s"
    )
    table = Table(*("kernel", "us", "of its floor", "XLA us", "PyTorch us", "error", "note"))
    rows = []
    for name, case in chosen(given):
        row: dict[str, Any] = {"case": name, "op": case.op}
        try:
            row |= run_case(case, peaks, given.repeats)
        except Exception as error:  # one kernel that fails leaves the others' numbers
            row |= {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        rows.append(row)
        kernel = row.get("auto")
        table.add_row(
            name,
            microseconds(kernel),
            "" if kernel is None else f"{row['floor'] / kernel:.0%}",
            microseconds(row.get("reference")),
            microseconds(row.get("torch")),
            f"{row['error']:.1e}" if "error" in row else "",
            row.get("failed") or row.get("note", ""),
        )
    console.print(table)
    return rows


def predicted(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Floors on chips that are not here, and what compilers say."""
    compiles = find_spec("libtpu") is not None
    console.print(
        "No accelerator is here: floors are PREDICTED from data sheets, nothing was run"
        + ("; TPU kernels are compiled." if compiles else ", nor compiled (no TPU compiler).")
    )
    table = Table("kernel", "MB", "GFLOP", *(f"{chip} floor us" for chip in given.chip))
    for chip in given.chip if compiles else ():
        if chip in TOPOLOGIES:
            table.add_column(f"{chip} VMEM / temporaries MB")
    rows = []
    for name, case in chosen(given):
        row: dict[str, Any] = {"case": name, "op": case.op, "predicted": True}
        row |= {"bytes": case.bytes, "flops": case.flops, "floor": {}, "compiled": {}}
        said = []
        for chip in given.chip:
            peak = CHIPS[chip].fp8_flops if case.eight_bit else CHIPS[chip].bf16_flops
            floor = max(case.bytes / CHIPS[chip].bytes_per_second, case.flops / peak)
            row["floor"][chip] = floor
            if compiles and chip in TOPOLOGIES:
                found = row["compiled"][chip] = compiled_row(case, TOPOLOGIES[chip])
                held = (found.get("vector_memory_bytes"), found.get("temporary_bytes"))
                both = " / ".join("-" if x is None else f"{x / 1e6:.1f}" for x in held)
                said.append(found.get("note") or both)
        rows.append(row)
        floors = (f"{1e6 * row['floor'][chip]:.1f}" for chip in given.chip)
        table.add_row(name, f"{case.bytes / 1e6:.1f}", f"{case.flops / 1e9:.1f}", *floors, *said)
    console.print(table)
    return rows


def chosen(given: argparse.Namespace) -> list[tuple[str, Case]]:
    """The cases asked for."""
    found = [(n, case) for n, case in CASES.items() if given.only.lower() in n.lower()]
    if not found:
        raise SystemExit(f"no kernel is called {given.only!r}; there are {', '.join(CASES)}.")
    return found


def microseconds(seconds: float | None) -> str:
    """For a table; nothing where nothing was timed."""
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    chips = ("v6e", "tpu7x", "h200", "b300")
    parser.add_argument("--chip", nargs="+", choices=sorted(CHIPS), default=chips)
    given = parser.parse_args()
    console = Console(width=None if os.isatty(1) else 170)
    here = jax.devices()[0].platform != "cpu"
    rows = (measured if here else predicted)(given, console)
    if given.json:
        about = {"device": jax.devices()[0].device_kind, "machine": platform.machine()}
        about |= {"jax": jax.__version__, "measured": here}
        given.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
