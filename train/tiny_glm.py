"""The embedded target `tiny-glm`: its sizes, its tokenizer and its files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors.flax import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.targets.families import write_config
from dspark_jax.targets.weights import tensors_from_params

END, USER, ASSISTANT, SYSTEM, MASK = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|MASK|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message.role }}|>{{ message.content }}"
    "{%- if message.role == 'assistant' -%}<|endoftext|>{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

TINY_GLM = GlmConfig(
    vocab_size=512,
    hidden_size=384,
    intermediate_size=1152,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    q_lora_rank=128,
    kv_lora_rank=96,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    index_topk=64,
    index_head_dim=32,
    index_n_heads=2,
    first_k_dense_replace=1,
    indexer_types=("full", "shared", "full", "shared"),
    routed_scaling_factor=1.0,
    rope_theta=10000.0,
)
"""Few wide layers and a small vocabulary: a step is bound by reading weights, as in a large model,
and two cores can train it."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with the chat's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, USER, ASSISTANT, SYSTEM, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_target(folder: Path, config: TargetConfig, params: Any, tokenizer: Tokenizer) -> None:
    """Write config.json, model.safetensors (bfloat16), tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    (folder / "config.json").write_text(json.dumps(write_config(config, end, end), indent=2) + "\n")
    tensors = {
        name: jnp.asarray(value, jnp.float32 if "e_score" in name else jnp.bfloat16)
        for name, value in tensors_from_params(config, params).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "pad_token": END,
                "mask_token": MASK,
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.max_position_embeddings,
            },
            indent=2,
        )
        + "\n"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end, "pad_token_id": end, "do_sample": True}, indent=2) + "\n"
    )
