"""The header of one safetensors file: names, dtypes, shapes and places of its tensors."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000
"""What the safetensors library itself accepts."""
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
}


class Stored(NamedTuple):
    """One tensor in a file: `nbytes` bytes from byte `offset` of `path`, in C order."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name; its data is not read.

    Raises ValueError when the file is unreadable, truncated or corrupt, or a dtype is unknown.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            start = LENGTH_BYTES + length
            if size < LENGTH_BYTES:
                raise _corrupt(path, f"has {size} bytes, fewer than a header's {LENGTH_BYTES}")
            if length > LARGEST_HEADER_BYTES:
                raise _corrupt(
                    path, f"gives its header {length} bytes of at most {LARGEST_HEADER_BYTES}"
                )
            if start > size:
                raise _truncated(path, start, size)
            text = file.read(length)
    except OSError as error:
        raise ValueError(
            f"weights {path} cannot be read: {error}; check the file and its permissions."
        ) from error
    try:
        described = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"has a header that is no JSON ({error})") from error
    if not isinstance(described, dict):
        raise _corrupt(path, f"has a {type(described).__name__} for a header, not an object")
    described.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, start) for name, entry in described.items()}
    end = start
    for stored in sorted(tensors.values(), key=lambda s: (s.offset, s.nbytes)):
        if stored.offset != end:
            raise _corrupt(path, f"has tensor {stored.name} at byte {stored.offset}, not {end}")
        end += stored.nbytes
    if end > size:
        raise _truncated(path, end, size)
    if end < size:
        raise _corrupt(path, f"has {size} bytes where its header tells of {end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _corrupt(path, f"describes tensor {name} without dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(
            f"tensor {name} of {path} has dtype {kind}; supported are {', '.join(DTYPES)}."
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _corrupt(path, f"gives tensor {name} shape {shape} and data_offsets {offsets}")
    dtype, nbytes = DTYPES[kind], offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if nbytes != needed:
        raise _corrupt(path, f"gives tensor {name} {nbytes} bytes where its shape needs {needed}")
    return Stored(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _truncated(path: Path, needed: int, size: int) -> ValueError:
    return ValueError(
        f"weights {path} are truncated: the header tells of {needed} bytes but the file has "
        f"{size}; download it again."
    )


def _corrupt(path: Path, what: str) -> ValueError:
    return ValueError(f"weights {path} are corrupt: the file {what}; download it again.")
