"""A folder of safetensors, JSON and text that appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.folder import INDEX
from dspark_jax.checkpoints.header import DTYPES
from dspark_jax.convert.tensors import Outgoing

SHARD_BYTES = 5_000_000_000
"""Above this a checkpoint is written in several files."""
LONE = "model.safetensors"


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and is gone if it fails.

    Raises ValueError when `output` holds anything, OSError when it cannot be written.
    """
    check_free(output)
    partial = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(".partial", f".{output.name}.", output.parent))
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        os.rename(partial, output)  # onto an empty folder too
    except OSError as error:
        raise OSError(
            f"{output} cannot be written: {error.strerror or error}; nothing was left there."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_free(output: Path) -> None:
    """Raise ValueError when something is at the destination."""
    if output.is_dir() and not output.is_symlink():
        if any(output.iterdir()):
            raise ValueError(f"output {output} is not empty; give a new folder.")
    elif output.exists() or output.is_symlink():
        raise ValueError(f"output {output} exists and is no folder; give a new folder.")


def check_space(folder: Path, tensors: Iterable[Outgoing]) -> None:
    """Raise OSError when the tensors do not fit on the disk of a folder."""
    needed, free = sum(t.nbytes for t in tensors), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed:,} bytes are needed but {free:,} are free on its disk")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(
    folder: Path, tensors: Sequence[Outgoing], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards of at most so many bytes and their index."""
    check_space(folder, tensors)
    shards = split(tensors, shard_bytes)
    if len(shards) == 1:
        write_file(folder / LONE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def split(tensors: Sequence[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """The tensors in order, in groups of at most so many bytes or of one tensor."""
    shards: list[list[Outgoing]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def write_file(path: Path, tensors: Iterable[Outgoing]) -> None:
    """Write one safetensors file, holding a piece of a tensor at a time."""
    # The widest types first, as safetensors does, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda t: (-DTYPES[t.code].itemsize, t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        offsets = {"data_offsets": [start, end]}
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape)} | offsets
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for piece in tensor.pieces():
                file.write(piece.tobytes())
        file.flush()
        os.fsync(file.fileno())
