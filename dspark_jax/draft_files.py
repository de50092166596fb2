"""Drafts in folders: where their files are, and what is in them, read for a target they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.read import read
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.draft_formats.speculators import config_from_json
from dspark_jax.draft_weights import TABLES, params_from_tensors
from dspark_jax.target_folder import read_json


def draft_folder(run: Path) -> Path:
    """The folder with the draft's files: `run` itself, or draft/ in a run's output."""
    return run / "draft" if (run / "draft" / "config.json").is_file() else run


def whole(stored: Stored) -> np.ndarray:
    """All of a stored tensor, in its stored type."""
    return read(stored, (slice(None),) * len(stored.shape))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a draft but its target's tables, bfloat16 as float32.

    Raises ValueError when a file is missing, cut off or corrupt.
    """
    tensors = {}
    for name, stored in stored_tensors(folder).items():
        if name not in TABLES:
            value = whole(stored)
            tensors[name] = value.astype(np.float32) if value.dtype == jnp.bfloat16 else value
    return tensors


def target_ids(folder: Path, tensors: Mapping[str, np.ndarray], config: DraftConfig) -> np.ndarray:
    """The target token of every draft token: `d2t` plus its index.

    Raises ValueError when a reduced vocabulary comes without it, or its ids do not ascend within
    the target's vocabulary; decoding finds them by bisection and would accept wrongly.
    """
    place = np.arange(config.draft_vocab_size, dtype=np.int32)
    if config.draft_vocab_size == config.vocab_size:
        return place
    if "d2t" not in tensors:
        raise ValueError(
            f"draft {folder} proposes {config.draft_vocab_size} of {config.vocab_size} tokens but "
            "its model.safetensors has no d2t that says which; save it with the weights."
        )
    offsets = tensors["d2t"].astype(np.int64)
    if offsets.shape != place.shape:
        problem = f"has shape {list(offsets.shape)}"
    else:
        problem = _misplaced(offsets + place, config)
    if problem is not None:
        raise ValueError(
            f"d2t of draft {folder} {problem}: it does not give {len(place)} ascending ids below "
            f"{config.vocab_size}; use the file that was saved with the weights."
        )
    return (offsets + place).astype(np.int32)


def _misplaced(ids: np.ndarray, config: DraftConfig) -> str | None:
    outside = (ids < 0) | (ids >= config.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        return f"maps draft token {at} to {ids[at]}, outside the vocabulary of {config.vocab_size}"
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        return f"maps two draft tokens to token {values[(counts > 1).argmax()]}"
    return "is not in ascending order" if (np.diff(ids) <= 0).any() else None


def load_draft(folder: Path, target: TargetConfig) -> tuple[DraftConfig, Any, np.ndarray]:
    """(config, params, target_id) of a draft folder; ValueError when it does not fit the target."""
    described = read_description(folder)
    check_sizes(folder, described, target)
    config = config_from_json(described)
    if max(config.aux_layer_ids) > target.num_hidden_layers:
        raise ValueError(
            f"drafter aux layers {list(config.aux_layer_ids)} exceed the target's "
            f"{target.num_hidden_layers} layers (config.json of {folder}); "
            "use the drafter trained for this target."
        )
    tensors = read_tensors(folder)
    params = nnx.state(params_from_tensors(config, tensors), nnx.Param)
    return config, params, target_ids(folder, tensors, config)


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a draft; ValueError when the folder is something else."""
    if not folder.is_dir():
        raise ValueError(f"draft {folder} is no folder; give OUTPUT/draft of a run.")
    described = read_json(folder / "config.json", "draft")
    if "speculators_model_type" not in described:
        raise ValueError(
            f"config.json of {folder} describes no draft (it has no speculators_model_type); give "
            "OUTPUT/draft of a run."
        )
    return described


def check_sizes(
    folder: Path, described: dict[str, Any], target: TargetConfig | DraftConfig
) -> None:
    """Raise ValueError when a draft was not made for a target of this shape."""
    layer = layer_of(described)
    for name in ("hidden_size", "vocab_size"):
        found, needed = layer.get(name), getattr(target, name)
        if found is not None and found != needed:
            raise ValueError(
                f"drafter {name} {found} does not match target {name} {needed} "
                f"(config.json of {folder}); use the drafter trained for this target."
            )


def layer_of(described: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes a layer."""
    return described.get("transformer_layer_config") or {}
