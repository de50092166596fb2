"""What a TPU's compiler made of a kernel's loops: bundles, products, and registers that spill.

The compiler writes this down only where it was told so before it was loaded, so a process of its
own compiles.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.aot.compile import compile_kernel

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
"""`LIBTPU_INIT_ARGS`."""
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(LB)?[A-Z]*\s*: (>*)")
"""A line of instructions: whether a loop's body begins, and how many loops are around it."""
USE = re.compile(r"\d+( \d+)+\s*$")


class Loop(NamedTuple):
    """The bundles of one loop's body, without those of loops within it."""

    depth: int
    bundles: int
    used: Counter[str]  # slots of bundles, by unit
    slots: Counter[str]  # of one bundle

    @property
    def products(self) -> int:
        """Instructions of the matrix unit."""
        return self.used["MXU"]

    def full(self, unit: str) -> float:
        """The share of a unit's slots that are used."""
        return self.used[unit] / (self.bundles * self.slots[unit])

    @property
    def spilled(self) -> int:
        """Vector registers that go to memory for want of others."""
        return self.used["VSTORE:SPILL"]


def main_loops(module: str, names: list[str], topology: str) -> dict[str, Loop]:
    """The loop with most products of each of a module's `KERNELS`."""
    with tempfile.TemporaryDirectory() as folder:
        told = {"LIBTPU_INIT_ARGS": FLAGS.format(folder=folder)}
        command = [sys.executable, "-m", "tests.aot.schedule", folder, topology, module, *names]
        said = subprocess.run(command, env=os.environ | told, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout.splitlines()[-1])
    return {name: _main_loop(loops) for name, loops in found.items()}


def _main_loop(loops: list[list[Any]]) -> Loop:
    made = [Loop(d, n, Counter(used), Counter(slots)) for d, n, used, slots in loops]
    return max(made, key=lambda loop: loop.products)


def read_loops(folder: Path, kernel: str) -> list[Loop]:
    """The loops of the one kernel of that name; the first is what is in none."""
    (bundles,) = folder.glob(f"*-{kernel}*[0-9]-final_bundles.txt")
    (uses,) = folder.glob(f"*-{kernel}*-final_hlo-static-per-bundle-utilization.txt")
    lines = [found for line in _lines(bundles) if (found := BUNDLE.match(line))]
    table = _lines(uses)
    head = next(i for i, line in enumerate(table) if "MXU" in line)
    units = table[head].strip().split(", ")
    slots = Counter(dict(zip(units, map(int, table[head + 1].split()), strict=True)))
    table = table[head + 2 :]
    used = [[int(n) for n in line.split()] for line in table if USE.match(line)]
    assert len(lines) == len(used) > 0, "bundles and their use are not of one kernel"
    found = [Loop(0, 0, Counter(), slots)]
    around = {0: 0}
    for line, row in zip(lines, used, strict=True):
        depth = len(line[2])
        if line[1]:
            around[depth] = len(found)
            found.append(Loop(depth, 0, Counter(), slots))
        at = around[max(d for d in around if d <= depth)]
        old = found[at]
        counted = old.used + Counter(dict(zip(units, row, strict=True)))
        found[at] = old._replace(bundles=old.bundles + 1, used=counted)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def main(folder: Path, topology: str, module: str, *names: str) -> None:
    """Print the loops of every kernel as JSON."""
    kernels, found = importlib.import_module(module).KERNELS, {}
    for name in names:
        for old in folder.iterdir():
            old.unlink()
        compile_kernel(kernels[name], topology)
        found[name] = read_loops(folder, name.split(",")[0].split(" ")[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
