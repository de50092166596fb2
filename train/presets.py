"""The published recipes as settings, and the draft they describe for a given target."""

import dataclasses
from pathlib import Path
from typing import TypeVar

from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.train.settings import (
    DraftOptions,
    KeepingOptions,
    LossOptions,
    OptimizerSettings,
    TrainSettings,
)

T = TypeVar("T")

ADAMW = OptimizerSettings(optimizer="adamw", learning_rate=6e-4)
GLM_5_2 = DraftOptions(
    aux_layer_ids=(8, 23, 39, 55, 70),
    num_layers=5,
    block_size=8,
    sample_from_anchor=False,
    markov_rank=256,
)
PRESETS = {
    # A narrow draft of one layer: more would cost the small target more than they bring. The
    # divergence makes the first steps count, where total variation has next to no gradient; later
    # steps want more of the latter, which is what sampled drafts are refused by.
    "tiny": TrainSettings(
        steps=1200,
        batch_rows=2,
        conversations=3072,
        draft=DraftOptions(num_layers=1, intermediate_size=384),
        loss=LossOptions(loss_preset="speculators+kl"),
        # Few steps want a short memory of gradients, and the Markov factors (AdamW's) a high rate.
        optimizer=OptimizerSettings(
            learning_rate=1.2e-2,
            muon_learning_rate=6e-3,
            muon_weight_decay=0.01,
            muon_momentum=0.8,
        ),
        keeping=KeepingOptions(save_every=300, serve_prompts=48),
    ),
    "qwen3-8b": TrainSettings(
        output=Path("runs/qwen3-8b"),
        sequence_length=4096,
        max_anchors=512,
        draft=DraftOptions(
            aux_layer_ids=(2, 10, 18, 26, 34),
            num_layers=5,
            block_size=7,
            markov_rank=256,
            intermediate_size=12288,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        ),
        loss=LossOptions(loss_preset="paper"),
        optimizer=dataclasses.replace(ADAMW, weight_decay=0.0),
        compute_dtype="bfloat16",
    ),
    "glm-5.2": TrainSettings(
        output=Path("runs/glm-5.2"),
        sequence_length=4096,
        max_anchors=1024,
        draft=GLM_5_2,
        optimizer=ADAMW,
        compute_dtype="bfloat16",
    ),
    "glm-5.2-3layer": TrainSettings(
        output=Path("runs/glm-5.2-3layer"),
        sequence_length=8192,
        max_anchors=1024,
        draft=dataclasses.replace(GLM_5_2, num_layers=3, aux_layer_ids=(2, 20, 39, 58, 75)),
        optimizer=dataclasses.replace(ADAMW, learning_rate=3e-4),
        compute_dtype="bfloat16",
    ),
}


def draft_config(options: DraftOptions, target: TargetConfig, mask_token_id: int) -> DraftConfig:
    """The draft's full configuration for this target.

    Raises ValueError on aux layers the target does not have or that are not increasing.
    """
    ids, last = options.aux_layer_ids, target.num_hidden_layers
    if not ids or any(not 0 <= i <= last for i in ids) or sorted(set(ids)) != list(ids):
        raise ValueError(
            f"aux_layer_ids {list(ids)} do not fit a target of {last} layers; "
            f"give increasing numbers from 0 (embeddings) to {last}."
        )
    heads = _given(options.num_attention_heads, target.num_attention_heads)
    return DraftConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=_given(options.draft_vocab_size, target.vocab_size),
        hidden_size=target.hidden_size,
        intermediate_size=_given(options.intermediate_size, target.intermediate_size),
        num_hidden_layers=options.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=_given(options.num_key_value_heads, max(1, heads // 2)),
        head_dim=_given(options.head_dim, target.hidden_size // max(1, heads)),
        aux_layer_ids=ids,
        mask_token_id=_given(options.mask_token_id, mask_token_id),
        block_size=options.block_size,
        sample_from_anchor=options.sample_from_anchor,
        layer_types=options.layer_types,
        sliding_window=options.sliding_window,
        sliding_window_non_causal=options.sliding_window_non_causal,
        markov_rank=options.markov_rank,
        markov_head_type=options.markov_head_type,
        enable_confidence_head=options.confidence_head,
        confidence_head_with_markov=options.confidence_head_with_markov and options.markov_rank > 0,
        rms_norm_eps=_given(options.rms_norm_eps, target.rms_norm_eps),
        rope_theta=_given(options.rope_theta, target.rope_theta),
        max_position_embeddings=target.max_position_embeddings,
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
