"""What the safetensors files of a folder hold, checked before any of their data is read."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dspark_jax.checkpoints.folder import INDEX
from dspark_jax.checkpoints.header import Stored, read_header

NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
SHOWN = 8


class _Shard(NamedTuple):
    name: str
    path: Path


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name: of the shards its index lists, else of all *.safetensors.

    Raises ValueError when there are none, a shard is missing, truncated, corrupt or outside the
    folder, a tensor is not in the shard that the index names or is in two, or a dtype is unknown.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if index.exists() else None
    if weight_map is None:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        expected = {name for found in names for name in _siblings(found)} | set(names)
    else:
        names = expected = set(weight_map.values())
    if not names:
        raise ValueError(f"{folder} holds no *.safetensors file; give a model's folder.")
    shards = [_Shard(name, _inside(folder, name)) for name in sorted(expected)]
    if missing := [shard.name for shard in shards if not shard.path.is_file()]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}; "
            "download them."
        )
    found: dict[str, Stored] = {}
    shard_of: dict[str, str] = {}
    for shard in shards:
        for name, stored in read_header(shard.path).items():
            if name in found:
                raise ValueError(
                    f"tensor {name} is in both {shard_of[name]} and {shard.name} of {folder}; "
                    "remove the file that does not belong to this model."
                )
            found[name], shard_of[name] = stored, shard.name
    _check_map(folder, weight_map or {}, shard_of)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"index {index} cannot be read: {type(error).__name__} {error}; download it again."
        ) from error
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"index {index} has no map of tensor names to files; download it again.")
    return weight_map


def _siblings(name: str) -> Iterable[str]:
    """All shards of a numbered one, so that without an index too a missing one is noticed."""
    if not (match := NUMBERED.fullmatch(name)):
        return ()
    stem, count = match[1], match[3]
    return (f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, int(count) + 1))


def _inside(folder: Path, name: str) -> Path:
    """The path of a shard; ValueError when it is no safetensors file or leads out of the folder."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        # The hub's cache: every file of snapshots/<commit> is a link into blobs beside it.
        allowed.append(home.parent.parent / "blobs")
    path = folder / name
    if not name.endswith(".safetensors") or "\0" in name:
        raise ValueError(
            f"{folder} names the weights file {name!r}; only *.safetensors files are opened."
        )
    real = path.resolve()
    lexical = Path(name)
    if (
        lexical.is_absolute()
        or ".." in lexical.parts
        or not any(real.is_relative_to(a) for a in allowed)
    ):
        raise ValueError(
            f"{folder} names the weights file {name!r}, which lies outside it at {real}; "
            "put the file itself into the folder, or use the model's own index."
        )
    return path


def _check_map(folder: Path, weight_map: Mapping[str, str], shard_of: Mapping[str, str]) -> None:
    wrong = [f"{name} ({file})" for name, file in weight_map.items() if shard_of.get(name) != file]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{len(wrong)} tensors are not in the shard that {INDEX} of {folder} names: "
            f"{', '.join(wrong[:SHOWN])}{more}; download the model again."
        )
