"""Which axis of which array lies on which axis of the mesh: one table, read once.

Model code never names a mesh axis. A batch's rows are spread over both axes; parameters, gradients
and optimizer state over `fsdp`, and the compiler gathers a layer's weights where they are used.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import MeshConfig

DATA, FSDP = "data", "fsdp"

RULES: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType(
    {"rows": (DATA, FSDP), "in": FSDP, "vocab": FSDP, "expert": FSDP, "out": None, "feature": None}
)
"""Mesh axis of every named dimension; of several that name one axis the first takes it."""

DIMENSIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("markov_w1",), ("vocab", "feature")),
    (("markov_w2", "kernel"), ("feature", "vocab")),
    (("embed_tokens",), ("vocab", "feature")),
    (("embed",), ("vocab", "feature")),
    (("lm_head", "kernel"), ("in", "vocab")),
    (("lm_head",), ("in", "vocab")),
    (("experts", "down_proj"), ("expert", "in", "out")),
    (("experts", "gate_proj"), ("expert", "in", "out")),
    (("experts", "up_proj"), ("expert", "in", "out")),
    (("kernel",), ("in", "out")),
)
"""Names of a parameter's last dimensions by the end of its path; the first that fits counts.

What is not listed (norms, biases) is small and lies whole on every device.
"""


def make_mesh(config: MeshConfig, rows: int = 0) -> Mesh:
    """The devices as data x fsdp; ValueError when there are not that many.

    With `data_parallel` None, as many of the devices as can share `rows` rows evenly.
    """
    devices = jax.devices()
    fsdp = config.fully_sharded
    data = config.data_parallel or max(
        (n for n in range(1, len(devices) // fsdp + 1) if rows % (n * fsdp) == 0), default=1
    )
    if data * fsdp > len(devices):
        raise ValueError(
            f"a mesh of {data} x {fsdp} devices (data_parallel x fully_sharded) needs "
            f"{data * fsdp} but there are {len(devices)}; use a smaller mesh."
        )
    chosen = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(chosen, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """A batch's rows over all devices, behind `leading` axes that are not split."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["rows"]))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of a tree of arrays or shapes: parameters, gradients, optimizer state."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(mesh, [_name(key) for key in path], leaf.shape))

    return jax.tree_util.tree_map_with_path(of, tree)


def spec(mesh: Mesh, path: list[str], shape: tuple[int, ...]) -> PartitionSpec:
    """The rule for one array; axes in front (stacks) and those that do not divide stay whole."""
    path = [part for part in path if part != "value"]
    fitting = (names for end, names in DIMENSIONS if tuple(path[-len(end) :]) == end)
    names = next(fitting, ())
    if len(names) > len(shape):
        return PartitionSpec()
    axes: list[Any] = [None] * (len(shape) - len(names)) + [RULES[name] for name in names]
    for i, axis in enumerate(axes):
        if axis in axes[:i] or (axis is not None and shape[i] % mesh.shape[axis]):
            axes[i] = None
    return PartitionSpec(*axes)


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array as a global one; every process hands over what its devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
