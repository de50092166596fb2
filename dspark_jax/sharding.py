"""Which axis of which array lies on which axis of the mesh: one table per model, read once.

Model code never names a mesh axis. A draft in training has a mesh of data x fsdp: rows are spread
over both, parameters, gradients and optimizer state over `fsdp`, and the compiler gathers a layer's
weights where they are used. A target, and a draft that decodes, have one of data x tensor: weights
never travel, the devices of a group each compute with their own heads and columns (`spread.py`).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import MeshConfig

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

Family = Literal["training", "glm", "qwen3", "draft"]
Table = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
"""Names of an array's last dimensions by the end of its path; the first that fits counts.

What is not listed (norms, biases) is small and lies whole on every device.
"""

AXES: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType(
    {
        "rows": (DATA, FSDP),
        "in": FSDP,
        "vocab": FSDP,
        "expert": FSDP,
        "sequence": DATA,
        "column": TENSOR,
        "any_expert": (DATA, TENSOR),
        "whole": None,
    }
)
"""Mesh axis of every named dimension; of several that name one axis the first takes it."""

GROUPED_ATTENTION: Table = (
    (("q_proj", "kernel"), ("whole", "column")),
    (("k_proj", "kernel"), ("whole", "column")),
    (("v_proj", "kernel"), ("whole", "column")),
    (("o_proj", "kernel"), ("column", "whole")),
)
SWIGLU: Table = (
    (("gate_proj", "kernel"), ("whole", "column")),
    (("up_proj", "kernel"), ("whole", "column")),
    (("down_proj", "kernel"), ("column", "whole")),
)
EXPERTS: Table = tuple(
    (("experts", name), ("any_expert", "whole", "whole"))
    for name in ("gate_proj", "up_proj", "down_proj")
)
TABLES: Table = (
    (("embed_tokens",), ("column", "whole")),
    (("lm_head", "kernel"), ("whole", "column")),
)
FAMILIES: Mapping[Family, Table] = MappingProxyType(
    {
        "training": (
            (("markov_w1",), ("vocab", "whole")),
            (("markov_w2", "kernel"), ("whole", "vocab")),
            (("embed_tokens",), ("vocab", "whole")),
            (("embed",), ("vocab", "whole")),
            (("lm_head", "kernel"), ("in", "vocab")),
            (("lm_head",), ("in", "vocab")),
            (("experts", "down_proj"), ("expert", "in", "whole")),
            (("experts", "gate_proj"), ("expert", "in", "whole")),
            (("experts", "up_proj"), ("expert", "in", "whole")),
            (("kernel",), ("in", "whole")),
        ),
        # The latent and the indexer have no heads to share: they are whole on every device.
        "glm": (
            *TABLES,
            (("q_b_proj", "kernel"), ("whole", "column")),
            (("kv_b_proj", "kernel"), ("whole", "column")),
            (("o_proj", "kernel"), ("column", "whole")),
            *EXPERTS,
            *SWIGLU,
            (("latent",), ("sequence", "whole", "whole")),
            (("rope",), ("sequence", "whole", "whole")),
            (("index_key",), ("sequence", "whole", "whole")),
        ),
        "qwen3": (
            *TABLES,
            *GROUPED_ATTENTION,
            *EXPERTS,
            *SWIGLU,
            (("key",), ("sequence", "column", "whole", "whole")),
            (("value",), ("sequence", "column", "whole", "whole")),
        ),
        # As trained, and as laid out for decoding (`draft_decoder.py`).
        "draft": (
            # The gate of a Markov head is no MLP's: its rank is small and lies whole.
            (("markov_head", "gate_proj", "kernel"), ("whole", "whole")),
            (("fc", "kernel"), ("whole", "column")),
            *GROUPED_ATTENTION,
            *SWIGLU,
            (("fc",), ("whole", "column")),
            (("context",), ("whole", "column")),
            (("into",), ("whole", "column")),
            (("out",), ("column", "whole")),
            (("mlp_into",), ("whole", "column")),
            (("mlp_down",), ("column", "whole")),
            (("markov_w2", "kernel"), ("whole", "column")),
            (("embed",), ("column", "whole")),
            (("lm_head",), ("whole", "column")),
            (("k",), ("sequence", "column", "whole", "whole")),
            (("v",), ("sequence", "column", "whole", "whole")),
        ),
    }
)


WRAPPERS = ("values", "scales", "_scale_inv")
"""Path parts below a parameter's own name, as is a last `value`."""


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
    return _mesh(devices[: data * fsdp], fsdp, FSDP)


