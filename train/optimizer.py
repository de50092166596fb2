"""The published optimizers: AdamW, or Muon with AdamW for what is no plain matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dspark_jax.train.muon import scale_by_muon
from dspark_jax.train.settings import OptimizerSettings

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon's split, with decoupled weight decay.

    As in speculators 0.9.0 everything decays, norms and biases included; DeepSpec decays nothing.
    """
    rate = learning_rate(settings, settings.learning_rate, steps)
    adamw = optax.adamw(rate, weight_decay=settings.weight_decay, **ADAM)
    if settings.optimizer == "adamw":
        update = adamw
    else:
        peak = settings.muon_learning_rate
        peak = settings.learning_rate if peak is None else peak
        muon = optax.chain(
            scale_by_muon(settings.muon_momentum, settings.muon_steps),
            optax.add_decayed_weights(settings.muon_weight_decay),
            optax.scale_by_learning_rate(learning_rate(settings, peak, steps)),
        )
        update = optax.partition({"muon": muon, "adamw": adamw}, split)
    return optax.chain(clip(settings.clip_norm), update)


def clip(limit: float) -> optax.GradientTransformation:
    """Gradients scaled by `limit / (global norm + 1e-6)` where that is less than one, as torch."""

    def scale(gradients: optax.Updates, params: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(1.0, limit / (optax.global_norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: g * factor, gradients)

    return optax.stateless(scale)


def learning_rate(settings: OptimizerSettings, peak: float, steps: int) -> optax.Schedule:
    """Step s of a warm-up of W has rate (s + 1) / W of the peak; then the chosen decay to zero."""
    warmup = max(1, round(settings.warmup_share * steps))
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, steps - warmup)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, steps - warmup)),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def split(params: Any) -> Any:
    """Muon for matrices but the Markov head's two factors, AdamW for the rest (speculators)."""

    def choose(path: tuple[Any, ...], param: Any) -> str:
        matrix = path[-1] == "kernel" and min(param.shape[-2:]) > 1
        return "muon" if matrix and "markov_w2" not in path else "adamw"

    flat = [(path, param.replace(choose(path, param))) for path, param in nnx.to_flat_state(params)]
    return nnx.from_flat_state(flat)
