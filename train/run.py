"""The main job: target, data, training, validation, proof, report."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import DraftConfig, MeshConfig
from dspark_jax.draft import init_draft_params
from dspark_jax.sharding import make_mesh
from dspark_jax.targets.families import make_target
from dspark_jax.train import hidden_states
from dspark_jax.train.checks import check_batch, check_settings
from dspark_jax.train.command_line import command, going_on
from dspark_jax.train.config_file import write_config
from dspark_jax.train.conversations import read_conversations
from dspark_jax.train.data import Data, describe, frequent_ids, load_data
from dspark_jax.train.draft_files import WarmStart, save_draft, warm_start
from dspark_jax.train.files import (
    LoadedTarget,
    load_target,
    mask_token,
    target_fingerprint,
)
from dspark_jax.train.inspect_data import inspect
from dspark_jax.train.loggers import read_records
from dspark_jax.train.output import begin, claimed, untouched
from dspark_jax.train.presets import draft_config
from dspark_jax.train.progress import Bar
from dspark_jax.train.proof import holds, prove
from dspark_jax.train.report import write_report
from dspark_jax.train.settings import Command, TrainSettings
from dspark_jax.train.stopping import Stop, Stopped, stoppable, stopping
from dspark_jax.train.summary import closing, machine, summary
from dspark_jax.train.trainer import Job, TrainState, init_state, make_job
from dspark_jax.train.training import Trained, train
from dspark_jax.train.transformers_speed import measure_transformers
from dspark_jax.types import Target

TRANSFORMERS_PROMPTS = 8


def run(given: Command, arguments: Sequence[str] = ()) -> bool:
    """Train a draft and prove what it is worth; everything lands in the output folder.

    `arguments` are the command line's, for the closing line. A run that is stopped can be given
    again and goes on. False when the proof failed. Raises Stopped when a signal came; the Stop says
    what is kept.
    """
    settings, console = given.settings, Console(soft_wrap=True)
    check_settings(settings)
    examples = None if settings.data is None else read_conversations(settings.data)
    loaded = load_target(settings.target or embedded("tiny-glm"), settings.draft.aux_layer_ids)
    config = draft_config(settings.draft, loaded.config, mask_token(loaded))
    start = starting_point(settings, config, loaded, console)
    target, mesh = (
        make_target(loaded.config),
        make_mesh(settings.mesh, settings.batch_rows // settings.accumulate),
    )
    check_batch(settings, mesh)
    place = untouched if given.inspect_data else claimed
    with stoppable() as stop, place(given) as where:
        console.print(summary(loaded, start, config, mesh))
        if where.data is None and where.output == settings.output:
            stop.where = f"before training, answers made so far are kept in {where.output / 'data'}"
        with Bar(console, "answers", ("tokens/s",)) as bar:
            data = load_data(where, target, loaded, examples, partial(report_answers, bar))
        console.print(describe(data, settings.sequence_length))
        if given.inspect_data:
            inspect(data.train, loaded.tokenizer, console)
            return True
        source = states_source(settings, config, target, loaded, data, console)
        target_id = start.target_id
        if target_id is None:
            target_id = frequent_ids(data.train, config.vocab_size, config.draft_vocab_size)
        job = make_job(settings, config, target, source, mesh, loaded, target_id)
        made_of = {
            "data_sha256": data.sha256,
            "target_sha256": target_fingerprint(loaded.folder),
        }
        state = init_state(job, start.params)
        trained = fit(given, arguments, job, state, data, made_of, console, stop)
        report = finish(settings, config, target, loaded, target_id, trained, data, arguments)
        closing(console, settings, report, arguments)
        return holds(report["served"])


def fit(
    given: Command,
    arguments: Sequence[str],
    job: Job,
    state: TrainState,
    data: Data,
    made_of: dict[str, Any],
    console: Console,
    stop: Stop,
) -> Trained:
    """Begin the run in its folder and train; a signal ends it once it is saved."""
    settings = given.settings
    kept = f"kept in {settings.output / 'checkpoints'}"
    with Bar(console, "training", ("loss", "accept_len", "tokens/s")) as bar, stopping():
        begin(given)
        stop.command = command(going_on(arguments))
        stop.where = f"in training, finished checkpoints are {kept}"
        trained = train(job, state, data, made_of, bar, console.print)
        write_config(settings, settings.output / "config.json")
        stop.where = f"at step {trained.step} of {settings.steps}, all saved"
    if stop.wanted:
        raise Stopped
    stop.where = f"in the proof, the trained draft is {kept}"
    console.print("validating, then decoding with the draft and without it; compiles first")
    return trained


def finish(
    settings: TrainSettings,
    config: DraftConfig,
    target: Target,
    loaded: LoadedTarget,
    target_id: np.ndarray,
    trained: Trained,
    data: Data,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Write the draft, prove it on one device, write the report."""
    params = jax.device_put(jax.device_get(trained.params), jax.devices()[0])
    folder = settings.output / "draft"
    save_draft(folder, config, params, loaded, target_id)
    console = Console(soft_wrap=True)
    alone = dataclasses.replace(settings, mesh=MeshConfig(1, 1), compute_dtype="float32")
    source = hidden_states.in_process(target)
    job = make_job(alone, config, target, source, make_mesh(alone.mesh), loaded, target_id)
    report = prove(job, loaded, params, data, console)
    reliability = report.pop("reliability")
    report |= {"target": loaded.folder.name, "checkpoint": str(folder), "steps": trained.best}
    report |= {"command": command(going_on(arguments)), "machine": machine()}
    records = read_records(settings.output / "metrics.jsonl")
    curve = [record for record in records if "validation" not in record]
    write_report(settings.output, report, curve, reliability)
    timed = data.prompts[:TRANSFORMERS_PROMPTS]
    elsewhere = measure_transformers(loaded.folder, timed, settings.answer_tokens)
    if elsewhere is not None:
        report["served"]["greedy"]["transformers"] = elsewhere
        write_report(settings.output, report, curve, reliability)
    return report


def starting_point(
    settings: TrainSettings, config: DraftConfig, loaded: LoadedTarget, console: Console
) -> WarmStart:
    """Fresh parameters, or those of `--warm-start`."""
    if settings.warm_start is None:
        return WarmStart(init_draft_params(config, settings.seed), None, ())
    start = warm_start(settings.warm_start, config, settings.seed)
    console.print(
        f"continuing from {settings.warm_start}; "
        f"drawn afresh: {', '.join(start.drawn) or 'nothing'}"
    )
    return start


def states_source(
    settings: TrainSettings,
    config: DraftConfig,
    target: Target,
    loaded: LoadedTarget,
    data: Data,
    console: Console,
) -> hidden_states.HiddenStates:
    """In process, or from the given files once they are found to be of this data and target."""
    if settings.hidden_states is None:
        return hidden_states.in_process(target)
    files = hidden_states.Files(
        settings.hidden_states, len(config.aux_layer_ids), target.config.hidden_size
    )
    rows = [*data.train, *data.held_out]
    stored = hidden_states.StoredStates(files, rows, settings.bad_states, console.print)
    stored.check(target, loaded.params)
    return stored.source()


def report_answers(bar: Bar, done: int, total: int, tokens: int) -> None:
    """Progress of regeneration."""
    bar.show(done, total, {"tokens/s": tokens / max(bar.seconds(), 1e-9)})
