"""Every setting of a training run: flags of the command line, fields of config.json."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dspark_jax.config import (
    RECIPES,
    HostOptions,
    LayerType,
    LossConfig,
    MarkovHeadType,
    MeshConfig,
    TermName,
)


@dataclass(frozen=True)
class DraftOptions:
    """The draft; what is None comes from the target."""

    aux_layer_ids: tuple[int, ...] = (1, 2, 3)
    """Target layers the draft reads, vLLM's numbering: id j enters layer j, 0 is the embedding."""
    num_layers: int = 2
    block_size: int = 8
    sample_from_anchor: bool = True
    """True: as many drafts as slots. False ("1+N"): one fewer, slot 0 predicts nothing."""
    markov_rank: int = 64
    """Rank of the Markov head; 0 trains a plain DFlash draft."""
    markov_head_type: MarkovHeadType = "vanilla"
    confidence_head: bool = True
    confidence_head_with_markov: bool = True
    draft_vocab_size: int | None = None
    """The most frequent tokens of the data that the draft can propose; all when None."""
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    """Attention of every layer; full everywhere when empty."""
    sliding_window: int = 2048
    sliding_window_non_causal: bool = False
    mask_token_id: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None


@dataclass(frozen=True)
class LossOptions:
    """What the draft learns."""

    loss_preset: Literal["speculators", "speculators+kl", "paper"] = "speculators"
    """Labels, trained slots, denominators and weights as published: speculators teaches the
    target's own choice, paper (DeepSpec) the data's token and the L1 distance. speculators+kl adds
    the divergence from the target and weighs tv more, which short runs profit from."""
    loss_weights: dict[TermName, float] | None = None
    """Other weights, as in `--loss-weights ce 0.1 tv 0.9`; l1 is twice tv."""
    loss_confidence: float = 1.0
    """Weight of the confidence head's cross-entropy."""
    loss_decay: float = 4.0
    """The block's i-th prediction weighs exp(-i / loss_decay)."""
    position_weights: Literal["fixed", "dpace"] = "fixed"
    """dpace weighs a slot by what the draft, as it is, makes of the slots after it."""
    dpace_alpha: float = 0.5
    loss_chunk_blocks: int | None = None
    """Blocks of every row whose logits exist at a time; None takes as many as 40 MiB hold."""

    def config(self) -> LossConfig:
        """The same for the loss itself."""
        weights = RECIPES[self.loss_preset]
        if self.loss_weights is not None:
            weights = tuple((name, w) for name, w in self.loss_weights.items() if w)
        return LossConfig(
            rule="paper" if self.loss_preset == "paper" else "speculators",
            weights=weights,
            confidence=self.loss_confidence,
            decay=self.loss_decay,
            position_weights=self.position_weights,
            dpace_alpha=self.dpace_alpha,
            chunk_blocks=self.loss_chunk_blocks,
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """How the draft learns it."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: matrices by Muon, the rest by AdamW (speculators' split); adamw: all by AdamW."""
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = None
    """Muon's own rate; learning_rate when None."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.04
    weight_decay: float = 0.01
    muon_weight_decay: float = 0.1
    muon_momentum: float = 0.95
    muon_steps: int = 5
    """Newton-Schulz steps."""
    clip_norm: float = 1.0


@dataclass(frozen=True)
class KeepingOptions:
    """What is written while training and which checkpoint becomes the draft; not what is learnt."""

    save_every: int = 200
    """Steps between checkpoints, each validated."""
    keep: int = 2
    """Latest checkpoints kept, beside the best one."""
    validation_batches: int = 8
    """Held-out batches a checkpoint is judged by; the final report takes them all."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl."""
    serve_prompts: int = 24
    """Held-out prompts answered with and without the draft at the end."""


@dataclass(frozen=True)
class TrainSettings:
    """Train a DSpark draft for a target, then measure real speculative decoding with it."""

    output: Path = Path("runs/tiny")
    """Folder for checkpoints, metrics.jsonl, config.json and the report; a stopped run goes on."""
    target: str | None = None
    """Folder or hub id (org/name[@revision]) of a GLM-5 or Qwen3; else the embedded tiny-glm."""
    data: Path | None = None
    """Conversations: a JSONL file or a folder of them; regenerated by the target when not given."""
    hidden_states: Path | None = None
    """Folder of hs_{i}.safetensors made from --data; the target runs in process when not given."""
    bad_states: float = 0.02
    """Largest share of hidden-state files that may be broken; they are skipped and counted."""
    warm_start: Path | None = None
    """Draft checkpoint to start from; heads that it lacks are drawn afresh."""
    steps: int = 400
    sequence_length: int = 512
    batch_rows: int = 4
    """Packed rows of a step, over all devices."""
    accumulate: int = 1
    """Parts a step's rows are worked off in, one after another; the result is that of the whole."""
    max_anchors: int = 96
    """Training blocks per packed row, shared out over its documents."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; weights and optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""
    conversations: int = 1536
    """How many to regenerate when no data is given."""
    answer_tokens: int = 128
    """Longest answer, regenerated and served."""
    prompt_tokens: int = 128
    """Longest prompt, regenerated and served."""
    held_out_share: float = 0.1
    """Last part of --data kept for validation."""
    seed: int = 0
    draft: DraftOptions = DraftOptions()
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshConfig = MeshConfig()
    keeping: KeepingOptions = KeepingOptions()


@dataclass(frozen=True)
class Command:
    """Train a DSpark draft for a target, then measure real speculative decoding with it."""

    settings: Annotated[TrainSettings, tyro.conf.arg(name="")]
    preset: str = "tiny"
    """Where the defaults come from: tiny, qwen3-8b, glm-5.2 or glm-5.2-3layer."""
    config: Path | None = None
    """config.json of a run (or its folder) that the defaults come from instead."""
    resume: bool = True
    """Go on with the run that --output holds; --no-resume refuses to touch it."""
    fresh: bool = False
    """Start over in an --output that holds a run."""
    inspect_data: bool = False
    """Print a few training examples with the trained tokens marked, and stop."""
    hosts: HostOptions = HostOptions()
