"""The chips that can be planned for: what a device holds, moves and computes.

A device is what JAX calls one: half a TPU7x chip, otherwise a chip or a GPU.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

GIB = 1 << 30
TERA = 1e12


@dataclass(frozen=True)
class Chip:
    """Peaks of one device; `interconnect` is what it can send, in one direction over all links."""

    name: str
    platform: Literal["tpu", "cuda"]
    memory_bytes: float
    bytes_per_second: float
    bf16_flops: float
    fp8_flops: float
    interconnect_bytes_per_second: float


# TPU memory is what the compiler of each lets a program use (libtpu 0.0.42). Bandwidths and peaks:
# cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. The two-way bandwidth between chips is halved, and
# all of a TPU7x chip's figures are split between its two devices. TPUs before it have no FP8 units.
# GPUs: NVIDIA data sheets of HGX H100, H200, B200 and B300, without sparsity; NVLink likewise
# halved. GPU memory is what the driver reports.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("v5e", "tpu", 15.75 * GIB, 819e9, 197 * TERA, 197 * TERA, 200e9),
            Chip("v5p", "tpu", 95.74 * GIB, 2765e9, 459 * TERA, 459 * TERA, 600e9),
            Chip("v6e", "tpu", 31.25 * GIB, 1638e9, 918 * TERA, 918 * TERA, 400e9),
            Chip("tpu7x", "tpu", 94.75 * GIB, 3690e9, 1153.5 * TERA, 2307 * TERA, 300e9),
            Chip("h100", "cuda", 85.03e9, 3350e9, 989.5 * TERA, 1979 * TERA, 450e9),
            Chip("h200", "cuda", 150.75e9, 4800e9, 989.5 * TERA, 1979 * TERA, 450e9),
            Chip("b200", "cuda", 191.50e9, 8000e9, 2250 * TERA, 4500 * TERA, 900e9),
            Chip("b300", "cuda", 287.0e9, 8000e9, 2250 * TERA, 4500 * TERA, 900e9),
        )
    }
)
EXAMPLES = {"tpu": "tpu7x:4x4x4 (chips per axis)", "cuda": "h200:1x8 (hosts x GPUs of each)"}


@dataclass(frozen=True)
class Machine:
    """Chips and how they are arranged: `tpu7x:4x4x4`, `h200:1x8`."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """How many JAX will see."""
        return math.prod(self.shape) * (2 if self.chip.name == "tpu7x" else 1)


def parse_machine(text: str) -> Machine:
    """Read `chip:AxBxC`; ValueError on an unknown chip or another form."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} of mesh {text!r} is unknown; use {', '.join(CHIPS)}.")
    chip = CHIPS[name]
    axes = 2 if chip.platform == "cuda" else None
    sizes = shape.split("x")
    known = all(re.fullmatch(r"[1-9]\d{0,3}", size) for size in sizes)
    if not known or (len(sizes) != axes if axes else len(sizes) not in (2, 3)):
        raise ValueError(
            f"mesh {text!r} does not say how its chips are arranged; "
            f"write it like {EXAMPLES[chip.platform]}."
        )
    return Machine(chip, tuple(map(int, sizes)))
