"""The devices of a run: how they are laid out, and whether what is asked of them can fit."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.config import DraftConfig
from dspark_jax.draft import init_draft_params
from dspark_jax.sharding import Family, make_mesh, target_mesh, tree_shardings
from dspark_jax.target_folder import TargetFiles
from dspark_jax.targets.load import is_multiplied_out, params_shapes
from dspark_jax.targets.mesh import family
from dspark_jax.train.optimizer import make_optimizer
from dspark_jax.train.settings import TrainSettings


class Meshes(NamedTuple):
    """The same devices, as the draft's training and as the target see them."""

    draft: Mesh
    target: Mesh


def make_meshes(settings: TrainSettings) -> Meshes:
    """ValueError when there are fewer devices than asked for, or a process has none of them."""
    mesh = make_mesh(settings.mesh, settings.batch_rows // settings.accumulate)
    busy = len({device.process_index for device in mesh.devices.flat})
    if busy < jax.process_count():
        raise ValueError(
            f"a mesh of {mesh.size} devices lies on {busy} of {jax.process_count()} processes; let "
            f"--batch-rows be a multiple of all {jax.device_count()} devices, or start fewer "
            "processes."
        )
    devices = list(mesh.devices.flat)
    return Meshes(draft=mesh, target=target_mesh(devices, settings.mesh.tensor_parallel))


def target_shapes(found: TargetFiles, mesh: Mesh, dtype: str) -> Any:
    """The shapes and types of a target's parameters as they are kept: FP8 where it stays FP8."""
    plain = is_multiplied_out(found.config, mesh)
    block = None if plain else quantisation(found.described)
    return params_shapes(found.config, block, jnp.dtype(dtype))


def needed_bytes(
    settings: TrainSettings, found: TargetFiles, draft: DraftConfig, meshes: Meshes
) -> dict[str, int]:
    """What training holds on every device at least, by what it is.

    Of the activations only the target's states and one residual stream per draft layer are counted,
    so that what does not fit by this does not fit.
    """
    held = target_shapes(found, meshes.target, settings.compute_dtype)
    params = jax.eval_shape(lambda: init_draft_params(draft, settings.seed))
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    weights = share_bytes(meshes.draft, params)
    rows = settings.batch_rows // settings.accumulate // meshes.draft.size
    states = settings.sequence_length * (len(draft.aux_layer_ids) + 1)
    slots = settings.max_anchors * draft.block_size
    layers = 1 if settings.gradient_checkpointing else draft.num_hidden_layers
    width = draft.hidden_size * jnp.dtype(settings.compute_dtype).itemsize
    return {
        "target": share_bytes(meshes.target, held, family(found.config)),
        "draft and its gradient": 2 * weights,
        "optimizer state": share_bytes(meshes.draft, jax.eval_shape(optimizer.init, params)),
        "activations": rows * (states + slots * layers) * width,
    }


def share_bytes(mesh: Mesh, tree: Any, table: Family = "training") -> int:
    """Bytes of a tree of shapes that lie on one device of the mesh."""

    def share(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(share, tree, tree_shardings(mesh, tree, table))))


def device_bytes(mesh: Mesh) -> int | None:
    """The memory of the smallest device of this process; None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((found["bytes_limit"] for found in stats if "bytes_limit" in found), default=None)


def check_memory(needed: Mapping[str, int], limit: int | None) -> None:
    """Raise ValueError when a device cannot hold what it must."""
    total = sum(needed.values())
    if limit is None or total <= limit:
        return
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in needed.items())
    raise ValueError(
        f"training needs at least {gigabytes(total)} on every device ({parts}) but a device has "
        f"{gigabytes(limit)}; spread it over more devices (--fully-sharded), or use smaller "
        "--batch-rows, --sequence-length or --max-anchors, a larger --accumulate, or "
        "--compute-dtype bfloat16."
    )


def gigabytes(size: int) -> str:
    """Bytes for reading."""
    return f"{size / 1e9:,.2f} GB"
