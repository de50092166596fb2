"""What training reports, as `<name>_sum` and `<name>_total` pairs.

Sums and totals add over batches and devices; only then are they divided. Names,
denominators and their guards against zero are speculators'.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dspark_jax.config import DraftConfig

Metrics = dict[str, Float[Array, ""]]


def pair(name: str, total_sum: Float[Array, ""], total: Float[Array, ""]) -> Metrics:
    """One metric: what was added up, and over how many."""
    return {f"{name}_sum": total_sum, f"{name}_total": total}


def single_metric(name: str, value: Float[Array, ""], parts: int = 1) -> Metrics:
    """A value that counts once per batch, or its share when the batch is worked off in parts."""
    return pair(name, value, jnp.full((), 1.0 / parts))


def block_metrics(
    confidence: Float[Array, "B N K"] | None,
    accept_rate: Float[Array, "B N K"],
    correct: Bool[Array, "B N K"],
    label_mask: Bool[Array, "B N K"],
    config: DraftConfig,
) -> Metrics:
    """Acceptance, accuracy and calibration over trained slots (reference: dspark.md §2.4).

    `accept_rate` is `Σ min(q, p)` per slot, the chance that rejection sampling keeps the draft;
    `correct` says whether draft and target choose the same token; `confidence` is a logit.
    """
    first = 0 if config.sample_from_anchor else 1
    metrics = acceptance_metrics(accept_rate[..., first:], label_mask[..., first:])
    metrics |= accuracy_metrics(correct & label_mask, label_mask, first)
    if confidence is not None:
        probability = jax.nn.sigmoid(confidence)[..., first:]
        metrics |= confidence_metrics(
            probability, accept_rate[..., first:], label_mask[..., first:]
        )
    return metrics


def acceptance_metrics(rate: Float[Array, "B N G"], mask: Bool[Array, "B N G"]) -> Metrics:
    """Mean rate per slot, and per block the expected accepted length plus the bonus token."""
    length = 1.0 + survival(rate, mask).sum(axis=-1)
    trained = mask.any(axis=-1)
    return pair("accept_rate", jnp.sum(rate * mask), at_least_one(mask)) | pair(
        "accept_len", jnp.sum(length * trained), at_least_one(trained)
    )


def accuracy_metrics(
    correct: Bool[Array, "B N K"], mask: Bool[Array, "B N K"], first: int
) -> Metrics:
    """Greedy agreement: overall, per slot, and as accepted length at temperature 0 (`eal`)."""
    correct, mask = correct[..., first:], mask[..., first:]
    run = 1.0 + survival(correct.astype(jnp.float32), mask).sum(axis=-1)
    trained = mask.any(axis=-1)
    metrics = pair("full_acc", count(correct), count(mask))
    metrics |= pair("eal", jnp.sum(run * trained), count(trained))
    for slot in range(mask.shape[-1]):
        hits, seen = count(correct[..., slot]), count(mask[..., slot])
        metrics |= pair(f"position_{first + slot}_acc", hits, seen)
    return metrics


def confidence_metrics(
    probability: Float[Array, "B N G"], rate: Float[Array, "B N G"], mask: Bool[Array, "B N G"]
) -> Metrics:
    """Calibration against the acceptance rate: per slot, on average, and of the running product."""
    total = at_least_one(mask)
    bias = survival(probability, mask) - survival(rate, mask)
    return (
        pair("confidence_abs_error", jnp.sum(jnp.abs(probability - rate) * mask), total)
        | pair("confidence_pred_mean", jnp.sum(probability * mask), total)
        | pair("confidence_cumprod_bias", jnp.sum(bias * mask), total)
    )


def survival(rate: Float[Array, "B N G"], mask: Bool[Array, "B N G"]) -> Float[Array, "B N G"]:
    """Running product along the block; a slot that is not trained ends it."""
    return jnp.cumprod(rate * mask, axis=-1)


def count(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """How many are true."""
    return jnp.sum(mask, dtype=jnp.float32)


def at_least_one(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """The count, as a denominator that may not vanish."""
    return jnp.maximum(count(mask), 1.0)