def target_mesh(devices: Sequence[Any], tensor: int) -> Mesh:
    """Devices as data x tensor, groups of `tensor` neighbours; ValueError if that is uneven."""
    if tensor < 1 or len(devices) % tensor:
        raise ValueError(
            f"tensor_parallel {tensor} does not divide the {len(devices)} devices of the mesh; "
            f"use one of {_divisors(len(devices))}."
        )
    return _mesh(devices, tensor, TENSOR)


def _mesh(devices: Sequence[Any], inner: int, name: str) -> Mesh:
    chosen = np.array(devices).reshape(-1, inner)
    return Mesh(chosen, (DATA, name), axis_types=(AxisType.Auto, AxisType.Auto))


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """A batch's rows over all devices, behind `leading` axes that are not split."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, AXES["rows"]))


def tree_shardings(mesh: Mesh, tree: Any, family: Family = "training") -> Any:
    """Shardings of a tree of arrays or shapes: parameters, gradients, optimizer state, caches."""
    specs = tree_specs(mesh, tree, family)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=_is_spec)


def tree_specs(mesh: Mesh, tree: Any, family: Family) -> Any:
    """The same as partition specs."""

    def of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        return spec(mesh, [_name(key) for key in path], leaf.shape, family)

    return jax.tree_util.tree_map_with_path(of, tree)


def page_specs(mesh: Mesh, cache: Any, family: Family) -> Any:
    """The same for a cache of pages, which any sequence may own: every data group has all pages.

    Heads are shared by the devices of a group; a latent has none and lies whole on every device.
    """

    def whole_pages(found: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*(None if axis == DATA else axis for axis in found))

    return jax.tree.map(whole_pages, tree_specs(mesh, cache, family), is_leaf=_is_spec)


def spec(
    mesh: Mesh | AbstractMesh, path: list[str], shape: tuple[int, ...], family: Family = "training"
) -> PartitionSpec:
    """The rule for one array; axes in front (stacks) and those that do not divide stay whole.

    What two axes of the mesh together cannot share evenly, the second may alone.
    Values and scales of a block-scaled kernel lie as the kernel does.
    """
    path = [part for part in path if part not in WRAPPERS and not part.isdigit()]
    path = path[:-1] if path[-1:] == ["value"] and len(path) > 1 else path
    fitting = (names for end, names in FAMILIES[family] if tuple(path[-len(end) :]) == end)
    names = next(fitting, ())
    if len(names) > len(shape):
        return PartitionSpec()
    axes: list[Any] = [None] * (len(shape) - len(names)) + [AXES[name] for name in names]
    for i, axis in enumerate(axes):
        if isinstance(axis, tuple) and shape[i] % axis_size(mesh, axis):
            axes[i] = axis = axis[-1]
        if axis in axes[:i] or (axis is not None and shape[i] % axis_size(mesh, axis)):
            axes[i] = None
    return PartitionSpec(*axes)


def axis_size(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> int:
    """Devices along one axis of the mesh, or several."""
    return int(np.prod([mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis)]))


def zeros(shapes: Any, mesh: Mesh, family: Family) -> Any:
    """Arrays of these shapes and types, each device with its own part from the start."""

    def of(shape: jax.ShapeDtypeStruct, lie: NamedSharding) -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype, device=lie)

    return jax.tree.map(of, shapes, tree_shardings(mesh, shapes, family))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array as a global one; every process hands over what its devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
