"""What a training run left beside its draft: its settings, its report, its target."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from dspark_jax.checkpoints.fingerprint import RECORD
from dspark_jax.checkpoints.folder import embedded, resolve
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig
from dspark_jax.convert.source import read_object
from dspark_jax.convert.tensors import FLOATS, Outgoing, copied

TARGET_TABLES = {
    "embed_tokens.weight": ("model.embed_tokens.weight",),
    "lm_head.weight": ("lm_head.weight", "model.embed_tokens.weight"),
}
"""A draft's table: the target's tensor it is, or the one that stands for it where they are tied."""


class RunRecord(NamedTuple):
    """Settings and report of a run; empty where there are none."""

    settings: dict[str, Any]
    report: dict[str, Any]


def run_record(draft: Path) -> RunRecord:
    """The record beside a draft's folder."""
    draft = Path(os.path.abspath(draft))  # as it was given: links stay
    run = draft.parent
    if draft.name != "draft" or not (run / "config.json").is_file():
        return RunRecord({}, {})
    settings = read_object(run / "config.json")
    if "steps" not in settings:
        return RunRecord({}, {})
    report = read_object(run / "report.json") if (run / "report.json").is_file() else {}
    return RunRecord(settings, report)


def target_folder(asked: str | None, settings: dict[str, Any]) -> Path | None:
    """The target's folder: the one asked for, else the run's own where it is on this machine."""
    if asked is not None:
        return resolve(asked)
    if not settings:
        return None
    name = settings.get("target")
    if name is None:
        return embedded("tiny-glm")
    try:
        return resolve(name, offline=True)
    except ValueError:
        return None


def target_tensors(folder: Path) -> dict[str, Outgoing]:
    """A target's tensors by the names of safetensors; of Orbax arrays only its two tables."""
    if not (folder / RECORD).is_file():
        return {name: copied(tensor) for name, tensor in stored_tensors(folder).items()}
    from dspark_jax.convert.saved_tables import saved_tables  # Orbax takes long to import

    return saved_tables(folder)


def target_tables(folder: Path, config: DraftConfig) -> dict[str, Outgoing]:
    """The target's embedding and head; ValueError when they are not those of this draft."""
    stored, found = target_tensors(folder), {}
    for name, choices in TARGET_TABLES.items():
        tensor = next((stored[choice] for choice in choices if choice in stored), None)
        if tensor is None:
            raise ValueError(f"target {folder} has no {choices[0]}; give the target's own folder.")
        if tensor.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"{tensor.name} of target {folder} has shape {list(tensor.shape)} but the draft "
                f"was made for {[config.vocab_size, config.hidden_size]}; give its own target."
            )
        if tensor.code not in FLOATS:
            raise ValueError(
                f"{tensor.name} of target {folder} is {tensor.code}; give a copy of the "
                "target whose embedding and head are not quantised."
            )
        found[name] = tensor
    return found
