"""What every kind of round costs, kept on disk: measured once for a model on a machine.

The file lies beside the compiled programs and names everything that the numbers depend on. Where it
is broken or of something else they are measured again. What a server learns of its rounds later
stays with it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from dspark_jax import __version__, ops
from dspark_jax.serve.models import Loaded
from dspark_jax.serve.programs import Shape, Sizes


def made_for(loaded: Loaded, sizes: Sizes, dtype: str, schedule: str) -> dict[str, Any]:
    """Everything that costs depend on: models by their configs, devices, programs, versions."""
    draft = loaded.draft_config
    target = json.dumps(loaded.files.described, sort_keys=True, default=str)
    arrays = jax.tree.leaves(loaded.weights)
    placed = {device for x in arrays for device in x.devices()}
    return {
        "target": hashlib.sha256(target.encode()).hexdigest(),
        "draft": None if draft is None else _plain(asdict(draft)),
        "candidates": loaded.draft.candidates,
        "devices": sorted(f"{d.platform} {d.device_kind}" for d in placed),
        "meshes": sorted({str(x.sharding.mesh.shape) for x in arrays if _spread(x)}),
        "cores": os.cpu_count(),
        "dtype": dtype,
        "schedule": schedule,
        "kernels": dict(ops.picked()),
        "sizes": _plain(asdict(sizes)),
        "versions": {"jax": jax.__version__, "dspark_jax": __version__},
    }


def known(
    folder: Path,
    facts: Mapping[str, Any],
    shapes: Iterable[Shape],
    measure: Callable[[], dict[Shape, float]],
    again: bool,
) -> tuple[dict[Shape, float], str]:
    """(seconds of every shape, what to say of them): read where they are kept, else measured."""
    path = path_in(folder, facts)
    found = None if again else read(path, facts, shapes)
    if found is not None:
        return found, f"costs of rounds: those kept in {path}; --profile-again measures them anew"
    measured = measure()
    try:
        write(path, facts, measured)
    except OSError as error:  # only the next start is slower for it
        return measured, f"costs of rounds: measured; they cannot be kept in {path} ({error})"
    return measured, f"costs of rounds: measured, and kept in {path}"


def path_in(folder: Path, facts: Mapping[str, Any]) -> Path:
    """Where costs of these facts are kept."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"round-costs-{name}.json"


def read(
    path: Path, facts: Mapping[str, Any], shapes: Iterable[Shape]
) -> dict[Shape, float] | None:
    """Seconds of every shape; None where the file is not whole or of something else."""
    try:
        kept = json.loads(path.read_text())
        if kept["made_for"] != facts:
            return None
        seconds = {Shape(*row[:3], False): float(row[3]) for row in kept["seconds"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    whole = seconds.keys() == set(shapes) and all(0 < s < float("inf") for s in seconds.values())
    return seconds if whole else None


def write(path: Path, facts: Mapping[str, Any], seconds: Mapping[Shape, float]) -> None:
    """Keep them, whole or not at all. Raises OSError."""
    rows = [[shape.group, shape.budget, shape.pages, took] for shape, took in seconds.items()]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"made_for": facts, "seconds": rows}, indent=1) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _spread(x: jax.Array) -> bool:
    return isinstance(x.sharding, NamedSharding)


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that what is read equals what was written."""
    return json.loads(json.dumps(value, default=str))
