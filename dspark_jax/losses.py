"""The draft's training loss, slot by slot: divergences from the target, weights, the confidence.

q is the draft's distribution (Markov bias included), p the target's, both over the draft
vocabulary and in float32. `chunked.py` evaluates the terms without ever holding all logits.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import DraftConfig, LossConfig

CONFIDENCE_EPS = 1e-8
SMALLEST_RATE = 1e-5
HYBRID_RATE = 3.0
"""`lk_hybrid` leaves KL for TV as `exp(-3 · acceptance rate)`."""

Slots = Float[Array, "*slots"]
Logs = Float[Array, "*slots Vd"]
Term = Callable[[Logs, Logs, Int[Array, "*slots"]], Slots]


def overlap(log_q: Logs, log_p: Logs) -> Slots:
    """`Σ min(q, p)`: the chance that rejection sampling keeps the draft."""
    return jnp.minimum(jnp.exp(log_q), jnp.exp(log_p)).sum(axis=-1)


def cross_entropy(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`-log q[label]`."""
    return -jnp.take_along_axis(log_q, label[..., None], axis=-1)[..., 0]


def total_variation(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`1 - Σ min(q, p)`."""
    return 1.0 - overlap(log_q, log_p)


def l1_distance(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`Σ |q - p|`, twice the total variation: the paper's term."""
    return jnp.abs(jnp.exp(log_q) - jnp.exp(log_p)).sum(axis=-1)


def kl_divergence(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`KL(p || q)`."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def reverse_kl_divergence(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`KL(q || p)`."""
    return (jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1)


def jensen_shannon(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`."""
    log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
    return 0.5 * (kl_divergence(log_m, log_p, label) + reverse_kl_divergence(log_q, log_m, label))


def negative_log_acceptance(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`-log max(Σ min(q, p), 1e-5)`."""
    return -jnp.log(jnp.maximum(overlap(log_q, log_p), SMALLEST_RATE))


def lk_hybrid(log_q: Logs, log_p: Logs, label: Int[Array, "*slots"]) -> Slots:
    """`λ KL(p || q) + (1 - λ) TV`, `λ = exp(-3 Σ min(q, p))` held constant."""
    rate = overlap(log_q, log_p)
    share = jnp.exp(-HYBRID_RATE * jax.lax.stop_gradient(rate))
    return share * kl_divergence(log_q, log_p, label) + (1.0 - share) * (1.0 - rate)


TERMS: Mapping[str, Term] = MappingProxyType(
    {
        "ce": cross_entropy,
        "tv": total_variation,
        "l1": l1_distance,
        "kl_div": kl_divergence,
        "rkl": reverse_kl_divergence,
        "jsd": jensen_shannon,
        "nla": negative_log_acceptance,
        "lk_hybrid": lk_hybrid,
    }
)


def binary_cross_entropy(logit: Slots, probability: Slots) -> Slots:
    """Cross-entropy between a probability and the sigmoid of a logit."""
    return jax.nn.softplus(logit) - probability * logit


def position_decay(config: DraftConfig, decay: float) -> Float[Array, "K"]:
    """`exp(-i / decay)` for the block's i-th prediction; 0 for a slot that predicts nothing."""
    prediction = jnp.arange(config.block_size) - (not config.sample_from_anchor)
    return jnp.where(prediction >= 0, jnp.exp(-prediction / decay), 0.0)


def dpace_weight(
    cross_entropy: Float[Array, "*blocks K"], mask: Bool[Array, "*blocks K"], alpha: float
) -> Float[Array, "*blocks K"]:
    """D-PACE: what every slot is worth to the slots after it, as the draft is now.

    The running product of `(1 - alpha) exp(-CE) + alpha` (1 on slots that are not trained), summed
    over the trained slots from each on; held constant.
    """
    likelihood = jnp.exp(-jax.lax.stop_gradient(cross_entropy))
    smooth = jnp.where(mask, (1.0 - alpha) * likelihood + alpha, 1.0)
    reached = jnp.cumprod(smooth, axis=-1) * mask
    return jnp.flip(jnp.cumsum(jnp.flip(reached, -1), axis=-1), -1) * mask


def denominator(
    mask: Bool[Array, "*slots K"], config: DraftConfig, loss: LossConfig
) -> Float[Array, ""]:
    """What sums over slots are divided by: trained slots, or (paper) the weights they have.

    It needs no logits, so accumulated and sharded batches know it before they begin, and how a
    batch is split changes nothing.
    """
    if loss.rule == "paper":
        return jnp.sum(mask * position_decay(config, loss.decay))
    return jnp.sum(mask, dtype=jnp.float32)


def confidence_mean(
    confidence: Float[Array, "B N K"],
    accept_rate: Float[Array, "B N K"],
    mask: Bool[Array, "B N K"],
    total: Float[Array, ""],
    config: DraftConfig,
    loss: LossConfig,
) -> Float[Array, ""]:
    """The confidence's cross-entropy against the acceptance rate, under the fixed decay.

    The rate is that of the corrected logits, held constant.
    """
    error = binary_cross_entropy(confidence, jax.lax.stop_gradient(accept_rate))
    weighted = jnp.where(mask, position_decay(config, loss.decay) * error, 0.0)
    return jnp.sum(weighted) / (total + (loss.eps if loss.rule == "paper" else CONFIDENCE_EPS))
