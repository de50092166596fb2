"""Which models are served: a draft's folder leads to its target, both are read and fitted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax import calibration_file
from dspark_jax.checkpoints.fingerprint import target_fingerprint
from dspark_jax.checkpoints.folder import embedded, resolve
from dspark_jax.config import DraftConfig
from dspark_jax.draft import dspark_draft
from dspark_jax.draft_files import draft_folder, load_draft, read_description
from dspark_jax.loop import Weights, prepare_weights
from dspark_jax.sharding import place, tree_shardings
from dspark_jax.target_folder import TargetFiles, find_target, read_target
from dspark_jax.targets.families import make_target
from dspark_jax.types import Draft, Target

EMBEDDED = "tiny-glm"


class Named(NamedTuple):
    """What the command line names: `draft` is None for plain decoding."""

    target: str | Path
    draft: Path | None


class Loaded(NamedTuple):
    """Both models in memory, as the decode loop takes them, and the mesh they lie on."""

    files: TargetFiles
    target: Target
    draft: Draft
    weights: Weights
    draft_config: DraftConfig | None
    mesh: Mesh
    temperatures: np.ndarray | None = None
    """Fitted to the draft's confidences; None where nobody has."""


def find(checkpoint: str | None, target: str | None, speculate: bool) -> Named:
    """Folders of both models.

    Without a checkpoint the embedded target is served with its draft, another target without one.
    A checkpoint's target is `target`, else the one that its run's config.json or its own names.
    Raises ValueError when neither can be found.
    """
    if checkpoint is None:
        draft = embedded(f"{EMBEDDED}-dspark") if target is None and speculate else None
        return Named(target or embedded(EMBEDDED), draft)
    folder = draft_folder(resolve(checkpoint))
    found = target or _target_of(folder)
    return Named(found, folder if speculate else None)


def load(
    named: Named,
    mesh: Mesh,
    dtype: str | None,
    progress: Callable[[int, int], None],
    candidates: int | None = None,
) -> Loaded:
    """Read both onto a mesh; ValueError in one sentence when they do not fit it or one another.

    `dtype` None means the type that the target's config.json names. The draft draws each token
    among `candidates`, or from its whole vocabulary.
    """
    if named.draft is None:
        files = find_target(named.target, ())
        return _read(files, None, None, None, mesh, dtype, progress)
    described = read_description(named.draft)
    layers = tuple(described.get("aux_hidden_state_layer_ids", ()))
    files = find_target(named.target, layers)
    config, params, target_id = load_draft(named.draft, files.config)
    made_for = described.get("target_sha256")
    if made_for is not None and made_for != target_fingerprint(files.folder):
        raise ValueError(
            f"draft {named.draft} was trained for another target than {files.folder} (their "
            "fingerprints differ); give the --target that it was trained for."
        )
    fitted = calibration_file.read(named.draft, config.draft_length)
    loaded = _read(files, config, params, target_id, mesh, dtype, progress, candidates)
    return loaded._replace(temperatures=fitted)


def _read(
    files: TargetFiles,
    config: DraftConfig | None,
    params: Any,
    target_id: np.ndarray | None,
    mesh: Mesh,
    dtype: str | None,
    progress: Callable[[int, int], None],
    candidates: int | None = None,
) -> Loaded:
    dtype = dtype or stored_type(files.described)
    target = make_target(files.config, mesh)
    draft = no_draft() if config is None else dspark_draft(config, mesh, candidates)
    loaded = read_target(files, mesh, dtype, progress)
    tables = jax.eval_shape(target.frozen, loaded.params, target_id)
    lie = tree_shardings(mesh, tables, "draft")
    frozen = jax.jit(target.frozen, out_shardings=lie)(loaded.params, target_id)
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    params = jax.tree.map(place, params, tree_shardings(mesh, params, "draft"))
    weights = jax.jit(lambda p, d, f: prepare_weights(target, draft, p, d, f))(
        loaded.params, params, frozen
    )
    return Loaded(files, target, draft, weights, config, mesh)


def stored_type(described: Mapping[str, Any]) -> str:
    """The type that a config.json names; on a CPU, which multiplies nothing narrower, float32."""
    if jax.default_backend() == "cpu":
        return "float32"
    return str(described.get("dtype") or described.get("torch_dtype") or "float32")


def no_draft() -> Draft:
    """A draft of nothing, for plain decoding."""

    def nothing(*_: Any) -> Any:
        raise AssertionError("a draft of no tokens is never asked for any")

    return Draft(
        draft_length=0,
        prepare=lambda params: params,
        init_cache=lambda batch, capacity, dtype=None: (),
        extend_context=lambda prepared, cache, aux_hidden, position, pages=None: cache,
        draft_block=nothing,
    )


def _target_of(draft: Path) -> str | Path:
    """The target that a run, else a draft's config.json, names."""
    run = draft.parent / "config.json"
    if draft.name == "draft" and run.is_file():
        named = json.loads(run.read_text()).get("target")
        return named or embedded(EMBEDDED)
    verifier = read_description(draft).get("speculators_config", {}).get("verifier", {})
    name = verifier.get("name_or_path")
    if not name:
        raise ValueError(f"draft {draft} names no target in its config.json; give --target.")
    return embedded(EMBEDDED) if name == EMBEDDED else str(name)
