"""What a target's weights and config are, in one number."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

RECORD = "orbax.json"
"""In a folder whose weights are Orbax arrays: what they were made of (`targets/orbax.py`)."""


def target_fingerprint(folder: Path) -> str:
    """SHA-256 over a target's weights and config: what a draft was made for.

    Of Orbax arrays that of the files they were made of, so that a draft fits both, unless they were
    narrowed: those are another target. Files that have not changed are read once a process. Raises
    ValueError as `read_record`.
    """
    if (folder / RECORD).is_file():
        record = read_record(folder)
        source, narrowed = record["source_sha256"], record.get("narrowed_to")
        if narrowed is None:
            return source
        return hashlib.sha256(f"{source} in {narrowed}".encode()).hexdigest()
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    found = [(path, path.stat()) for path in paths]
    return _sha256(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found))


def read_record(folder: Path) -> dict[str, Any]:
    """What Orbax arrays were made of; ValueError when that cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not _is_whole(record):
        raise ValueError(
            f"{folder / RECORD} is broken; make the folder again with `convert target`."
        )
    return record


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether every entry is of its kind; records from before `checksums` have none."""
    blocks, arrays, sums = (record.get(key) for key in ("blocks", "arrays", "checksums"))
    return (
        isinstance(record.get("source_sha256"), str)
        and isinstance(record.get("narrowed_to"), str | None)
        and isinstance(blocks, dict)
        and isinstance(arrays, dict)
        and all(
            _are_sizes(block) and len(block) == 2 and 0 not in block for block in blocks.values()
        )
        and all(isinstance(kind, list) and len(kind) == 2 for kind in arrays.values())
        and all(_are_sizes(shape) and isinstance(dtype, str) for shape, dtype in arrays.values())
        and (sums is None or (isinstance(sums, dict) and sums.keys() == arrays.keys()))
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


@cache
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of all files together; their sizes and times only tell changed ones apart."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
