"""The main job: target, data, training, validation, proof, report."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from rich.console import Console

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import DraftConfig
from dspark_jax.draft import check_mesh, init_draft_params
from dspark_jax.hosts import (
    any_process,
    check_same,
    from_first,
    leading,
    together,
    wait,
)
from dspark_jax.target_folder import (
    LoadedTarget,
    TargetFiles,
    find_target,
    mask_token,
    read_target,
    target_fingerprint,
)
from dspark_jax.targets.families import make_target
from dspark_jax.train import hidden_states
from dspark_jax.train.checks import check_batch, check_settings
from dspark_jax.train.command_line import command, going_on
from dspark_jax.train.config_file import flat, to_json, write_config
from dspark_jax.train.conversations import Example, read_conversations
from dspark_jax.train.data import Data, describe, frequent_ids, load_data
from dspark_jax.train.devices import (
    check_memory,
    device_bytes,
    gigabytes,
    make_meshes,
    needed_bytes,
)
from dspark_jax.train.draft_files import WarmStart, warm_start
from dspark_jax.train.finish import finish
from dspark_jax.train.inspect_data import inspect
from dspark_jax.train.output import begin, claimed, untouched
from dspark_jax.train.presets import draft_config
from dspark_jax.train.progress import Bar
from dspark_jax.train.proof import holds
from dspark_jax.train.settings import Command, TrainSettings
from dspark_jax.train.stopping import Stop, Stopped, stoppable, stopping
from dspark_jax.train.summary import closing, summary
from dspark_jax.train.trainer import Job, TrainState, init_state, make_job
from dspark_jax.train.training import Trained, train
from dspark_jax.types import Target

EMBEDDED_LAYERS = 4
FILES = ("data", "target", "hidden_states", "warm_start")
"""Settings that may name other places on other hosts; what lies there is compared."""


def run(given: Command, arguments: Sequence[str] = ()) -> bool:
    """Train a draft and prove what it is worth; everything lands in the output folder.

    `arguments` are the command line's, for the closing line. A run that is stopped can be given
    again and goes on. False when the proof failed. Raises Stopped when a signal came; the Stop says
    what is kept.
    """
    settings, console = given.settings, Console(soft_wrap=True, quiet=not leading())
    check_alike(given)
    examples, found = together(lambda: read_inputs(settings))
    config = draft_config(settings.draft, found.config, mask_token(found))
    meshes = make_meshes(settings)
    target = make_target(found.config, meshes.target)
    check_mesh(config, meshes.target)
    check_batch(settings, meshes.draft)
    needed = needed_bytes(settings, found, config, meshes)
    together(lambda: check_memory(needed, device_bytes(meshes.draft)))
    start = together(lambda: starting_point(settings, config, console))
    place = untouched if given.inspect_data else claimed
    with stoppable() as stop, place(given) as where:
        stop.speaks = leading()
        console.print(summary(found, start, config, meshes, needed))
        with Bar(console, "target", ("GB/s",), gigabytes) as bar:
            read = partial(report_bytes, bar)
            loaded = read_target(found, meshes.target, settings.compute_dtype, read)
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
        job = make_job(settings, config, target, source, meshes, loaded, target_id)
        made_of = {
            "data_sha256": data.sha256,
            "target_sha256": target_fingerprint(loaded.folder),
        }
        check_same(made_of)
        state = init_state(job, start.params)
        trained = fit(given, arguments, job, state, data, made_of, console, stop)
        report = finish(job, loaded, target_id, trained, data, arguments, console)
        closing(console, settings, report, arguments)
        wait("the end")
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
        from_first(lambda: begin(given))
        stop.command = command(going_on(arguments))
        stop.where = f"in training, finished checkpoints are {kept}"
        trained = train(job, state, data, made_of, bar, console.print)
        from_first(lambda: write_config(settings, settings.output / "config.json"))
        stop.where = f"at step {trained.step} of {settings.steps}, all saved"
    if any_process(stop.wanted):
        raise Stopped
    stop.where = f"in the proof, the trained draft is {kept}"
    console.print("validating, then decoding with the draft and without it; compiles first")
    return trained


def check_alike(given: Command) -> None:
    """Raise ValueError on settings that cannot work, alone or among several processes."""
    values = flat(to_json(given.settings)) | {"fresh": given.fresh, "resume": given.resume}
    check_same({name: value for name, value in values.items() if name not in FILES})
    check_settings(given.settings)
    if given.inspect_data and jax.process_count() > 1:
        raise ValueError(
            f"--inspect-data looks at data on one host, not on {jax.process_count()}; leave "
            "--coordinator, --processes and --process-id out."
        )


def read_inputs(settings: TrainSettings) -> tuple[list[Example] | None, TargetFiles]:
    """The conversations of `--data`, and the target's files."""
    examples = None if settings.data is None else read_conversations(settings.data)
    if settings.target is None and max(settings.draft.aux_layer_ids, default=0) > EMBEDDED_LAYERS:
        raise ValueError(
            f"aux_layer_ids {list(settings.draft.aux_layer_ids)} do not fit the embedded target of "
            f"{EMBEDDED_LAYERS} layers; give the --target that they are meant for."
        )
    name = settings.target or embedded("tiny-glm")
    return examples, find_target(name, settings.draft.aux_layer_ids)


def starting_point(settings: TrainSettings, config: DraftConfig, console: Console) -> WarmStart:
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


def report_bytes(bar: Bar, done_bytes: int, total_bytes: int) -> None:
    """Progress of loading the target."""
    speed = done_bytes / 1e9 / max(bar.seconds(), 1e-9)
    bar.show(done_bytes, total_bytes, {"GB/s": round(speed, 3)})


def report_answers(bar: Bar, done: int, total: int, tokens: int) -> None:
    """Progress of regeneration."""
    bar.show(done, total, {"tokens/s": tokens / max(bar.seconds(), 1e-9)})
