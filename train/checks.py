"""Settings that cannot work are refused before anything expensive."""

import math
from operator import attrgetter

from jax.sharding import Mesh

from dspark_jax.train.loggers import check_loggers
from dspark_jax.train.settings import TrainSettings

LEAST = {
    "steps": 1,
    "batch_rows": 1,
    "max_anchors": 1,
    "conversations": 1,
    "answer_tokens": 1,
    "prompt_tokens": 2,
    "accumulate": 1,
    "seed": 0,
    "keeping.serve_prompts": 1,
    "keeping.save_every": 1,
    "keeping.keep": 1,
    "keeping.validation_batches": 1,
    "optimizer.muon_steps": 1,
}
"""Settings that count something."""


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that cannot work, before anything expensive."""
    for name, least in LEAST.items():
        value = attrgetter(name)(settings)
        if value < least:
            raise ValueError(f"{name.split('.')[-1]} is {value}; use at least {least}.")
    if not 0 < settings.held_out_share < 1:
        raise ValueError(
            f"held_out_share {settings.held_out_share} is no share; use a number between 0 and 1."
        )
    for name in ("loss.loss_decay", "optimizer.learning_rate", "optimizer.clip_norm"):
        value = attrgetter(name)(settings)
        if not 0 < value < math.inf:
            raise ValueError(f"{name.split('.')[-1]} is {value}; use a positive number.")
    for name in ("optimizer.warmup_share", "loss.dpace_alpha", "bad_states"):
        value = attrgetter(name)(settings)
        if not 0 <= value <= 1:
            raise ValueError(f"{name.split('.')[-1]} is {value}; use a number from 0 to 1.")
    if not 0 <= settings.optimizer.muon_momentum < 1:
        raise ValueError(
            f"muon_momentum is {settings.optimizer.muon_momentum}; use 0 or more, less than 1."
        )
    if settings.loss.loss_preset == "paper" and settings.draft.draft_vocab_size is not None:
        raise ValueError(
            f"draft_vocab_size {settings.draft.draft_vocab_size} and loss_preset paper do not go "
            "together: the data's own tokens may lie outside a reduced vocabulary; leave one out."
        )
    if settings.warm_start is not None and settings.output in settings.warm_start.parents:
        raise ValueError(
            f"--output {settings.output} holds the draft {settings.warm_start} to start from, "
            "which the run would replace; give another --output."
        )
    if settings.hidden_states is not None and settings.data is None:
        raise ValueError(
            f"--hidden-states {settings.hidden_states} needs --data: files are numbered by the "
            "conversations they were made from; give both."
        )
    if settings.hidden_states is not None and not settings.hidden_states.is_dir():
        raise ValueError(f"--hidden-states {settings.hidden_states} is not a folder; give one.")
    if settings.sequence_length <= settings.draft.block_size:
        raise ValueError(
            f"sequence_length {settings.sequence_length} leaves no room for a block of "
            f"{settings.draft.block_size}; use a longer one."
        )
    weights = dict(settings.loss.config().weights)
    for name, value in (*weights.items(), ("loss_confidence", settings.loss.loss_confidence)):
        if not 0 <= value < math.inf:
            raise ValueError(f"the weight of {name} is {value}; use 0 or a positive number.")
    if not weights:
        raise ValueError("all loss_weights are 0, so nothing is learnt; weigh one of them.")
    check_loggers(settings.keeping.loggers)


def check_batch(settings: TrainSettings, mesh: Mesh) -> None:
    """Raise ValueError unless parts and devices divide the rows of a step."""
    rows, parts, devices = settings.batch_rows, settings.accumulate, mesh.size
    if rows % (parts * devices):
        raise ValueError(
            f"batch_rows {rows} cannot be shared by {parts} part(s) on {devices} device(s); use a "
            f"multiple of {parts * devices}, or another mesh."
        )
