"""The training loop: steps, records, checkpoints; it goes on from where a stopped run was left."""

import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dspark_jax.hosts import leading
from dspark_jax.train.agreement import Agreement
from dspark_jax.train.checkpoints import Checkpoints, Say
from dspark_jax.train.config_file import to_json
from dspark_jax.train.data import Data, held_out_batches
from dspark_jax.train.loggers import MetricsLog, NoLog
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
    job: Job, state: TrainState, data: Data, made_of: dict[str, Any], bar: Bar, say: Say
) -> Trained:
    """Run the steps that are left; `made_of` says what a resumed run must find unchanged.

    A stop that is wished for is granted after the step at hand, or among several processes after
    the next one, and saved. Raises ValueError on a
    loss that is no number, on data that changed, and when a checkpoint cannot be written.
    """
    settings = job.settings
    folder, keep = settings.output / "checkpoints", settings.keeping.keep
    with closing(Checkpoints(folder, keep, say)) as checkpoints:
        loop = Loop(job, state, data, made_of, checkpoints)
        loop.resume(say)
        with closing(open_log(settings, loop.number)) as log, stopping() as stop:
            agreement = Agreement(stop)
            while loop.number < settings.steps and not agreement.reached():
                loop.advance()
                loop.report(log, bar)
            loop.save_unsaved()
        checkpoints.finish()
        stopped = loop.number < settings.steps
        best = None if stopped else checkpoints.restore_best(loop.state, loop.number)
        if best is None:
            return Trained(loop.state.params, loop.number, loop.number)
        say(f"step {best.step} was better in validation than the last one; its weights are taken")
        return Trained(best.state.params, best.step, loop.number)


def open_log(settings: TrainSettings, number: int) -> MetricsLog | NoLog:
    """Where the records of a run that goes on from step `number` go."""
    if not leading():
        return NoLog()
    return MetricsLog(settings.output, settings.keeping.loggers, to_json(settings), number)


