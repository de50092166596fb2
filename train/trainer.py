"""The training step and validation: states, blocks, loss, update in one program."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, muon

from dspark_jax.anchors import at, sample_blocks, teacher_rows
from dspark_jax.config import DraftConfig
from dspark_jax.draft import draft_graphdef
from dspark_jax.drafter import score_blocks
from dspark_jax.losses import dspark_loss, total_variation
from dspark_jax.metrics import Metrics
from dspark_jax.train.hidden_states import HiddenStates
from dspark_jax.train.packing import Packed
from dspark_jax.train.settings import TrainSettings
from dspark_jax.types import Batch, Blocks, BlockScores, Frozen, Target

BINS = 20


class TrainState(NamedTuple):
    """What training changes; a step takes one and gives the next."""

    params: Any
    opt_state: Any
    step: Any


Scorer = Callable[..., tuple[BlockScores, Float[Array, "B N K Vd"], Blocks]]


def make_scorer(
    target: Target, config: DraftConfig, source: HiddenStates, max_anchors: int
) -> Scorer:
    """`score(params, target_params, frozen, batch, fetched, key) -> (scores, teacher, blocks)`."""
    graphdef = draft_graphdef(config)

    def score(
        params: Any, target_params: Any, frozen: Frozen, batch: Batch, fetched: Any, key: Any
    ) -> tuple[BlockScores, Float[Array, "B N K Vd"], Blocks]:
        states = jax.lax.stop_gradient(source.states(target_params, batch, fetched))
        blocks = sample_blocks(
            key, batch.tokens, batch.loss_mask, batch.segment, max_anchors, config
        )
        drafter = nnx.merge(graphdef, params, copy=True)
        scores = score_blocks(drafter, frozen, batch, states.aux_hidden, blocks)
        rows = teacher_rows(blocks.anchor, config, batch.tokens.shape[1])
        teacher = target.unembed(target_params, at(states.final_hidden, rows))
        if config.draft_vocab_size < config.vocab_size:
            teacher = teacher[..., frozen.target_id]
        return scores, teacher, blocks

    return score


def make_optimizer(settings: TrainSettings, params: Any) -> optax.GradientTransformation:
    """Clipped AdamW or Muon with a linear warm-up; weights of one axis are not decayed."""
    rate = learning_rate(settings)
    if settings.optimizer == "adamw":
        update = optax.adamw(
            rate,
            weight_decay=settings.weight_decay,
            mask=decayed,
        )
    else:
        update = muon(
            rate,
            weight_decay=settings.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_axes(params),
        )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def decayed(params: Any) -> Any:
    """Which parameters weight decay takes: matrices and tables, stacked or not, but no scales."""
    chosen = [
        (path, param.replace(path[-1] not in ("weight", "bias")))
        for path, param in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(chosen)


def learning_rate(settings: TrainSettings) -> optax.Schedule:
    """Step s of a warm-up of W has rate (s + 1) / W of the peak; then the chosen decay to zero."""
    peak, steps = settings.learning_rate, settings.steps
    warmup = max(1, round(settings.warmup_share * steps))
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def muon_axes(params: Any) -> Any:
    """Which parameters Muon takes: matrices, except the Markov head's two tables (speculators)."""

    def choose(path: Any, param: Any) -> Any:
        stacked = param.ndim - 2
        takes = path[-1] == "kernel" and "markov_w2" not in path and min(param.shape[-2:]) > 1
        return param.replace(MuonDimensionNumbers(stacked, stacked + 1) if takes else None)

    return nnx.from_flat_state([(p, choose(p, v)) for p, v in nnx.to_flat_state(params)])


def make_loss(config: DraftConfig, settings: TrainSettings) -> Callable[..., Any]:
    """`loss(scores, teacher, blocks) -> (loss, metrics)` with the weights of the settings."""
    return partial(
        dspark_loss,
        config=config,
        weights=settings.loss_weights,
        confidence_weight=settings.loss_confidence,
        decay=settings.loss_decay,
    )


def make_step(
    score: Scorer, config: DraftConfig, optimizer: Any, settings: TrainSettings
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, target_params, frozen, batch, fetched) -> (state, metrics)`, jitted, donated."""
    base, loss_of = jax.random.key(settings.seed), make_loss(config, settings)

    def objective(params: Any, *inputs: Any) -> tuple[Float[Array, ""], Metrics]:
        scores, teacher, blocks = score(params, *inputs)
        return loss_of(scores, teacher, blocks)

    def step(state: TrainState, *inputs: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(base, state.step)
        gradients, metrics = jax.grad(objective, has_aux=True)(state.params, *inputs, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


class Validation(NamedTuple):
    """The table of dspark.md §2.4 and the reliability of the confidence head, bin by bin."""

    table: dict[str, Any]
    reliability: dict[str, list[float]]


def validate(
    score: Scorer,
    config: DraftConfig,
    settings: TrainSettings,
    weights: tuple[Any, Any, Frozen],
    batches: Iterable[Packed],
    source: HiddenStates,
) -> Validation:
    """Metrics over held-out batches: sums and totals are added up, then divided once."""

    loss_of = make_loss(config, settings)

    @jax.jit
    def measure(*inputs: Any) -> tuple[Metrics, Float[Array, "3 bins"]]:
        scores, teacher, blocks = score(*inputs)
        _, metrics = loss_of(scores, teacher, blocks)
        return metrics, _histogram(scores, teacher, blocks)

    totals: Counter[str] = Counter()
    bins = np.zeros((3, BINS))
    key = jax.random.key(settings.seed + 1)
    for i, packed in enumerate(batches):
        fetched = source.fetch(packed)
        metrics, counted = measure(*weights, packed.batch, fetched, jax.random.fold_in(key, i))
        totals.update({name: float(value) for name, value in metrics.items()})
        bins += np.asarray(counted)
    seen = bins[0] > 0
    reliability = {
        "predicted": (bins[1, seen] / bins[0, seen]).tolist(),
        "observed": (bins[2, seen] / bins[0, seen]).tolist(),
        "slots": bins[0, seen].tolist(),
    }
    return Validation(summarise(totals), reliability)


def _histogram(
    scores: BlockScores, teacher: Float[Array, "B N K Vd"], blocks: Blocks
) -> Float[Array, "3 bins"]:
    """Per bin of predicted acceptance: slots, predictions added up, observed rates added up."""
    if scores.confidence is None:
        return jnp.zeros((3, BINS))
    predicted = jax.nn.sigmoid(scores.confidence)
    observed = 1.0 - total_variation(scores.logits, teacher)
    place = jnp.minimum((predicted * BINS).astype(jnp.int32), BINS - 1)
    values = jnp.stack([jnp.ones_like(predicted), predicted, observed]) * blocks.label_mask
    return jax.vmap(lambda v: jnp.zeros(BINS).at[place.reshape(-1)].add(v.reshape(-1)))(values)


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
