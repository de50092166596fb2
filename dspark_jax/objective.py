"""The training objective of a batch: sampled blocks, draft and target scored, loss and metrics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dspark_jax.anchors import teacher_rows
from dspark_jax.chunked import Given, SlotValues, Trained, Unembed, slot_losses
from dspark_jax.config import DraftConfig, LossConfig
from dspark_jax.drafter import Drafter, score_blocks
from dspark_jax.losses import confidence_mean, denominator, position_decay
from dspark_jax.metrics import Metrics, block_metrics, single_metric
from dspark_jax.types import Batch, Blocks, BlockScores, Frozen, Target, TargetStates


class Teacher(NamedTuple):
    """The target as the loss reads it: parameters, and the ids a reduced vocabulary keeps."""

    params: Any
    target_id: Any


class Part(NamedTuple):
    """Of a batch that is worked off in parts: the denominator of the whole, how many parts."""

    total: Float[Array, ""]
    parts: int


class Outcome(NamedTuple):
    """What a batch gave, beside the loss."""

    metrics: Metrics
    slots: SlotValues
    scores: BlockScores


def teacher_unembed(target: Target, config: DraftConfig) -> Unembed:
    """`unembed(teacher, hidden)`: the target's logits over the draft vocabulary.

    A reduced vocabulary keeps its rows of the target's head; p is renormalised over them.
    """

    def unembed(teacher: Teacher, hidden: Float[Array, "*slots D"]) -> Float[Array, "*slots Vd"]:
        logits = target.unembed(teacher.params, hidden)
        reduced = config.draft_vocab_size < config.vocab_size
        return logits[..., teacher.target_id] if reduced else logits

    return unembed


def batch_loss(
    unembed: Unembed,
    config: DraftConfig,
    loss: LossConfig,
    drafter: Drafter,
    frozen: Frozen,
    teacher: Any,
    batch: Batch,
    states: TargetStates,
    blocks: Blocks,
    part: Part | None = None,
    remat: bool = False,
    shards: int = 1,
) -> tuple[Float[Array, ""], Outcome]:
    """Score the blocks and compare them with the target; see `dspark_loss`."""
    scores = score_blocks(drafter, frozen, batch, states.aux_hidden, blocks, remat)
    head = drafter.markov_head
    factor = None if head is None else head.markov_w2.kernel[...]
    tables = (frozen.lm_head, teacher, states.final_hidden)
    return dspark_loss(unembed, config, loss, scores, factor, tables, blocks, part, shards)


def dspark_loss(
    unembed: Unembed,
    config: DraftConfig,
    loss: LossConfig,
    scores: BlockScores,
    markov_w2: Float[Array, "r Vd"] | None,
    tables: tuple[Float[Array, "D Vd"], Any, Float[Array, "B T Dt"]],
    blocks: Blocks,
    part: Part | None = None,
    shards: int = 1,
) -> tuple[Float[Array, ""], Outcome]:
    """`Σ weight · term + confidence · BCE(confidence, 1 - TV)`, and its metrics.

    Args:
        tables: The draft's head, what `unembed` reads of the target, and the target's last states
            before its norm.
        part: Of which batch these rows are a part; None when they are all of it.
        shards: How many devices the rows are spread over.
    """
    lm_head, teacher, final_hidden = tables
    total, parts = part or Part(denominator(blocks.label_mask, config, loss), 1)
    ramp = jnp.ones(config.block_size)
    if loss.position_weights == "fixed":
        ramp = position_decay(config, loss.decay)
    given = Given(
        lm_head,
        teacher,
        final_hidden,
        teacher_rows(blocks.anchor, config, final_hidden.shape[1]),
        blocks.labels,
        blocks.label_mask,
        jnp.where(blocks.label_mask, ramp, 0.0) / (total + loss.eps),
    )
    trained = Trained(scores.hidden, scores.markov, markov_w2)
    value, slots = slot_losses(unembed, loss, trained, jax.lax.stop_gradient(given), shards)
    metrics = block_metrics(
        scores.confidence, slots.accept_rate, slots.correct, blocks.label_mask, config
    )
    if scores.confidence is not None:
        error = confidence_mean(
            scores.confidence, slots.accept_rate, blocks.label_mask, total, config, loss
        )
        value += loss.confidence * error
        metrics |= single_metric("confidence_loss", error, parts)
    if len(loss.weights) > 1:
        for name, term in slots.terms.items():
            mean = jnp.sum(jnp.where(blocks.label_mask, slots.weight * term, 0.0))
            metrics |= single_metric(f"{name}_loss", mean, parts)
    metrics |= single_metric("loss", value, parts)
    return value, jax.lax.stop_gradient(Outcome(metrics, slots, scores))
