"""Targets on disk: safetensors with config.json, checked before anything expensive."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jinja2 import TemplateError

from dspark_jax.checkpoints.fingerprint import target_fingerprint as target_fingerprint
from dspark_jax.checkpoints.folder import resolve
from dspark_jax.config import TargetConfig
from dspark_jax.sharding import target_mesh
from dspark_jax.targets.families import read_config
from dspark_jax.targets.orbax import check_weights, read_params


class TargetFiles(NamedTuple):
    """A target folder that was looked at, its weights not read; an answer stops at any of `ends`.

    `described` is its config.json.
    """

    folder: Path
    config: TargetConfig
    described: Mapping[str, Any]
    tokenizer: Any
    ends: tuple[int, ...]


class LoadedTarget(NamedTuple):
    """A target in memory; an answer stops at any of the tokens `ends`."""

    folder: Path
    config: TargetConfig
    params: Any
    tokenizer: Any
    ends: tuple[int, ...]


def find_target(name: str | Path, aux_layer_ids: tuple[int, ...]) -> TargetFiles:
    """Read config.json, tokenizer, chat template and the headers of *.safetensors of a target.

    `name` is a folder or a hub id `org/name[@revision]`. Raises ValueError when it is no target, or
    its tokenizer knows more tokens than the target's embedding has rows.
    """
    folder = resolve(str(name)).resolve()
    described = read_json(folder / "config.json", "target")
    config = read_config(described, aux_layer_ids=aux_layer_ids)
    if config.num_hidden_layers < max(aux_layer_ids, default=0):
        raise ValueError(
            f"aux_layer_ids {list(aux_layer_ids)} do not fit target {folder} of "
            f"{config.num_hidden_layers} layers; give numbers from 0 to "
            f"{config.num_hidden_layers}, or the --target that they are meant for."
        )
    check_weights(folder, described)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens but the target's embedding has "
            f"{config.vocab_size} rows; use the tokenizer the target was trained with."
        )
    ends = end_tokens(folder, described, tokenizer)
    return TargetFiles(folder, config, described, tokenizer, ends)


def read_target(
    found: TargetFiles, mesh: Mesh, dtype: str, progress: Callable[[int, int], None]
) -> LoadedTarget:
    """Its weights in `dtype`, each part read straight onto the device of the mesh that holds it.

    `progress(done_bytes, total_bytes)` follows the reading. Raises ValueError as `load_params`.
    """
    folder, config, described, tokenizer, ends = found
    params = read_params(config, folder, described, mesh, dtype, progress)
    return LoadedTarget(folder, config, params, tokenizer, ends)


def load_target(name: str | Path, aux_layer_ids: tuple[int, ...]) -> LoadedTarget:
    """A target in float32 on one device; raises ValueError as `find_target` and `read_target`."""
    mesh = target_mesh(jax.devices()[:1], 1)
    return read_target(find_target(name, aux_layer_ids), mesh, "float32", lambda done, total: None)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer and its chat template; ValueError when either is missing or broken."""
    tokenizer = read_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {folder} has no chat template; add chat_template.jinja."
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template of {folder} is broken: {error}.") from error
    return tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer, with or without a chat template; no code of the folder is run.

    Raises ValueError when there is none, it is broken, or it needs code of its own.
    """
    # Only the tokenizer is used; without this, transformers warns that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # Left unset, transformers would ask on the terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer of {folder} needs code of its own (auto_map in its "
                "tokenizer_config.json), which is never run; use a tokenizer that transformers "
                "knows."
            ) from error
        raise ValueError(f"the tokenizer of {folder} cannot be read: {error}.") from error


def end_tokens(folder: Path, described: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Where answers stop: generation_config.json's list, else config.json's, else the tokenizer's.

    Raises ValueError when none of them names one.
    """
    generation = folder / "generation_config.json"
    found = read_json(generation, "target").get("eos_token_id") if generation.exists() else None
    for choice in (found, described.get("eos_token_id"), tokenizer.eos_token_id):
        if choice is not None:
            return tuple(choice) if isinstance(choice, list) else (choice,)
    raise ValueError(
        f"target {folder} names no eos_token_id in generation_config.json, config.json or its "
        "tokenizer; add one, or answers never end."
    )


def mask_token(target: TargetFiles) -> int:
    """The tokenizer's mask token, else a spare embedding row, else its padding token."""
    tokenizer = target.tokenizer
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    if len(tokenizer) < target.config.vocab_size:
        return len(tokenizer)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer and its chat template."""
    text = tokenizer.backend_tokenizer.to_str() + tokenizer.chat_template
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object; ValueError says which file is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path.parent} has no readable {path.name}: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}, not an object; use the {what}'s own file."
        )
    return value
