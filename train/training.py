"""The training loop: steps, records, checkpoints; it goes on from where a stopped run was left."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dspark_jax.train.checkpoints import Checkpoints, Restored
from dspark_jax.train.config_file import to_json
from dspark_jax.train.data import Data
from dspark_jax.train.loggers import MetricsLog
from dspark_jax.train.packing import Packed, pack
from dspark_jax.train.progress import Bar
from dspark_jax.train.settings import TrainSettings
from dspark_jax.train.stopping import stopping
from dspark_jax.train.trainer import Job, TrainState, make_step, on_mesh
from dspark_jax.train.validation import make_validator

LOG_EVERY = 10


class Trained(NamedTuple):
    """The parameters of the best checkpoint, its step, and the step the run has reached."""

    params: Any
    best: int
    step: int


def train(
    job: Job, state: TrainState, data: Data, made_of: dict[str, Any], bar: Bar, say: Callable
) -> Trained:
    """Run the steps that are left; `made_of` says what a resumed run must find unchanged.

    A stop that is wished for is granted after the step at hand, and saved. Raises ValueError on a
    loss that is no number, on data that changed, and when a checkpoint cannot be written.
    """
    settings = job.settings
    checkpoints = Checkpoints(settings.output / "checkpoints", settings.keeping.keep, say)
    batches = pack(data.train, settings.sequence_length, settings.batch_rows, settings.seed)
    found = checkpoints.restore_latest(state)
    tokens = 0
    if found is not None:
        check_same(found, made_of, settings.output)
        state, tokens = found.state, found.about["tokens"]
        batches.set_state(found.about["position"])
        say(f"going on from step {found.step} of {settings.steps}")
    first = 0 if found is None else found.step
    names = settings.keeping.loggers
    log = MetricsLog(settings.output, names, to_json(settings), first)
    step, validate = make_step(job), make_validator(job)
    recent, started, before = Recent(), time.monotonic(), tokens

    def save(score: float | None) -> None:
        about = made_of | {"tokens": tokens, "position": batches.get_state()}
        checkpoints.save(number, state, about, score)

    with stopping() as stop:
        number = first
        while number < settings.steps and not stop.wanted:
            number += 1
            packed, fetched = job.source.fetch(next(batches))
            tokens += int((packed.document >= 0).sum())
            given = on_mesh(job, (packed.batch, fetched))
            state, metrics = step(state, job.target_params, job.frozen, *given)
            recent.add(number, metrics, packed)
            due = number % settings.keeping.save_every == 0 or number == settings.steps
            if number % LOG_EVERY == 0 or number in (1, settings.steps) or due or stop.wanted:
                record = recent.checked()
                if number % LOG_EVERY == 0 or number in (1, settings.steps):
                    speed = (tokens - before) / (time.monotonic() - started)
                    record = {"step": number, "tokens": tokens, "tokens/s": speed} | record
                    log.write(record)
                    bar.show(number, settings.steps, record)
            if due:
                table = validate(state.params, held_out_batches(settings, data)).table
                log.write_validation(number, table)
                save(table["mean_accepted_length"])
        recent.checked()
        if number not in checkpoints.scores:
            save(None)
    checkpoints.finish()
    best = checkpoints.best()
    if number == settings.steps and best not in (None, number):
        say(f"step {best} was better in validation than the last one; its weights are taken")
        state = checkpoints.restore(best, state).state
    checkpoints.close()
    log.close()
    return Trained(state.params, number if best is None else best, number)


def held_out_batches(settings: TrainSettings, data: Data) -> Iterator[Packed]:
    """The batches a checkpoint is judged by; rows count on where the training rows end."""
    batches = pack(data.held_out, settings.sequence_length, settings.batch_rows, None)
    for packed, _ in zip(batches, range(settings.keeping.validation_batches), strict=False):
        document = packed.document
        yield packed._replace(document=np.where(document >= 0, document + len(data.train), -1))


class Recent:
    """Steps whose loss the host has not looked at yet; it waits for the device only to look."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, Any, np.ndarray]] = []

    def add(self, number: int, metrics: Any, packed: Packed) -> None:
        """One more step, not yet computed perhaps."""
        documents = np.unique(packed.document[packed.document >= 0])
        self.steps.append((number, metrics, documents))

    def checked(self) -> dict[str, float]:
        """Means of the last step; ValueError at the first step whose loss is no number."""
        totals: dict[str, Any] = {}
        for number, metrics, documents in self.steps:
            totals = jax.device_get(metrics)
            if not np.isfinite(totals["loss_sum"]):
                raise ValueError(
                    f"the loss is {totals['loss_sum']} at step {number}, whose batch held rows "
                    f"{', '.join(map(str, documents))} of the data; the last good checkpoint is "
                    "kept. Lower --learning-rate, or look at these rows and their hidden states."
                )
        self.steps.clear()
        return means(totals)


def means(totals: dict[str, Any]) -> dict[str, float]:
    """`name_sum / name_total` of every metric."""
    names = [name.removesuffix("_sum") for name in totals if name.endswith("_sum")]
    return {n: float(totals[f"{n}_sum"] / max(totals[f"{n}_total"], 1e-9)) for n in names}


def check_same(found: Restored, made_of: dict[str, Any], output: Path) -> None:
    """Raise ValueError when a run would go on with other data or another target."""
    for name, value in made_of.items():
        was = found.about.get(name)
        if was != value:
            raise ValueError(
                f"the {name.removesuffix('_sha256')} changed since the run in {output} began "
                f"(SHA-256 {str(was)[:12]} then, {str(value)[:12]} now); put it back, give another "
                "--output, or start over with --fresh."
            )
