"""The main job: target, data, training, validation, proof, report."""

import dataclasses
import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from dspark_jax.config import DraftConfig
from dspark_jax.draft import init_draft_params
from dspark_jax.targets.target import glm_target
from dspark_jax.train import hidden_states
from dspark_jax.train.conversations import read_conversations
from dspark_jax.train.data import Data, check_output, frequent_ids, load_data
from dspark_jax.train.draft_files import WarmStart, save_draft, warm_start
from dspark_jax.train.files import LoadedTarget, embedded, load_target, mask_token
from dspark_jax.train.packing import pack
from dspark_jax.train.progress import Bar
from dspark_jax.train.proof import holds, prove
from dspark_jax.train.report import write_report
from dspark_jax.train.settings import TrainSettings, draft_config
from dspark_jax.train.trainer import TrainState, make_optimizer, make_scorer, make_step
from dspark_jax.train.transformers_speed import measure_transformers
from dspark_jax.types import Frozen, Target

LOG_EVERY = 10
TRANSFORMERS_PROMPTS = 8
LEAST = {
    "steps": 1,
    "batch_rows": 1,
    "max_anchors": 1,
    "conversations": 1,
    "answer_tokens": 1,
    "prompt_tokens": 2,
    "serve_prompts": 1,
}
"""Settings that count something."""


