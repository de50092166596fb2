"""Every setting of a model, as frozen dataclasses: hashable and static under jit."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MarkovHeadType = Literal["vanilla", "gated", "rnn"]
LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class GlmConfig:
    """A GLM-5.x (`glm_moe_dsa`) target; the names are those of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_topk: int
    index_head_dim: int
    index_n_heads: int
    first_k_dense_replace: int
    indexer_types: tuple[Literal["full", "shared"], ...]
    """Which layers own an indexer; a shared layer reuses the last full layer's choice."""
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-5
    """Epsilon of q_a_ and kv_a_layernorm: 1e-5 as vLLM and SGLang, 1e-6 as transformers."""
    rope_theta: float = 8e6
    max_position_embeddings: int = 4096
    aux_layer_ids: tuple[int, ...] = ()
    """Captured residual streams: id j enters layer j, 0 is the embedding, L leaves the last."""
    unroll_layers: int = 8
    """Up to this depth layers run one by one; deeper models are stacked and scanned."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """(indexer kind, mlp kind) of every layer."""
        dense = self.first_k_dense_replace
        return tuple(
            (kind, "dense" if i < dense else "sparse") for i, kind in enumerate(self.indexer_types)
        )


@dataclass(frozen=True)
class Qwen3Config:
    """A Qwen3 target (`qwen3`, `qwen3_moe`); the names are those of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    num_experts: int = 0
    """Routed experts of a sparse layer; 0 for a dense model."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    """Whether the weights of the chosen experts are scaled to a sum of 1."""
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    aux_layer_ids: tuple[int, ...] = ()
    unroll_layers: int = 8

    @property
    def n_routed_experts(self) -> int:
        return self.num_experts

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """MLP kind of every layer: "dense" or "sparse"."""
        return tuple(
            "sparse"
            if self.num_experts
            and i not in self.mlp_only_layers
            and (i + 1) % self.decoder_sparse_step == 0
            else "dense"
            for i in range(self.num_hidden_layers)
        )


TargetConfig = GlmConfig | Qwen3Config


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share the work (`sharding.py`)."""

    data_parallel: int | None = None
    """Groups of devices with the draft once each; None: as many as can share the rows evenly."""
    fully_sharded: int = 1
    """Devices of a group, over which weights and optimizer state are spread."""
    tensor_parallel: int = 1
    """Devices that share each layer of the target; its experts are shared by all devices."""

    def __post_init__(self) -> None:
        for name in ("data_parallel", "fully_sharded", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use at least 1.")


TermName = Literal["ce", "tv", "l1", "kl_div", "rkl", "jsd", "nla", "lk_hybrid"]

RECIPES: Mapping[str, tuple[tuple[TermName, float], ...]] = MappingProxyType(
    {
        "speculators": (("ce", 0.1), ("tv", 0.9)),
        "speculators+kl": (("ce", 0.1), ("tv", 2.0), ("kl_div", 1.0)),
        "paper": (("ce", 0.1), ("l1", 0.9)),
    }
)
"""Weights by preset, the first and the last as published; the L1 distance is twice tv."""


@dataclass(frozen=True)
class LossConfig:
    """What is learnt from which slot (reference: dspark.md §2.2-2.3).

    `rule` speculators: cross-entropy against the target's choice, every slot whose own token is
    trained, sums over the number of such slots. `rule` paper (DeepSpec): cross-entropy against the
    data's token, slots up to the first one beyond the answer, sums over the slots' weights.
    """

    rule: Literal["speculators", "paper"] = "speculators"
    weights: tuple[tuple[TermName, float], ...] = RECIPES["speculators"]
    confidence: float = 1.0
    decay: float = 4.0
    """The block's i-th prediction weighs exp(-i / decay)."""
    position_weights: Literal["fixed", "dpace"] = "fixed"
    dpace_alpha: float = 0.5
    chunk_blocks: int | None = None
    """Blocks of every row whose logits exist at a time; None takes as many as 40 MiB hold."""

    @property
    def eps(self) -> float:
        """Guards the denominator."""
        return 1e-6 if self.rule == "paper" else 1e-5


@dataclass(frozen=True)
class DraftConfig:
    """A DSpark draft (paper §3; the names are those of the speculators format)."""

    vocab_size: int
    """Target vocabulary V: embeddings and the Markov head's previous token."""
    draft_vocab_size: int
    """Vd: what the draft can propose; V when the vocabulary is not reduced."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    aux_layer_ids: tuple[int, ...]
    """Target layers the draft reads, in vLLM's numbering (id j enters layer j; 0 = embeddings)."""
    mask_token_id: int
    block_size: int = 8
    sample_from_anchor: bool = True
    """True: slot k predicts the token after it, G = K. False ("1+N"): its own token."""
    layer_types: tuple[LayerType, ...] = ()
    """Attention of every layer; empty means full attention everywhere."""
    sliding_window: int = 2048
    sliding_window_non_causal: bool = False
    markov_rank: int = 256
    """Rank of the Markov head; 0 is plain DFlash."""
    markov_head_type: MarkovHeadType = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    target_hidden_size: int | None = None
    """Width of one aux state when it differs from hidden_size."""
    max_position_embeddings: int = 4096
    unroll_layers: int = 8
    """Up to this depth layers run one by one; deeper drafts are stacked and scanned."""

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a draft needs at least 1.")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_attention_heads} attention heads of {self.head_dim} cannot share "
                f"{self.num_key_value_heads} key-value heads: heads must divide evenly and "
                "head_dim be even."
            )
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers but num_hidden_layers is "
                f"{self.num_hidden_layers}; give one attention type per layer."
            )
        if self.draft_length < 1:
            raise ValueError(
                f"block_size {self.block_size} with sample_from_anchor {self.sample_from_anchor} "
                f"drafts {self.draft_length} tokens; use a larger block_size."
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size {self.draft_vocab_size} must be from 1 to vocab_size "
                f"{self.vocab_size}: the draft vocabulary is a subset of the target's."
            )
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank is {self.markov_rank}; use 0 for no head, or a rank.")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id {self.mask_token_id} is outside vocab_size {self.vocab_size}; "
                "it must be a row of the target's embedding."
            )
        if self.needs_markov_features and self.markov_rank == 0:
            raise ValueError(
                "confidence_head_with_markov needs a Markov head but markov_rank is 0; "
                "set confidence_head_with_markov to false or give a rank."
            )

    @property
    def draft_length(self) -> int:
        """G, the tokens drafted per round."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def needs_markov_features(self) -> bool:
        return self.enable_confidence_head and self.confidence_head_with_markov

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Context window per layer, None where attention is full."""
        return tuple(
            self.sliding_window if t == "sliding_attention" else None for t in self.layer_types
        )

    @property
    def causal(self) -> tuple[bool, ...]:
        """Whether a slot sees only earlier slots, per layer (sliding layers by default)."""
        return tuple(
            t == "sliding_attention" and not self.sliding_window_non_causal
            for t in self.layer_types
        )


@dataclass(frozen=True)
class HostOptions:
    """Processes on several hosts that train or serve together; jax finds those of SLURM, Open MPI
    and TPU pods by itself."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which the others reach; the port is free there."""
    processes: int | None = None
    """How many there are, each started with the same other flags."""
    process_id: int | None = None
    """Which of them this is, from 0; process 0 speaks, writes and answers."""
    join_seconds: float = 300.0
    """How long the first waits for the last."""
