"""The draft's training loss: per-slot divergences from the target, and the confidence's error.

Every term is a function of a slot's draft logits (Markov bias included) and teacher logits, both
over the draft vocabulary; q and p below are their softmaxes, in float32. Paper §3.3.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dspark_jax.config import DraftConfig
from dspark_jax.metrics import block_metrics, single_metric
from dspark_jax.types import Blocks, BlockScores

Term = Callable[[Float[Array, "*slots Vd"], Float[Array, "*slots Vd"]], Float[Array, "*slots"]]

DSPARK_WEIGHTS = MappingProxyType({"ce": 0.1, "tv": 0.9})
"""speculators' recipe. Its `tv` is half the paper's L1 distance."""

TERM_EPS = 1e-5
CONFIDENCE_EPS = 1e-8


def cross_entropy(
    logits: Float[Array, "*slots Vd"], teacher: Float[Array, "*slots Vd"]
) -> Float[Array, "*slots"]:
    """`-log q[argmax p]`: the label is the teacher's choice, not the data's token."""
    label = jnp.argmax(teacher, axis=-1, keepdims=True)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_q, label, axis=-1)[..., 0]


def total_variation(
    logits: Float[Array, "*slots Vd"], teacher: Float[Array, "*slots Vd"]
) -> Float[Array, "*slots"]:
    """`1 - Σ min(q, p)`: the probability that rejection sampling refuses the draft."""
    q = jax.nn.softmax(logits.astype(jnp.float32))
    p = jax.nn.softmax(teacher.astype(jnp.float32))
    return 1.0 - jnp.minimum(q, p).sum(axis=-1)


def kl_divergence(
    logits: Float[Array, "*slots Vd"], teacher: Float[Array, "*slots Vd"]
) -> Float[Array, "*slots"]:
    """`KL(p || q)`."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def binary_cross_entropy(
    logit: Float[Array, "*slots"], probability: Float[Array, "*slots"]
) -> Float[Array, "*slots"]:
    """Cross-entropy between a probability and the sigmoid of a logit."""
    return jax.nn.softplus(logit) - probability * logit


TERMS: Mapping[str, Term] = MappingProxyType(
    {"ce": cross_entropy, "tv": total_variation, "kl_div": kl_divergence}
)


def position_decay(config: DraftConfig, decay: float) -> Float[Array, "K"]:
    """`exp(-i / decay)` for the block's i-th prediction; 0 for a slot that predicts nothing."""
    prediction = jnp.arange(config.block_size) - (not config.sample_from_anchor)
    return jnp.where(prediction >= 0, jnp.exp(-prediction / decay), 0.0)


def masked_mean(
    value: Float[Array, "B N K"],
    weight: Float[Array, "K"],
    mask: Bool[Array, "B N K"],
    eps: float,
) -> Float[Array, ""]:
    """`Σ mask · weight · value / (Σ mask + eps)`: the weights are not in the denominator.

    Sums run over all rows, so how a batch is split or sharded changes nothing; for one row this
    is speculators' mean.
    """
    return jnp.sum(jnp.where(mask, weight * value, 0.0)) / (jnp.sum(mask) + eps)


def dspark_loss(
    scores: BlockScores,
    teacher_logits: Float[Array, "B N K Vd"],
    blocks: Blocks,
    config: DraftConfig,
    weights: Mapping[str, float] = DSPARK_WEIGHTS,
    confidence_weight: float = 1.0,
    decay: float = 4.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`Σ weight · term + confidence_weight · BCE(confidence, 1 - TV)`, and its metrics.

    The teacher's logits are its final norm and head on the rows the slots predict from, restricted
    to the draft vocabulary, where p is thereby renormalised. The confidence's target is the
    acceptance rate of the corrected logits, held constant.
    """
    teacher = jax.lax.stop_gradient(teacher_logits)
    ramp = position_decay(config, decay)
    slot_values = {name: TERMS[name](scores.logits, teacher) for name in weights}
    means = {
        name: masked_mean(value, ramp, blocks.label_mask, TERM_EPS)
        for name, value in slot_values.items()
    }
    loss = sum((weights[name] * mean for name, mean in means.items()), start=jnp.zeros(()))
    tv = slot_values["tv"] if "tv" in weights else total_variation(scores.logits, teacher)
    accept_rate = jax.lax.stop_gradient(1.0 - tv)
    metrics = block_metrics(
        jax.lax.stop_gradient(scores), teacher, accept_rate, blocks.label_mask, config
    )
    if scores.confidence is not None:
        error = binary_cross_entropy(scores.confidence, accept_rate)
        error = masked_mean(error, ramp, blocks.label_mask, CONFIDENCE_EPS)
        loss += confidence_weight * error
        metrics |= single_metric("confidence_loss", error)
    if len(means) > 1:
        for name, mean in means.items():
            metrics |= single_metric(f"{name}_loss", mean)
    return loss, jax.lax.stop_gradient(metrics | single_metric("loss", loss))
