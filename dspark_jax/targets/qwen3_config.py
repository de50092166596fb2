"""Qwen3 config.json <-> this package's configuration."""

from collections.abc import Mapping
from typing import Any

from dspark_jax.config import Qwen3Config
from dspark_jax.targets.described import check_constants, required, rope_theta

CONSTANTS = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
"""What a Qwen3 config.json says and the model here does not vary."""
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
MOE = (*MOE_KEYS, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
"""Keys of `qwen3_moe` alone; the first three must be there."""


def config_from_json(config: Mapping[str, Any], **overrides: Any) -> Qwen3Config:
    """Read a `qwen3` or `qwen3_moe` config.json.

    Raises ValueError on what the model here does not vary.
    """
    check_constants(config, CONSTANTS)
    # Published files say num_experts, those that transformers 5 writes num_local_experts.
    config = {"num_experts": config.get("num_local_experts"), **config}
    dense = config["model_type"] == "qwen3"
    absent = [] if dense else [key for key in MOE_KEYS if not config.get(key)]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; use the model's own file.")
    values = required(config, Qwen3Config, derived=("rope_theta", *(MOE if dense else ())))
    values["rope_theta"] = rope_theta(config)
    return Qwen3Config(**(values | overrides))


def config_to_json(config: Qwen3Config, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """The config.json that transformers reads; the inverse of `config_from_json`."""
    derived = ("rope_theta", "aux_layer_ids", "unroll_layers", *(() if config.num_experts else MOE))
    plain = {k: getattr(config, k) for k in config.__dataclass_fields__ if k not in derived}
    lists = {k: list(v) for k, v in plain.items() if isinstance(v, tuple)}
    return (
        plain
        | lists
        | {
            "architectures": [architecture(config)],
            "model_type": "qwen3_moe" if config.num_experts else "qwen3",
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            **CONSTANTS,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": "bfloat16",
        }
    )


def architecture(config: Qwen3Config) -> str:
    """The `architectures` entry of config.json."""
    return "Qwen3MoeForCausalLM" if config.num_experts else "Qwen3ForCausalLM"
