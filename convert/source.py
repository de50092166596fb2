"""A draft checkpoint on disk, in any of the formats: opened, checked, not yet read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.checkpoints.folder import resolve
from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig
from dspark_jax.convert.tensors import CODES, FLOATS
from dspark_jax.draft_files import draft_folder, target_ids, whole
from dspark_jax.draft_formats.formats import Kind, Reading
from dspark_jax.draft_weights import NOT_TRAINED, TABLES, check_tensors, parameter_table

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
IMPORTED = "imported.json"
"""What an imported draft was read from: its format and its config.json, key for key."""


class Opened(NamedTuple):
    """A checkpoint's folder, config.json and tensors; `source` is what it was imported from."""

    folder: Path
    described: dict[str, Any]
    stored: dict[str, Stored]
    source: tuple[Kind, dict[str, Any]] | None


def open_checkpoint(name: str) -> Opened:
    """The draft in a folder, in a run's output, or of a hub id; ValueError when there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        what = f"the folder {path.parent}" if path.suffix not in PICKLES else _unpickle(path.parent)
        raise ValueError(f"{name} is a file, not a checkpoint's folder; give {what}.")
    folder = draft_folder(resolve(name))
    if not (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"the run in {folder} has written no draft yet; give its training command again, and "
            "it goes on to the end."
        )
    described = read_object(folder / "config.json")
    if "speculators_model_type" not in described and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"the run in {folder} has written no draft yet; give its training command again, and "
            "it goes on to the end."
        )
    _refuse_pickles(folder)
    imported, source = folder / IMPORTED, None
    if imported.is_file():
        told = read_object(imported)
        if not isinstance(told.get("config"), dict) or not isinstance(told.get("format"), str):
            raise ValueError(f"{imported} has no format and config; import the draft again.")
        source = (told["format"], told["config"])
    return Opened(folder, described, stored_tensors(folder), source)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError when the file holds none."""
    try:
        value = json.loads(path.read_text(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as {', '.join(pickles)}, which are pickles: opening one "
            f"can run any code in it, so it is never done here; {_unpickle(folder)}."
        )


def _unpickle(folder: Path) -> str:
    return (
        f'a folder of safetensors, made where you trust the files: python -c "import torch, '
        f"safetensors.torch as s; s.save_file(torch.load('FILE', map_location='cpu', "
        f"weights_only=True), '{folder}/model.safetensors')\""
    )


def checked(opened: Opened, reading: Reading) -> np.ndarray:
    """The target token of every draft token, once every tensor is found to be as it should.

    Raises ValueError as `check_stored`, and when the vocabulary map is not one.
    """
    check_stored(opened, reading)
    return vocabulary(opened, reading.said.config)


def check_stored(opened: Opened, reading: Reading) -> None:
    """Raise ValueError naming every tensor that is missing, unknown, mis-shaped or mistyped."""
    config, stored = reading.said.config, opened.stored
    if config.num_hidden_layers > len(stored):
        raise ValueError(
            f"config.json of {opened.folder} has num_hidden_layers {config.num_hidden_layers} but "
            f"there are only {len(stored)} tensors; use the pair that was saved together."
        )
    try:
        check_tensors(parameter_table(config), stored)
    except ValueError as error:
        raise ValueError(f"{opened.folder}: {error}.") from error
    problems = [
        f"{name} has shape {list(stored[name].shape)} where {list(shape)} is needed"
        for name, shape in table_shapes(config).items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [
        f"{name} is {CODES[tensor.dtype]}"
        for name, tensor in stored.items()
        if (CODES[tensor.dtype] not in FLOATS) == (name not in ("d2t", "t2d"))
    ]
    if problems:
        raise ValueError(
            f"{opened.folder} has tensors of another shape or type than a draft's: "
            f"{'; '.join(problems)}."
        )


def vocabulary(opened: Opened, config: DraftConfig) -> np.ndarray:
    """The target token of every draft token; ValueError when d2t and t2d give no such map."""
    small = {name: whole(opened.stored[name]) for name in ("d2t", "t2d") if name in opened.stored}
    ids = target_ids(opened.folder, small, config)
    if small and config.draft_vocab_size == config.vocab_size and "d2t" in small:
        if small["d2t"].any():
            raise ValueError(
                f"{opened.folder} has a d2t that moves tokens although its draft vocabulary is the "
                "whole one; use the pair that was saved together."
            )
    if "t2d" in small and not np.array_equal(small["t2d"].astype(bool).nonzero()[0], ids):
        raise ValueError(
            f"t2d and d2t of {opened.folder} choose different tokens; use the file that was saved "
            "with the weights."
        )
    return ids


def table_shapes(config: DraftConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what a checkpoint may hold beside its parameters."""
    V, Vd, D = config.vocab_size, config.draft_vocab_size, config.hidden_size
    tables = {"embed_tokens.weight": (V, D), "verifier_norm.weight": (D,)}
    heads = {"lm_head.weight": (Vd, D), "verifier_lm_head.weight": (Vd, D)}
    shapes = {**tables, **heads, "d2t": (Vd,), "t2d": (V,)}
    assert shapes.keys() == NOT_TRAINED and tables.keys() | heads.keys() == TABLES
    return shapes


def stored_type(opened: Opened) -> np.dtype:
    """The type of the parameters: that of the largest of them."""
    trained = [t for name, t in opened.stored.items() if name not in NOT_TRAINED]
    return max(trained, key=lambda tensor: tensor.nbytes).dtype
