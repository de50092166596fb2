"""Targets and drafts on disk: safetensors with config.json, checked before anything expensive."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import load_file, save_file

from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.draft_weights import (
    config_from_json,
    config_to_json,
    params_from_tensors,
    tensors_from_params,
    warm_start,
)
from dspark_jax.drafter import Drafter
from dspark_jax.targets import weights as glm_weights


class LoadedTarget(NamedTuple):
    """A target folder in memory."""

    folder: Path
    config: TargetConfig
    params: Any
    tokenizer: Any


def embedded(name: str) -> Path:
    """A folder of the package's own data: `tiny-glm` or `tiny-glm-dspark`."""
    import dspark_jax

    return Path(dspark_jax.__file__).resolve().parent / "assets" / name


def load_target(folder: Path, aux_layer_ids: tuple[int, ...]) -> LoadedTarget:
    """Read config.json, *.safetensors, tokenizer and chat template of a target.

    Raises ValueError when the folder is no target, or its tokenizer knows more tokens than the
    target's embedding has rows.
    """
    # Only the tokenizer is used; without this, transformers warns that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    described = read_json(folder / "config.json", "target")
    config = glm_weights.config_from_json(described, aux_layer_ids=aux_layer_ids)
    if config.num_hidden_layers < max(aux_layer_ids, default=0):
        raise ValueError(
            f"aux_layer_ids {list(aux_layer_ids)} do not fit target {folder} of "
            f"{config.num_hidden_layers} layers; give numbers from 0 to {config.num_hidden_layers}."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens but the target's embedding has "
            f"{config.vocab_size} rows; use the tokenizer the target was trained with."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template; add chat_template.jinja."
        )
    shapes, place = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                shapes[name], place[name] = tuple(file.get_slice(name).get_shape()), path
    if not shapes:
        raise ValueError(f"target {folder} holds no *.safetensors file; give a model's folder.")

    def get(name: str) -> np.ndarray:
        with open_safetensors(place[name]) as file:
            return np.asarray(file.get_tensor(name))

    params = glm_weights.params_from_tensors(config, shapes, get)
    return LoadedTarget(folder, config, params, tokenizer)


def mask_token(target: LoadedTarget) -> int:
    """The tokenizer's mask token, else a spare embedding row, else its padding token."""
    tokenizer = target.tokenizer
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    if len(tokenizer) < target.config.vocab_size:
        return len(tokenizer)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def save_draft(
    folder: Path, config: DraftConfig, params: Any, target: LoadedTarget, target_id: np.ndarray
) -> None:
    """Write config.json and model.safetensors (bfloat16) under the speculators names.

    The folder appears whole or not at all. `target_sha256` ties it to its target's weights.
    """
    drafter = nnx.merge(nnx.split(nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0))))[0], params)
    tensors = {n: jnp.asarray(t, jnp.bfloat16) for n, t in tensors_from_params(drafter).items()}
    if config.draft_vocab_size < config.vocab_size:
        offsets = target_id - np.arange(len(target_id))
        chosen = np.isin(np.arange(config.vocab_size), target_id)
        tensors |= {"d2t": jnp.asarray(offsets, jnp.int32), "t2d": jnp.asarray(chosen)}
    described = config_to_json(config, target.folder.name, [glm_weights.ARCHITECTURE], "bfloat16")
    described["target_sha256"] = target_fingerprint(target.folder)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    partial.rename(folder)


def load_draft(folder: Path, target: TargetConfig) -> tuple[DraftConfig, Any, np.ndarray]:
    """(config, params, target_id) of a draft folder; ValueError when it does not fit the target."""
    config = config_from_json(read_json(folder / "config.json", "draft"))
    check_fit(folder, config, target)
    tensors = read_tensors(folder)
    params = nnx.state(params_from_tensors(config, tensors), nnx.Param)
    return config, params, _target_ids(tensors, config)


def warm_params(
    folder: Path, config: DraftConfig, target: TargetConfig, seed: int
) -> tuple[Any, tuple[str, ...]]:
    """Parameters to continue from, and the heads that had to be drawn afresh."""
    layer = read_json(folder / "config.json", "draft").get("transformer_layer_config", {})
    for name in ("hidden_size", "vocab_size"):
        _check_size(folder, name, layer.get(name, getattr(target, name)), getattr(target, name))
    drafter, drawn = warm_start(config, read_tensors(folder), nnx.Rngs(seed))
    return nnx.state(drafter, nnx.Param), drawn


def check_fit(folder: Path, draft: DraftConfig, target: TargetConfig) -> None:
    """Raise ValueError when a draft was not made for a target of this shape."""
    for name in ("hidden_size", "vocab_size"):
        _check_size(folder, name, getattr(draft, name), getattr(target, name))
    if max(draft.aux_layer_ids) > target.num_hidden_layers:
        raise ValueError(
            f"drafter aux layers {list(draft.aux_layer_ids)} exceed the target's "
            f"{target.num_hidden_layers} layers (config.json of {folder}); "
            "use the drafter trained for this target."
        )


def _check_size(folder: Path, name: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise ValueError(
            f"drafter {name} {ours} does not match target {name} {theirs} "
            f"(config.json of {folder}); use the drafter trained for this target."
        )


def target_fingerprint(folder: Path) -> str:
    """SHA-256 over a target's weights and config: what a draft was made for."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a draft folder, bfloat16 as float32."""
    path = folder / "model.safetensors"
    try:
        return {
            name: np.asarray(value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value)
            for name, value in load_file(path).items()
        }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"draft weights {path} cannot be read: {error}.") from error


def open_safetensors(path: Path) -> Any:
    """`safe_open` with one clear sentence when the file is broken."""
    try:
        return safe_open(path, framework="flax")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights {path} cannot be read: {error}.") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object; ValueError says which file is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{what} {path.parent} has no readable config.json: {error}.") from error


def _target_ids(tensors: dict[str, np.ndarray], config: DraftConfig) -> np.ndarray:
    offsets = tensors.get("d2t", np.zeros(config.draft_vocab_size, np.int32))
    return offsets.astype(np.int32) + np.arange(config.draft_vocab_size, dtype=np.int32)
