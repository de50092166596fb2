"""Which models a plan is for: built in by name, or read from a config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dspark_jax.checkpoints.folder import resolve
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.plan.builtin import DRAFTS, TARGETS


class Models(NamedTuple):
    """A target and its draft; `block` is what shares one FP8 scale, None for bfloat16 weights."""

    name: str
    target: TargetConfig
    draft: DraftConfig
    block: tuple[int, int] | None


def find_models(target: str, draft: str | None = None) -> Models:
    """The target by name, folder, config.json or hub id, and its draft by folder.

    Without a draft it is the published recipe's for this target, or one of the same form.
    ValueError says what cannot be read or does not fit.
    """
    # The families need jax; names and files are checked before it is imported.
    from dspark_jax.targets.families import read_config

    described = TARGETS[target] if target in TARGETS else read_description(target, "target")
    config = read_config(described)
    drafter = _draft(target, config) if draft is None else _described_draft(draft, config)
    return Models(
        target,
        read_config(described, aux_layer_ids=drafter.aux_layer_ids),
        drafter,
        quantisation(described),
    )


def read_description(name: str, what: str) -> dict[str, Any]:
    """A model's config.json."""
    path = Path(name).expanduser()
    if not path.is_file():
        try:
            path = resolve(name) / "config.json"
        except ValueError as error:
            known = f" Known by name are {', '.join(TARGETS)}." if what == "target" else ""
            raise ValueError(f"{what} {error}{known}") from error
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {path} cannot be read: {error}.") from error
    if not isinstance(described, dict):
        raise ValueError(f"{what} {path} is not a JSON object; give the model's config.json.")
    return described


def _described_draft(name: str, target: TargetConfig) -> DraftConfig:
    from dspark_jax.draft_formats.speculators import config_from_json

    config = config_from_json(read_description(name, "draft"))
    for field in ("vocab_size", "hidden_size"):
        ours, wanted = getattr(config, field), getattr(target, field)
        if field == "hidden_size":
            ours = config.target_hidden_size or ours
        if ours != wanted:
            raise ValueError(
                f"drafter {field} {ours} does not match target {field} {wanted} "
                f"(config.json of {name}); use the drafter trained for this target."
            )
    if max(config.aux_layer_ids) > target.num_hidden_layers:
        raise ValueError(
            f"drafter aux layers {list(config.aux_layer_ids)} exceed the target's "
            f"{target.num_hidden_layers} layers (config.json of {name}); "
            "use the drafter trained for this target."
        )
    return config


def _draft(name: str, target: TargetConfig) -> DraftConfig:
    """The recipe's draft; sizes that it leaves open are the target's."""
    heads = target.num_attention_heads
    given: Mapping[str, Any] = DRAFTS.get(name) or _similar(target)
    return DraftConfig(
        **{
            "vocab_size": target.vocab_size,
            "draft_vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "head_dim": target.hidden_size // heads,
            "mask_token_id": target.vocab_size - 1,
            "rms_norm_eps": target.rms_norm_eps,
            "rope_theta": target.rope_theta,
            "max_position_embeddings": target.max_position_embeddings,
            **given,
        }
    )


def _similar(target: TargetConfig) -> Mapping[str, Any]:
    """A draft of the published form: up to five layers that read five of the target's, spread."""
    depth = target.num_hidden_layers
    count = min(5, depth)
    ids = sorted({round((i + 0.5) * depth / count) for i in range(count)})
    return {
        "aux_layer_ids": tuple(ids),
        "num_hidden_layers": count,
        "block_size": 8,
        "markov_rank": min(256, target.hidden_size),
    }
