"""Which GPU a Mosaic GPU kernel is built for, and whether this jax can build one."""

from typing import Any, Literal

import jax
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu
"""Untyped: its interface differs from one jax to the next, and its declarations from both."""

Arch = Literal["sm_90a", "sm_100a", "sm_103a"]
"""Hopper (H100, H200), Blackwell (B200), Blackwell Ultra (B300)."""

CORES: dict[str, int] = {"sm_90a": 132, "sm_100a": 148, "sm_103a": 148}
"""Streaming multiprocessors of a whole chip."""


def missing() -> str | None:
    """Why this jax cannot build the kernels, or None."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"jax {jax.__version__} has another Mosaic GPU interface; 0.11 or later is needed."
    return None


def chosen(arch: str | None, interpret: Any = False) -> Arch:
    """`arch`, or what the default device is; an interpreter without a GPU plays Hopper.

    ValueError if that is no GPU with kernels of its own.
    """
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    found = arch or f"sm_{str(getattr(device, 'compute_capability', '')).replace('.', '')}a"
    if arch is None and interpret and found not in CORES:
        found = "sm_90a"
    match found:
        case "sm_90a" | "sm_100a" | "sm_103a":
            return found
    raise ValueError(f"no kernels for {found}; give arch one of {', '.join(CORES)}.")


def tiled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
    """Shared memory in tiles of 8 rows by `columns`, swizzled as the tensor core wants them."""
    swizzle = columns * jax.numpy.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def multiple(size: int, of: int) -> int:
    """The next multiple."""
    return -(-size // of) * of


def store(ref: Any, value: Any) -> None:
    """`ref[...] = value` by whatever transfers the layout allows, which jax 0.12 has to be told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
