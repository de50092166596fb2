"""GLM-5.x config.json <-> this package's configuration."""

from collections.abc import Mapping
from typing import Any

from dspark_jax.config import GlmConfig
from dspark_jax.targets.described import check_constants, refuse, required, rope_theta, whole

ARCHITECTURE = "GlmMoeDsaForCausalLM"
CONSTANTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "indexer_rope_interleave": True,
    "n_group": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
"""What a GLM-5.x config.json says and the model here does not vary."""


def config_from_json(config: Mapping[str, Any], **overrides: Any) -> GlmConfig:
    """Read a `glm_moe_dsa` config.json.

    `indexer_types` wins over `index_topk_pattern` ("FSSF…"), which wins over frequency and offset.
    Raises ValueError on what the model here does not vary.
    """
    check_constants(config, CONSTANTS)
    values = required(config, GlmConfig, derived=("indexer_types", "rope_theta"))
    values |= {"rope_theta": rope_theta(config), "indexer_types": _indexer_types(config)}
    return GlmConfig(**(values | overrides))


def _indexer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers = config["num_hidden_layers"]
    if types := config.get("indexer_types"):
        return _of_layers("indexer_types", types, list, {"full": "full", "shared": "shared"})
    if pattern := config.get("index_topk_pattern"):
        letters = {"F": "full", "S": "shared"}
        return _of_layers("index_topk_pattern", pattern, str | list, letters)
    every, offset = (
        1 if config.get(key) is None else whole(key, config[key], least)
        for key, least in (("index_topk_freq", 1), ("index_skip_topk_offset", 0))
    )
    return tuple("full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(layers))


def _of_layers(key: str, given: Any, kind: Any, words: Mapping[str, str]) -> tuple[str, ...]:
    """What each word means; ValueError when there are others."""
    if not isinstance(given, kind) or any(word not in tuple(words) for word in given):
        refuse(key, given, f"only {' and '.join(words)} are")
    return tuple(words[word] for word in given)


def config_to_json(config: GlmConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """The config.json that transformers reads; the inverse of `config_from_json`."""
    ours = ("indexer_types", "rope_theta", "latent_norm_eps", "aux_layer_ids", "unroll_layers")
    plain = {k: getattr(config, k) for k in config.__dataclass_fields__ if k not in ours}
    return plain | {
        "architectures": [ARCHITECTURE],
        "model_type": "glm_moe_dsa",
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,
        "indexer_types": list(config.indexer_types),
        "mlp_layer_types": [mlp for _, mlp in config.layer_kinds],
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        **CONSTANTS,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "bfloat16",
    }
