"""Drafts on disk: the speculators files, read back only for a target and settings they fit."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.flax import save_file

from dspark_jax import draft_weights
from dspark_jax.config import DraftConfig
from dspark_jax.draft import draft_graphdef
from dspark_jax.draft_files import (
    check_sizes,
    draft_folder,
    layer_of,
    read_description,
    read_tensors,
    target_ids,
)
from dspark_jax.draft_formats.layer import LAYER_KEYS
from dspark_jax.draft_formats.speculators import SHARED_KEYS, config_to_json
from dspark_jax.target_folder import LoadedTarget, target_fingerprint
from dspark_jax.targets.families import architecture

CHANGEABLE = (
    "confidence_head_with_markov",
    "enable_confidence_head",
    "markov_head_type",
    "markov_rank",
    "max_position_embeddings",
)
"""What a warm start may set anew; a head that no longer fits its tensors is refused by them."""
COMPARED = (
    *SHARED_KEYS,
    *LAYER_KEYS,
    *("aux_hidden_state_layer_ids", "layer_types", "rope_parameters", "sliding_window"),
)
"""Keys of config.json that say what a draft's numbers mean."""


class WarmStart(NamedTuple):
    """Parameters to start from; `target_id` is a reduced vocabulary they were trained with."""

    params: Any
    target_id: np.ndarray | None
    drawn: tuple[str, ...]


def save_draft(
    folder: Path, config: DraftConfig, params: Any, target: LoadedTarget, target_id: np.ndarray
) -> None:
    """Write config.json and model.safetensors (bfloat16) under the speculators names.

    The folder appears whole or not at all. `target_sha256` ties it to its target's weights.
    Raises OSError when it cannot be written.
    """
    drafter = nnx.merge(draft_graphdef(config), params)
    tensors = {
        name: jnp.asarray(value, jnp.bfloat16)
        for name, value in draft_weights.tensors_from_params(drafter).items()
    }
    if config.draft_vocab_size < config.vocab_size:
        offsets = target_id - np.arange(len(target_id))
        chosen = np.isin(np.arange(config.vocab_size), target_id)
        tensors |= {"d2t": jnp.asarray(offsets, jnp.int32), "t2d": jnp.asarray(chosen)}
    made_for = [architecture(target.config)]
    described = config_to_json(config, target.folder.name, made_for, "bfloat16")
    described["target_sha256"] = target_fingerprint(target.folder)
    partial = folder.with_name(folder.name + ".partial")
    write_files(partial, described, tensors)
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    partial.rename(folder)


def write_files(folder: Path, described: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write config.json and model.safetensors; OSError names the folder, as on a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(f"draft {folder} cannot be written: {error}") from error


def warm_start(folder: Path, config: DraftConfig, seed: int) -> WarmStart:
    """Start from a draft that may lack heads; ValueError when the rest of it is another draft.

    `folder` is the draft's or that of a run. Keys that its config.json lacks are not compared: a
    DFlash draft knows none of the heads'.
    """
    folder = draft_folder(folder)
    described = read_description(folder)
    check_sizes(folder, described, config)
    ours = config_to_json(config, "", [], "bfloat16")
    for part, wanted in (described, ours), (layer_of(described), layer_of(ours)):
        for name in part.keys() & wanted.keys() & (set(COMPARED) - set(CHANGEABLE)):
            if part[name] != wanted[name]:
                raise ValueError(
                    f"draft {folder} has {name} {part[name]} but this run asks for {wanted[name]}; "
                    "give the flags it was trained with."
                )
    tensors = read_tensors(folder)
    drafter, drawn = draft_weights.warm_start(config, tensors, nnx.Rngs(seed))
    reduced = config.draft_vocab_size < config.vocab_size
    ids = target_ids(folder, tensors, config) if reduced else None
    return WarmStart(nnx.state(drafter, nnx.Param), ids, drawn)