def run(settings: TrainSettings, arguments: Sequence[str] = ()) -> bool:
    """Train a draft and prove what it is worth; everything lands in `settings.output`.

    `arguments` are the command line's, for the closing line. False when the proof failed.
    """
    console = Console(soft_wrap=True)
    check_settings(settings)
    given = None if settings.data is None else read_conversations(settings.data)
    folder = settings.target or embedded("tiny-glm")
    loaded = load_target(folder, settings.draft.aux_layer_ids)
    config = draft_config(settings.draft, loaded.config, mask_token(loaded))
    start = starting_point(settings, config, loaded, console)
    target = glm_target(loaded.config)
    check_output(settings.output)
    console.print(
        f"target {loaded.folder.name}: {count(loaded.params):,} parameters; "
        f"draft {count(start.params):,} ({config.draft_length} tokens a round, Markov rank "
        f"{config.markov_rank}); {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    with Bar(console, "answers", ("tokens/s",)) as bar:
        data = load_data(settings, target, loaded, given, partial(report_answers, bar))
    source = states_source(settings, config, target, loaded, data)
    (settings.output / "config.json").write_text(
        json.dumps(dataclasses.asdict(settings), indent=1, default=str) + "\n"
    )
    trained = sum(int(r.loss_mask.sum()) for r in data.train)
    console.print(
        f"{len(data.train)} conversations, {trained:,} answer tokens; {len(data.held_out)} held "
        "out. Slots that cross into another document are not trained on (speculators trains them)."
    )
    target_id = start.target_id
    if target_id is None:
        target_id = frequent_ids(data.train, config.vocab_size, config.draft_vocab_size)
    full = config.draft_vocab_size == config.vocab_size
    frozen = jax.jit(target.frozen)(loaded.params, None if full else jnp.asarray(target_id))
    given_states = (source, loaded.params, frozen)
    params, curve = train(settings, config, target, given_states, start.params, data, console)
    checkpoint = settings.output / "checkpoints" / f"step_{settings.steps}"
    save_draft(checkpoint, config, params, loaded, target_id)
    report = prove(settings, config, target, loaded, frozen, params, data, console)
    reliability = report.pop("reliability")
    report |= {"target": loaded.folder.name, "checkpoint": str(checkpoint), "steps": settings.steps}
    report |= {"command": command(arguments), "machine": machine()}
    write_report(settings.output, report, curve, reliability)
    timed = data.prompts[:TRANSFORMERS_PROMPTS]
    elsewhere = measure_transformers(loaded.folder, timed, settings.answer_tokens)
    if elsewhere is not None:
        report["served"]["greedy"]["transformers"] = elsewhere
        write_report(settings.output, report, curve, reliability)
    closing(console, settings, checkpoint, report, arguments)
    return holds(report["served"])


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that cannot work, before anything expensive."""
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value}; use at least {least}.")
    if not 0 < settings.held_out_share < 1:
        raise ValueError(
            f"held_out_share {settings.held_out_share} is no share; use a number between 0 and 1."
        )
    for name in ("loss_decay", "learning_rate"):
        if getattr(settings, name) <= 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; use a positive number.")
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
    if not settings.loss_weights:
        raise ValueError(
            "loss_ce, loss_tv and loss_kl_div are all 0, so nothing is learnt; weigh one of them."
        )


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
) -> hidden_states.HiddenStates:
    """In process, or from the given files once they are found to be of this data and target."""
    if settings.hidden_states is None:
        return hidden_states.in_process(target)
    files = hidden_states.Files(
        settings.hidden_states, len(config.aux_layer_ids), target.config.hidden_size
    )
    hidden_states.check_files(files, [*data.train, *data.held_out], target, loaded.params)
    return hidden_states.from_files(files)


def train(
    settings: TrainSettings,
    config: DraftConfig,
    target: Target,
    given: tuple[hidden_states.HiddenStates, Any, Frozen],
    params: Any,
    data: Data,
    console: Console,
) -> tuple[Any, list[dict[str, float]]]:
    """The loop over batches: (trained parameters, logged curve)."""
    source, target_params, frozen = given
    optimizer = make_optimizer(settings, params)
    score = make_scorer(target, config, source, settings.max_anchors)
    step = make_step(score, config, optimizer, settings)
    state = TrainState(params, jax.jit(optimizer.init)(params), jnp.int32(0))
    batches = pack(data.train, settings.sequence_length, settings.batch_rows, settings.seed)
    curve: list[dict[str, float]] = []
    seen, started = 0, time.monotonic()
    with (
        (settings.output / "metrics.jsonl").open("w") as log,
        Bar(console, "training", ("loss", "accept_len", "tokens/s")) as bar,
    ):
        for number in range(1, settings.steps + 1):
            packed = next(batches)
            seen += int((packed.document >= 0).sum())
            fetched = source.fetch(packed)
            state, metrics = step(state, target_params, frozen, packed.batch, fetched)
            if number % LOG_EVERY == 0 or number in (1, settings.steps):
                record = _record(metrics, number, seen, time.monotonic() - started)
                if not np.isfinite(record["loss"]):
                    raise ValueError(
                        f"the loss is {record['loss']} at step {number}; lower --learning-rate "
                        f"{settings.learning_rate} or check the hidden states."
                    )
                curve.append(record)
                print(json.dumps(record), file=log, flush=True)
                bar.show(number, settings.steps, record)
    return state.params, curve


def closing(
    console: Console,
    settings: TrainSettings,
    checkpoint: Path,
    report: dict[str, Any],
    arguments: Sequence[str],
) -> None:
    """The last lines: what came out, where it is, what to type next."""
    for name, part in report["served"].items():
        console.print(
            f"{name}: acceptance length {part['acceptance_length']:.2f}, "
            f"{part['tokens_per_second']:.0f} tokens/s against "
            f"{part['plain_tokens_per_second']:.0f} plain ({part['speedup']:.2f}x)"
        )
    elsewhere = report["served"]["greedy"].get("transformers")
    if elsewhere is not None:
        console.print(
            f"transformers' generate on the same files: "
            f"{elsewhere['tokens_per_second']:.0f} tokens/s"
        )
    same = "yes" if holds(report["served"]) else "NO, see the report"
    console.print(f"greedy answers identical to plain decoding: {same}")
    console.print(f"checkpoint {checkpoint}")
    console.print(f"report     {settings.output / 'report.md'}")
    console.print(
        "next       "
        + command(
            [*repeated(arguments), "--warm-start", str(checkpoint), "--steps", "2000"]
            + ["--output", f"{settings.output}-longer"]
        )
    )


def command(arguments: Sequence[str]) -> str:
    """The command line as it can be typed again."""
    return shlex.join(["python", "-m", "dspark_jax.train", *arguments])


def machine() -> str:
    """What the numbers were taken on."""
    device = jax.devices()[0]
    return (
        f"{jax.device_count()} {device.device_kind} ({device.platform}), {os.cpu_count()} CPU "
        f"cores, Python {platform.python_version()}, jax {jax.__version__}"
    )


def repeated(arguments: Sequence[str]) -> list[str]:
    """The command line's flags but those that the closing line gives anew."""
    kept, skip = [], False
    for word in arguments:
        anew = word.split("=")[0] in ("--steps", "--output", "--warm-start")
        if not (anew or skip):
            kept.append(word)
        skip = anew and "=" not in word
    return kept


def report_answers(bar: Bar, done: int, total: int, tokens: int) -> None:
    """Progress of regeneration."""
    bar.show(done, total, {"tokens/s": tokens / max(bar.seconds(), 1e-9)})


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _record(metrics: Any, step: int, seen: int, seconds: float) -> dict[str, float]:
    totals = jax.device_get(metrics)
    means = {
        name.removesuffix("_sum"): float(
            value / max(totals[f"{name.removesuffix('_sum')}_total"], 1e-9)
        )
        for name, value in totals.items()
        if name.endswith("_sum")
    }
    return {"step": float(step), "tokens": float(seen), "tokens/s": seen / seconds, **means}
