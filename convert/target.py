"""`target`: a Hugging Face target as Orbax arrays, which load faster and onto any mesh."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from dspark_jax.checkpoints.fingerprint import RECORD, target_fingerprint
from dspark_jax.checkpoints.folder import resolve
from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.convert.files import appearing, check_free
from dspark_jax.convert.settings import Target
from dspark_jax.convert.source import read_object
from dspark_jax.sharding import target_mesh
from dspark_jax.targets.families import read_config
from dspark_jax.targets.load import FP8, SCALES, is_narrowed, kept_type, load_params
from dspark_jax.targets.mesh import check_mesh
from dspark_jax.targets.orbax import ARRAYS, is_saved, save_params

BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What is copied beside the arrays: configuration, tokenizer, chat template."""
NOT_BESIDE = ("model.safetensors.index.json", RECORD)


def convert_target(given: Target) -> str:
    """Write the arrays and copy what lies beside the weights; returns what to say.

    Raises ValueError when the source is no target or the devices cannot share it, OSError when the
    output cannot be written.
    """
    check_free(given.output)
    source = resolve(given.source)
    if is_saved(source):
        raise ValueError(f"{source} holds Orbax arrays already; copy the folder as it is.")
    described = read_object(source / "config.json")
    config, block, stored = read_config(described), quantisation(described), stored_tensors(source)
    mesh = target_mesh(chosen_devices(given.devices), given.tensor_parallel)
    check_mesh(config, mesh)
    needed, free = written_bytes(stored, given.dtype), free_bytes(given.output)
    if needed > free:
        raise OSError(f"{given.output} needs {needed:,} bytes but its disk has {free:,} free.")
    with Console(stderr=True).status("reading the target") as status:

        def progress(done_bytes: int, total_bytes: int) -> None:
            status.update(f"reading the target, {done_bytes / total_bytes:.0%}")

        params = load_params(config, stored, block, mesh, given.dtype, progress, as_stored=True)
        status.update("writing the arrays")
        narrowed = given.dtype is not None and is_narrowed(config, stored, given.dtype)
        about = {
            "source": given.source,
            "source_sha256": target_fingerprint(source),
            "narrowed_to": given.dtype if narrowed else None,
        }
        with appearing(given.output) as folder:
            copy_beside(source, folder)
            save_params(folder, params, about)
    size = sum(p.stat().st_size for p in (given.output / ARRAYS).rglob("*") if p.is_file())
    return (
        f"converted {given.source} to {given.output}: {size:,} bytes, "
        f"{given.dtype or 'types as stored'}"
        f"{', FP8 as it is stored' if block else ''}.\nto train on it: python -m dspark_jax.train "
        f"--target {given.output}"
    )


def chosen_devices(count: int | None) -> list[Any]:
    """The first so many devices, or all; ValueError when there are not so many."""
    devices = jax.devices()
    if count is None:
        return devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"--devices {count} does not fit the {len(devices)} devices here; give 1 to "
            f"{len(devices)}."
        )
    return devices[:count]


def written_bytes(stored: Mapping[str, Stored], dtype: str | None) -> int:
    """What the arrays take: FP8 and its scales as they are stored, all else in `dtype` if given."""

    def width(tensor: Stored) -> int:
        if dtype is None or tensor.dtype == FP8 or tensor.name.endswith(SCALES):
            return tensor.dtype.itemsize
        return jnp.dtype(kept_type(tuple(tensor.name.split(".")), dtype)).itemsize

    return sum(math.prod(tensor.shape) * width(tensor) for tensor in stored.values())


def copy_beside(source: Path, folder: Path) -> None:
    """Copy the small files of a target; of the hub's cache the files that its links point at."""
    found: set[Path] = {path for pattern in BESIDE for path in source.glob(pattern)}
    for path in sorted(found):
        if path.is_file() and path.name not in NOT_BESIDE:
            shutil.copyfile(path, folder / path.name)


def free_bytes(output: Path) -> int:
    """What the disk has left where a folder is to be made."""
    existing: Any = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
