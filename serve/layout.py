"""Where a server's arrays lie: on one device, or on a mesh of data x tensor devices.

The `tensor` devices of a group share every layer's heads and columns, all devices share the routed
experts, and the groups share a round's drafting and its logits. Pages are whole in every group, so
that any sequence may own any page and the host knows of no mesh: keys and values of heads are cut
over `tensor`, GLM's latent and index keys, which have no heads, are on every device.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import TargetConfig
from dspark_jax.paged_loop import SlotState
from dspark_jax.sharding import page_specs, target_mesh
from dspark_jax.targets.mesh import family


def serving_mesh(data: int, tensor: int) -> Mesh:
    """The first data x tensor devices; ValueError when there are fewer, or a process has none."""
    wanted, there = data * tensor, jax.device_count()
    asked = f"--tensor-parallel-size {tensor} x --data-parallel-size {data}"
    if wanted > there:
        raise ValueError(
            f"{asked} needs {wanted} devices but there are {there} ({jax.default_backend()}); "
            "give smaller sizes."
        )
    mesh = target_mesh(jax.devices()[:wanted], tensor)
    busy = len({device.process_index for device in mesh.devices.flat})
    if busy < jax.process_count():
        raise ValueError(
            f"{asked} takes {wanted} of {there} devices, which lie on {busy} of "
            f"{jax.process_count()} processes; give sizes whose product is {there}, or start fewer "
            "processes."
        )
    return mesh


def whole(mesh: Mesh) -> NamedSharding:
    """On every device alike."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, config: TargetConfig, state: SlotState) -> SlotState:
    """Of slots and pages; `state` may be one of shapes."""

    def pages(cache: Any, table: Any) -> Any:
        specs = page_specs(mesh, cache, table)
        return jax.tree.map(lambda _, s: NamedSharding(mesh, s), cache, specs)

    caches = pages(state.target_cache, family(config)), pages(state.draft_cache, "draft")
    return SlotState(whole(mesh), whole(mesh), whole(mesh), *caches)


def shardings_of(tree: Any) -> Any:
    """How arrays lie."""
    return jax.tree.map(lambda x: x.sharding, tree)


def device_bytes(tree: Any, shardings: Any) -> int:
    """Of a tree of arrays or shapes, on each device."""

    def share(x: Any, sharding: Any) -> int:
        return prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(share, tree, shardings)))


def described(mesh: Mesh) -> Iterator[str]:
    """The mesh in words."""
    device = mesh.devices.flat[0]
    yield f"{device.platform} {device.device_kind}"
    if mesh.size > 1:
        sizes = " x ".join(str(size) for size in mesh.shape.values())
        yield f"{sizes} devices ({' x '.join(mesh.axis_names)})"
    if jax.process_count() > 1:
        yield f"{jax.process_count()} processes"
