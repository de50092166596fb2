"""Validation on held-out conversations: the table of dspark.md §2.4, and reliability."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dspark_jax.hosts import fetch
from dspark_jax.metrics import Metrics
from dspark_jax.objective import Outcome
from dspark_jax.train.packing import Packed
from dspark_jax.train.trainer import Job, draw_blocks, make_objective, on_mesh
from dspark_jax.types import Batch, Blocks

BINS = 20
KEY_OFFSET = 1
"""Validation draws its blocks from another seed than training, the same ones every time."""


class Validation(NamedTuple):
    """The report's table, and how often what the confidence head says comes true, bin by bin."""

    table: dict[str, Any]
    reliability: dict[str, list[float]]


Validator = Callable[[Any, Iterable[Packed]], Validation]


def make_validator(job: Job) -> Validator:
    """`validate(params, batches)`: sums and totals are added up over batches, then divided once."""
    objective = make_objective(job)

    @jax.jit
    def measure(
        params: Any, target_params: Any, frozen: Any, batch: Batch, fetched: Any, key: Any
    ) -> tuple[Metrics, Float[Array, "3 bins"]]:
        blocks = draw_blocks(job, batch, key)
        pieces = (batch, fetched, blocks)
        outcomes = []
        for part in range(len(batch.tokens)):
            piece = jax.tree.map(lambda x, part=part: x[part], pieces)
            _, outcome = objective(params, target_params, frozen, *piece)
            outcomes.append((outcome.metrics, histogram(outcome, piece[2])))
        return jax.tree.map(lambda *x: sum(x), *outcomes)

    def validate(params: Any, batches: Iterable[Packed]) -> Validation:
        totals: Counter[str] = Counter()
        bins = np.zeros((3, BINS))
        key = jax.random.key(job.settings.seed + KEY_OFFSET)
        for i, packed in enumerate(batches):
            packed, fetched = job.source.fetch(packed)
            given = on_mesh(job, (packed.batch, fetched))
            metrics, counted = measure(
                params, job.target_params, job.frozen, *given, jax.random.fold_in(key, i)
            )
            metrics, counted = fetch((metrics, counted))
            totals.update({name: float(value) for name, value in metrics.items()})
            bins += counted
        return Validation(summarise(totals), reliability(bins))

    return validate


def histogram(outcome: Outcome, blocks: Blocks) -> Float[Array, "3 bins"]:
    """Per bin of predicted acceptance: slots, predictions added up, observed rates added up."""
    confidence = outcome.scores.confidence
    if confidence is None:
        return jnp.zeros((3, BINS))
    predicted = jax.nn.sigmoid(confidence)
    place = jnp.minimum((predicted * BINS).astype(jnp.int32), BINS - 1)
    values = jnp.stack([jnp.ones_like(predicted), predicted, outcome.slots.accept_rate])
    values *= blocks.label_mask
    return jax.vmap(lambda v: jnp.zeros(BINS).at[place.reshape(-1)].add(v.reshape(-1)))(values)


def reliability(bins: np.ndarray) -> dict[str, list[float]]:
    """Means of the bins that hold anything."""
    seen = bins[0] > 0
    return {
        "predicted": (bins[1, seen] / bins[0, seen]).tolist(),
        "observed": (bins[2, seen] / bins[0, seen]).tolist(),
        "slots": bins[0, seen].tolist(),
    }


def summarise(totals: Mapping[str, float]) -> dict[str, Any]:
    """The report's validation table from summed metrics; None where nothing was counted."""

    def mean(name: str) -> float | None:
        total = totals.get(f"{name}_total", 0.0)
        return totals[f"{name}_sum"] / total if total else None

    slots = sorted(
        int(name.split("_")[1])
        for name in totals
        if name.startswith("position_") and name.endswith("_acc_sum")
    )
    names = {
        "mean_accepted_length": "accept_len",
        "full_accuracy": "full_acc",
        "mean_acceptance_rate": "accept_rate",
        "confidence_abs_error": "confidence_abs_error",
        "confidence_pred_mean": "confidence_pred_mean",
        "confidence_cumprod_bias": "confidence_cumprod_bias",
        "greedy_accepted_length": "eal",
        "loss": "loss",
    }
    table: dict[str, Any] = {ours: mean(theirs) for ours, theirs in names.items()}
    table["position_accuracy"] = [mean(f"position_{slot}_acc") for slot in slots]
    table["blocks"] = totals.get("accept_len_total", 0.0)
    return table
