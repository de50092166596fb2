"""Compiling one kernel for a TPU that is not there: what the tests of kernels share."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from dspark_jax.plan.chips import parse_machine
from dspark_jax.plan.topology import devices_of, set_environment

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
MARKS = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed (pip install -e '.[tpu]')",
    ),
]
"""`pytestmark` of every file that compiles kernels."""
USED = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


class Kernel(NamedTuple):
    """A function of arrays alone, the shapes it is compiled for, and which of them it may keep."""

    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def shape(*sizes: int, dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    """An array that is only described."""
    return jax.ShapeDtypeStruct(sizes, jax.numpy.dtype(dtype))


def compile_kernel(kernel: Kernel, topology: str) -> Any:
    """The compiled program of one device; what the compiler refuses, it raises."""
    set_environment()
    device = devices_of(parse_machine(topology))[0]
    place = SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), kernel.shapes
    )
    with jax.default_device(device):
        return (
            jax.jit(kernel.function, donate_argnums=kernel.donated).trace(*placed).lower().compile()
        )


def vmem_bytes(compiled: Any) -> int:
    """The most vector memory that a kernel of the program holds."""
    text = compiled.as_text()
    lines = [one for one in text.splitlines() if 'custom_call_target="tpu_custom_call"' in one]
    assert lines, "the program has no kernel"
    found = [int(size) for one in lines for size in USED.findall(one)]
    return max(found, default=0)