class Loop:
    """A run at one of its steps: state, place in the data, and what has been seen of the loss."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        data: Data,
        made_of: dict[str, Any],
        checkpoints: Checkpoints,
    ):
        settings = job.settings
        self.job, self.state, self.data, self.made_of = job, state, data, made_of
        self.checkpoints, self.recent = checkpoints, Recent()
        self.number = self.tokens = self.tokens_before = 0
        self.started = time.monotonic()
        self.batches = pack(
            data.train, settings.sequence_length, settings.batch_rows, settings.seed
        )
        self.step, self.validate = make_step(job), make_validator(job)

    def resume(self, say: Say) -> None:
        """Go on from the newest checkpoint, if there is one."""
        output = self.job.settings.output
        found = self.checkpoints.restore_latest(
            self.state, lambda about: check_same(about, self.made_of, output)
        )
        if found is None:
            return
        self.state, self.number = found.state, found.step
        self.tokens = self.tokens_before = found.about["tokens"]
        self.batches.set_state(found.about["position"])
        say(f"going on from step {found.step} of {self.job.settings.steps}")

    def advance(self) -> None:
        """One step; the host does not wait for it."""
        packed, fetched = self.job.source.fetch(next(self.batches))
        given = on_mesh(self.job, (packed.batch, fetched))
        tables = (self.job.target_params, self.job.frozen)
        self.state, metrics = self.step(self.state, *tables, *given)
        self.number += 1
        self.tokens += int((packed.document >= 0).sum())
        self.recent.add(self.number, metrics, packed)

    def report(self, log: MetricsLog | NoLog, bar: Bar) -> None:
        """Where it is time for it: a record, and a validated checkpoint."""
        settings, number = self.job.settings, self.number
        last = number == settings.steps
        if number % LOG_EVERY == 0 or number == 1 or last:
            means = self.checked()
            speed = (self.tokens - self.tokens_before) / (time.monotonic() - self.started)
            record = {"step": number, "tokens": self.tokens, "tokens/s": speed} | means
            log.write(record)
            bar.show(number, settings.steps, record)
        if number % settings.keeping.save_every == 0 or last:
            self.checked()
            self.check_weights()
            held_out = islice(
                held_out_batches(settings, self.data), settings.keeping.validation_batches
            )
            table = self.validate(self.state.params, held_out).table
            self.check_table(table)
            log.write_validation(number, table)
            self.save(table["mean_accepted_length"])

    def checked(self) -> dict[str, float]:
        """Means of the last step; ValueError when a loss was no number."""
        return self.recent.checked(self.kept())

    def check_weights(self) -> None:
        """Raise ValueError when the last update left weights or optimizer without numbers."""
        if not all_finite((self.state.params, self.state.opt_state)):
            raise ValueError(
                f"the weights are no numbers after step {self.number}; {self.kept()}. "
                "Start over with --fresh and a lower --learning-rate, or another --output."
            )

    def check_table(self, table: dict[str, Any]) -> None:
        """Raise ValueError when validation gave no numbers: such weights are worth nothing."""
        if table["loss"] is not None and not np.isfinite(table["loss"]):
            raise ValueError(
                f"the validation loss is {table['loss']} after step {self.number}; {self.kept()}. "
                "Start over with --fresh and a lower --learning-rate, or another --output."
            )

    def kept(self) -> str:
        """What is left of the run, for a message."""
        saved = [step for step in self.checkpoints.scores if step < self.number]
        return f"checkpoint {max(saved)} is kept" if saved else "no checkpoint was made before"

    def save_unsaved(self) -> None:
        """A checkpoint of a run that was stopped between two."""
        self.checked()
        if self.number not in self.checkpoints.scores:
            self.check_weights()
            self.save(None)

    def save(self, score: float | None) -> None:
        """Begin to write a checkpoint of this step."""
        about = {"tokens": self.tokens, "position": self.batches.get_state()}
        self.checkpoints.save(self.number, self.state, self.made_of | about, score)


class Recent:
    """Steps whose loss the host has not looked at yet; it waits for the device only to look."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, Any, np.ndarray]] = []

    def add(self, number: int, metrics: Any, packed: Packed) -> None:
        """One more step, not yet computed perhaps."""
        documents = np.unique(packed.document[packed.document >= 0])
        self.steps.append((number, metrics, documents))

    def checked(self, kept: str) -> dict[str, float]:
        """Means of the last step; ValueError at the first step whose loss is no number.

        `kept` says in that message what is left of the run.
        """
        totals: dict[str, Any] = {}
        for number, metrics, documents in self.steps:
            totals = jax.device_get(metrics)
            if not np.isfinite(totals["loss_sum"]):
                raise ValueError(
                    f"the loss is {totals['loss_sum']} at step {number}, whose batch held rows "
                    f"{', '.join(map(str, documents))} of the data; {kept}. Look at these rows and "
                    "their hidden states, or start over with --fresh and a lower --learning-rate."
                )
        self.steps.clear()
        return means(totals)


def means(totals: dict[str, Any]) -> dict[str, float]:
    """`name_sum / name_total` of every metric."""
    names = [name.removesuffix("_sum") for name in totals if name.endswith("_sum")]
    return {n: float(totals[f"{n}_sum"] / max(totals[f"{n}_total"], 1e-9)) for n in names}


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number of a tree is one."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in floats]))


def check_same(about: dict[str, Any], made_of: dict[str, Any], output: Path) -> None:
    """Raise ValueError when a run would go on with other data or another target."""
    for name, value in made_of.items():
        was = about.get(name)
        if was != value:
            raise ValueError(
                f"the {name.removesuffix('_sha256')} changed since the run in {output} began "
                f"(SHA-256 {str(was)[:12]} then, {str(value)[:12]} now); put it back, give another "
                "--output, or start over with --fresh."
            )
