"""Models known by name, as their config.json describes them, and the drafts of their recipes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
GLM_5 = {
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "max_position_embeddings": 202752,
    "quantization_config": FP8,
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}


def _qwen3(layers: int, size: int, inner: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }
    return QWEN3 | sizes | more


TARGETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "glm-5.2": GLM_5
        | {
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "rope_parameters": {"rope_theta": 8e6, "rope_type": "default"},
            "max_position_embeddings": 1048576,
        },
        "glm-5": GLM_5,
        "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tie_word_embeddings=True),
        "qwen3-8b": _qwen3(36, 4096, 12288, 32),
        "qwen3-32b": _qwen3(64, 5120, 25600, 64),
        "qwen3-30b-a3b": _qwen3(
            *(48, 2048, 6144, 32),
            model_type="qwen3_moe",
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    }
)
"""The GLMs as their FP8 checkpoints, Qwen3 in bfloat16."""

GLM_DRAFT = {
    "aux_layer_ids": (8, 23, 39, 55, 70),
    "num_hidden_layers": 5,
    "block_size": 8,
    "sample_from_anchor": False,
    "markov_rank": 256,
}
DRAFTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "glm-5.2": GLM_DRAFT,
        "glm-5": GLM_DRAFT,
        "qwen3-8b": {
            "aux_layer_ids": (2, 10, 18, 26, 34),
            "num_hidden_layers": 5,
            "block_size": 7,
            "markov_rank": 256,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    }
)
"""As the presets of `dspark_jax.train` train them; the rest of a draft follows its target."""
