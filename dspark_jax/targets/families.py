"""The families of targets: which config.json belongs to which model."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.targets import extend, glm_config, qwen3_config
from dspark_jax.targets.decoder import is_compact, prepare
from dspark_jax.targets.glm import Glm
from dspark_jax.targets.mesh import check_mesh, spread_decoding, spread_forward
from dspark_jax.targets.qwen3 import Qwen3
from dspark_jax.targets.weights import build, shape_of
from dspark_jax.types import Frozen, Target

READERS: Mapping[str, Callable[..., TargetConfig]] = MappingProxyType(
    {
        "glm_moe_dsa": glm_config.config_from_json,
        "qwen3": qwen3_config.config_from_json,
        "qwen3_moe": qwen3_config.config_from_json,
    }
)
"""What reads the config.json of a `model_type`."""


def read_config(described: Mapping[str, Any], **overrides: Any) -> TargetConfig:
    """The configuration that a config.json describes; ValueError on another architecture."""
    kind = str(described.get("model_type"))
    if kind not in READERS:
        raise ValueError(
            f"architecture {kind!r} is not supported; supported are {', '.join(READERS)}."
        )
    return READERS[kind](described, **overrides)


def write_config(config: TargetConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """The config.json of a target; the inverse of `read_config`."""
    if isinstance(config, GlmConfig):
        return glm_config.config_to_json(config, eos_token_id, pad_token_id)
    return qwen3_config.config_to_json(config, eos_token_id, pad_token_id)


def architecture(config: TargetConfig) -> str:
    """The `architectures` entry of a target's config.json."""
    glm = isinstance(config, GlmConfig)
    return glm_config.ARCHITECTURE if glm else qwen3_config.architecture(config)


def make_target(config: TargetConfig, mesh: Mesh | None = None) -> Target:
    """The functions of a target; parameters come from `init_params` or a checkpoint.

    With a mesh of data x tensor devices they run on all of them, each on its part of parameters,
    caches and rows as `sharding.py` lays them out. Raises ValueError when the target cannot be
    shared so.
    """
    mesh = None if mesh is None or mesh.size == 1 else mesh
    if mesh is not None:
        check_mesh(config, mesh)
    graphdef, _ = nnx.split(shape_of(config))

    def model(params: Any) -> Any:
        return nnx.merge(graphdef, params, copy=True)

    decoding = spread_decoding(config, model, mesh)
    if isinstance(config, GlmConfig) and is_compact(config, mesh):
        decoding = _compact_decoding(config, model)
    return Target(
        config=config,
        unembed=lambda params, hidden: model(params).unembed(hidden),
        frozen=lambda params, target_id=None: frozen_tables(model(params), target_id),
        **spread_forward(config, model, mesh),
        **decoding,
    )


def init_params(config: TargetConfig, seed: int) -> Any:
    """Freshly drawn parameters."""
    return nnx.state(build(config, nnx.Rngs(seed)), nnx.Param)


def frozen_tables(model: Glm | Qwen3, target_id: Any = None) -> Frozen:
    """The embedding and head a draft shares, the head cut to the draft vocabulary if given."""
    if target_id is None:
        return Frozen(model.embed_tokens[...], model.head, jnp.arange(model.config.vocab_size))
    return Frozen(model.embed_tokens[...], model.head[:, target_id], target_id)


def _compact_decoding(
    config: GlmConfig, model: Callable[[Any], Glm]
) -> dict[str, Callable[..., Any]]:
    """A small GLM's weights are laid out anew for decoding."""
    return {
        "prepare": lambda params: prepare(model(params)),
        "init_cache": partial(extend.init_cache, config),
        "extend": partial(extend.extend, config),
        "logits": partial(extend.logits, config),
    }
