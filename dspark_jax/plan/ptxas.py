"""What the CUDA compiler says of a Mosaic GPU kernel: registers, spills, shared and tensor memory.

Its dumps go to the process's own output, so they are caught there. It compiles for one GPU in each
process.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES", "MOSAIC_GPU_DUMP_SASS")
SPILLED = 16
"""Bytes that may be spilled where nothing shows that it is outside of the main loop."""


def ask_for_dumps() -> None:
    """Before jax is imported."""
    os.environ.update(dict.fromkeys(DUMPS, "1"))


class Report(NamedTuple):
    """What the compiler says of one kernel; sizes in bytes, tensor memory in columns."""

    registers: int
    spilled: int
    spilled_in_loop: int | None
    shared: int
    tensor: int
    unasked: bool
    """Registers were not shared out as the kernel asks: jax 0.12 builds kernels to be linked."""

    @property
    def spills(self) -> bool:
        """Whether the main loop does."""
        if self.spilled_in_loop is None:
            return self.spilled > SPILLED
        return self.spilled_in_loop > 0


def report_of(said: str) -> Report:
    """Read from the dumps of the last kernel that was compiled."""

    def number(pattern: str) -> int:
        found = re.findall(pattern, said)
        if not found:
            raise ValueError(f"the compiler said nothing like {pattern!r}.")
        return int(found[-1])

    return Report(
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores"),
        spilled_in_loop=spilled_in_loop(said),
        shared=number(r"smem_scratch_bytes=(\d+)"),
        tensor=number(r"tmem_scratch_cols=(\d+)"),
        unasked="'setmaxnreg' ignored" in said,
    )


def spilled_in_loop(said: str) -> int | None:
    """Local loads and stores within the smallest loops that multiply; None without machine code.

    Of a kernel that multiplies nothing, all of them.
    """
    labels, code = {}, []
    for line in said.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    if not code:
        return None
    loops = []
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA.*\.(L_x_\d+)", instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            body = code[labels[jump[1]] : end]
            if any("MMA" in one for one in body):
                loops.append(body)
    smallest = min(loops, key=len, default=code)
    return sum("STL" in one or "LDL" in one for one in smallest)


def overheard(run: Callable[[], None]) -> str:
    """All that a compiler writes to this process's output while `run` runs."""
    with tempfile.TemporaryFile("w+") as heard:
        kept = [os.dup(number) for number in (1, 2)]
        sys.stdout.flush()
        try:
            for number in (1, 2):
                os.dup2(heard.fileno(), number)
            run()
            sys.stdout.flush()
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        heard.seek(0)
        return heard.read()
