"""What a target's weights and config are, in one number."""

import hashlib
import json
from functools import cache
from pathlib import Path

RECORD = "orbax.json"
"""In a folder whose weights are Orbax arrays: what they were made of (`targets/orbax.py`)."""


def target_fingerprint(folder: Path) -> str:
    """SHA-256 over a target's weights and config: what a draft was made for.

    Of Orbax arrays that of the files they were made of, so that a draft fits both. Files that have
    not changed are read once a process.
    """
    record = folder / RECORD
    if record.is_file():
        return json.loads(record.read_text())["source_sha256"]
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    found = [(path, path.stat()) for path in paths]
    return _sha256(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in found))


@cache
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of all files together; their sizes and times only tell changed ones apart."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
