"""What no program can avoid reading: each needed weight once, each sequence's cache once.

A routed expert is needed when a token chooses it. For n tokens with k of E experts each, chosen
independently, E (1 - (1 - k/E)^n) distinct ones are expected: an upper bound for real text, whose
neighbouring tokens agree. Of the embedding only the tokens' rows are read, unless it is the head
too: logits read a tied table whole.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from dspark_jax.checkpoints.quantisation import STORED_FP8
from dspark_jax.config import DraftConfig, GlmConfig, TargetConfig

WIDTH = 2
"""Bytes of a bfloat16 number."""


class Needs(NamedTuple):
    """Bytes of a model: `fixed` in every step, then per expert, embedding row and context token."""

    fixed: int
    expert: int
    expert_layers: int
    experts: int
    chosen: int
    embedding_row: int
    cache_per_token: int
    tied: bool = False
    """Whether the embedding is the head too."""

    @property
    def all_experts(self) -> int:
        return self.expert * self.expert_layers * self.experts


class Held(NamedTuple):
    """A weight as one device holds it: its place in the tree of weights, and bytes."""

    path: str
    bytes: int


def distinct_experts(experts: int, chosen: int, tokens: int) -> float:
    """How many experts `tokens` tokens are expected to choose between them."""
    return experts * (1 - (1 - chosen / experts) ** tokens) if experts else 0.0


def target_needs(
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    config: TargetConfig,
    block: tuple[int, int] | None,
) -> Needs:
    """Of a target whose checkpoint holds these tensors (name, shape)."""
    fixed, routed, experts = 0, 0, config.n_routed_experts
    for name, shape in tensors:
        size = stored_bytes(name, shape, block)
        if ".mlp.experts." in name:
            routed += size
        elif not name.endswith("embed_tokens.weight"):
            fixed += size
    layers = sum(1 for kind in config.layer_kinds if "sparse" in (kind, kind[-1]))
    tied = getattr(config, "tie_word_embeddings", False)
    if tied:
        fixed += config.vocab_size * config.hidden_size * WIDTH
    return Needs(
        fixed=fixed,
        expert=routed // (layers * experts) if routed else 0,
        expert_layers=layers if routed else 0,
        experts=experts,
        chosen=config.num_experts_per_tok,
        embedding_row=config.hidden_size * WIDTH,
        cache_per_token=cache_per_token(config),
        tied=tied,
    )


def draft_needs(tensors: Iterable[tuple[str, tuple[int, ...]]], config: DraftConfig) -> Needs:
    """Of a draft beside its target, whose head it reads again; the Markov head looks rows up."""
    looked_up = "markov_head.markov_w1.weight"
    fixed = sum(math.prod(shape) * WIDTH for name, shape in tensors if name != looked_up)
    fixed += config.draft_vocab_size * config.hidden_size * WIDTH
    row = config.hidden_size + config.markov_rank
    size = 2 * config.num_key_value_heads * config.head_dim * WIDTH
    return Needs(fixed, 0, 0, 0, 0, row * WIDTH, size * config.num_hidden_layers)


def cache_per_token(config: TargetConfig) -> int:
    """Bytes that all layers remember of a token, in bfloat16."""
    if isinstance(config, GlmConfig):
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        indexers = config.indexer_types.count("full")
        return WIDTH * (config.num_hidden_layers * latent + indexers * config.index_head_dim)
    row = 2 * config.num_key_value_heads * config.head_dim
    return WIDTH * config.num_hidden_layers * row


def stored_bytes(name: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> int:
    """A checkpoint tensor in its stored form: bfloat16, or FP8 with float32 scales per block."""
    if name.endswith("e_score_correction_bias"):
        return math.prod(shape) * 4
    if block is None or len(shape) != 2 or not STORED_FP8.search(name):
        return math.prod(shape) * WIDTH
    scales = math.prod(-(-size // side) for size, side in zip(shape, block, strict=True))
    return math.prod(shape) + 4 * scales


def step_bytes(needs: Needs, tokens: int, sequences: int, context: int) -> float:
    """Bytes of a step of `tokens` tokens over all `sequences`, on all devices together.

    Every row of the context counts, though sparse attention could do with `index_topk` of them.
    """
    experts = distinct_experts(needs.experts, needs.chosen, tokens)
    return (
        needs.fixed
        + experts * needs.expert * needs.expert_layers
        + tokens * needs.embedding_row
        + sequences * context * needs.cache_per_token
    )


def held_bytes(weights: Iterable[Held], needs: Needs, tokens: int) -> list[float]:
    """Bytes of every weight in a step on one device that reads once what it holds and needs.

    `tokens` are those of all devices: any of them may choose an expert held here. Copies on
    several devices count on each. Of tables of embeddings one counts: a tied one whole, others for
    the tokens' rows.
    """
    experts = distinct_experts(needs.experts, needs.chosen, tokens)
    share = experts / needs.experts if needs.experts else 1.0
    found, rows = [], float(tokens * needs.embedding_row)
    for weight in weights:
        if "embed" in weight.path or "markov_w1" in weight.path:
            found.append(float(weight.bytes) if needs.tied and rows else rows)
            rows = 0.0
        else:
            routed = "experts" in weight.path and "shared_experts" not in weight.path
            found.append(weight.bytes * (share if routed else 1.0))
    return found
