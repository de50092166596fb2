"""Every kernel at real shapes: right, how fast, and how far from what its bytes allow.

    python benchmarks/kernels.py [--only NAME] [--repeats 20] [--json FILE] [--chip v6e h200 …]

On a TPU or a GPU each kernel that `dspark_jax.ops` would pick is run beside XLA's program of its
reference, compared with it, and timed in turn with it; where torch sees a GPU, PyTorch's own for
the same work too. The floor reads every byte once at the bandwidth that a large copy reaches here,
or multiplies at the rate of a large product, whichever takes longer; both are measured first.

Without an accelerator nothing is run: bytes, operations and the floors on the chips of --chip are
predictions, marked so. Beside a floor stands what the chip's compiler says of the kernel, where it
is installed (`pip install -e '.[tpu]'`, `'.[cuda]'`): vector memory and temporaries of a TPU;
registers of a thread, spills in the main loop and shared memory of a GPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark_jax.plan.chips import CHIPS, Chip
from dspark_jax.plan.topology import set_environment

ACCELERATOR = os.environ.get("JAX_PLATFORMS", "") != "cpu" and (
    Path("/dev/nvidia0").exists() or Path("/dev/accel0").exists() or Path("/dev/vfio").exists()
)
if not ACCELERATOR:
    set_environment()

import jax  # noqa: E402  after the environment that keeps it from looking for one
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from kernel_cases import Case, chosen  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dspark_jax import ops  # noqa: E402

COMPILED = Path(__file__).with_name("kernel_compiled.py")
COPIED_BYTES, MULTIPLIED = 1 << 30, 8192
TOGETHER = 8


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The median over passes of `TOGETHER` calls, dispatched at once so that the host is not waited
    for between them; two passes warm up. A device runs them in order."""
    taken = []
    for number in range(repeats + 2):
        begin, last = time.perf_counter(), None
        for _ in range(TOGETHER):
            last = run()
        jax.block_until_ready(last)
        if number >= 2:
            taken.append((time.perf_counter() - begin) / TOGETHER)
    return statistics.median(taken)


def repeated(step: Callable[..., Any], arrays: tuple[Any, ...], case: Case) -> Callable[[], Any]:
    """Calls of which each changes what the one before it gave back."""
    given = [jax.tree.map(jnp.copy, x) if i in case.changed else x for i, x in enumerate(arrays)]

    def run() -> Any:
        made = step(*given)
        for place, changed in zip(case.changed, made, strict=False) if case.changed else ():
            given[place] = changed
        return made

    return run


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
        step = jax.jit(partial(picked.function, **case.settings), donate_argnums=case.changed)
        run = repeated(step, arrays, case)
        results[choice] = jax.tree.map(jnp.copy, jax.block_until_ready(run()))
        row[choice] = seconds_of(run, repeats)
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


def measured(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every case on the device that is here."""
    peaks = measured_peaks(given.repeats)
    console.print(
        f"{jax.devices()[0].device_kind}: a copy moves {peaks[0] / 1e12:.2f} TB/s, a bfloat16 "
        f"product makes {peaks[1] / 1e12:.0f} TFLOP/s"
    )
    table = Table(*("kernel", "us", "of its floor", "XLA us", "PyTorch us", "error", "note"))
    rows = []
    for name, case in chosen(given.only).items():
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
    """Floors on chips that are not here, and what their compilers say."""
    console.print("No accelerator is here: floors are PREDICTED from data sheets, nothing was run.")
    said = {chip: compiled_for(chip, given.only, console) for chip in given.chip}
    table = Table("kernel", "MB", "GFLOP", *(f"{chip}, predicted us" for chip in given.chip))
    rows = []
    for name, case in chosen(given.only).items():
        floors = {chip: floor_on(CHIPS[chip], case) for chip in given.chip}
        compiled = {chip: rows_of[name] for chip, rows_of in said.items() if name in rows_of}
        row: dict[str, Any] = {"case": name, "op": case.op, "predicted": True}
        row |= {"bytes": case.bytes, "flops": case.flops, "floor": floors, "compiled": compiled}
        rows.append(row)
        cells = (f"{1e6 * floors[c]:.1f}; {told(compiled.get(c, {}))}" for c in given.chip)
        table.add_row(name, f"{case.bytes / 1e6:.1f}", f"{case.flops / 1e9:.1f}", *cells)
    console.print(table)
    return rows


def floor_on(chip: Chip, case: Case) -> float:
    """Seconds that bytes or operations take at a chip's peaks, whichever is more."""
    peak = chip.fp8_flops if case.eight_bit else chip.bf16_flops
    return max(case.bytes / chip.bytes_per_second, case.flops / peak)


def compiled_for(chip: str, only: str, console: Console) -> dict[str, Any]:
    """What a chip's compiler says of every kernel, in a process of its own; nothing without one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(COMPILED), chip, "--json", str(path), "--only", only]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            console.print(f"{chip}: not compiled, {why.removeprefix('error: ')}", markup=False)
        return json.loads(path.read_text()) if path.exists() else {}


def told(found: dict[str, Any]) -> str:
    """A compiler's words, short."""
    if "registers" in found:
        spilled = found["spilled_in_loop"]
        spilled = found["spilled"] if spilled is None else spilled
        shared = found["shared"] / 1e3
        return f"{found['registers']} registers, {spilled} spilled, {shared:.0f} kB"
    if "vector_memory" in found:
        held, beside = found["vector_memory"] / 1e6, found["temporaries"] / 1e6
        return f"{held:.1f} MB VMEM, {beside:.1f} MB"
    return found.get("note", "not compiled")[:60]


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
