"""The main job: target, data, training, validation, proof, report."""

import dataclasses
import json
import time
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
from dspark_jax.train.data import Data, check_output, frequent_ids, load_data
from dspark_jax.train.files import (
    LoadedTarget,
    embedded,
    load_target,
    mask_token,
    save_draft,
    warm_params,
)
from dspark_jax.train.packing import pack
from dspark_jax.train.progress import Bar
from dspark_jax.train.proof import prove
from dspark_jax.train.report import write_report
from dspark_jax.train.settings import TrainSettings, draft_config
from dspark_jax.train.trainer import TrainState, make_optimizer, make_scorer, make_step
from dspark_jax.types import Frozen, Target

LOG_EVERY = 10


def run(settings: TrainSettings) -> None:
    """Train a draft and prove what it is worth; everything lands in `settings.output`."""
    console = Console(soft_wrap=True)
    check_output(settings.output)
    folder = settings.target or embedded("tiny-glm")
    loaded = load_target(folder, settings.draft.aux_layer_ids)
    config = draft_config(settings.draft, loaded.config, mask_token(loaded))
    check_settings(settings, config)
    params = starting_params(settings, config, loaded, console)
    target = glm_target(loaded.config)
    (settings.output / "config.json").write_text(
        json.dumps(dataclasses.asdict(settings), indent=1, default=str) + "\n"
    )
    console.print(
        f"target {folder.name}: {count(loaded.params):,} parameters; draft {count(params):,} "
        f"({config.draft_length} tokens a round, Markov rank {config.markov_rank}); "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    with Bar(console, "answers", ("tokens/s",)) as bar:
        data = load_data(settings, target, loaded, partial(report_answers, bar, settings))
    trained = sum(int(r.loss_mask.sum()) for r in data.train)
    console.print(
        f"{len(data.train)} conversations, {trained:,} answer tokens; {len(data.held_out)} held "
        "out. Slots that cross into another document are not trained on (speculators trains them)."
    )
    target_id = frequent_ids(data.train, config.vocab_size, config.draft_vocab_size)
    full = config.draft_vocab_size == config.vocab_size
    frozen = jax.jit(target.frozen)(loaded.params, None if full else jnp.asarray(target_id))
    params, curve = train(settings, config, target, loaded, frozen, params, data, console)
    checkpoint = settings.output / "checkpoints" / f"step_{settings.steps}"
    save_draft(checkpoint, config, params, loaded, target_id)
    report = prove(settings, config, target, loaded, frozen, params, data, console)
    reliability = report.pop("reliability")
    report |= {"target": str(folder.name), "checkpoint": str(checkpoint), "steps": settings.steps}
    write_report(settings.output, report, curve, reliability)
    closing(console, settings, checkpoint, report)


def check_settings(settings: TrainSettings, config: DraftConfig) -> None:
    """Refuse settings that cannot work, before anything expensive."""
    if settings.hidden_states is not None and settings.data is None:
        raise ValueError(
            f"--hidden-states {settings.hidden_states} needs --data: files are numbered by the "
            "conversations they were made from; give both."
        )
    if settings.hidden_states is not None and not settings.hidden_states.is_dir():
        raise ValueError(f"--hidden-states {settings.hidden_states} is not a folder; give one.")
    if settings.sequence_length <= config.block_size:
        raise ValueError(
            f"sequence_length {settings.sequence_length} leaves no room for a block of "
            f"{config.block_size}; use a longer one."
        )
    if not settings.loss_weights:
        raise ValueError(
            "loss_ce, loss_tv and loss_kl_div are all 0, so nothing is learnt; weigh one of them."
        )
    if settings.steps < 1:
        raise ValueError(f"steps {settings.steps} trains nothing; use at least 1.")


def starting_params(
    settings: TrainSettings, config: DraftConfig, loaded: LoadedTarget, console: Console
) -> Any:
    """Fresh parameters, or those of `--warm-start`."""
    if settings.warm_start is None:
        return init_draft_params(config, settings.seed)
    params, drawn = warm_params(settings.warm_start, config, loaded.config, settings.seed)
    console.print(
        f"continuing from {settings.warm_start}; drawn afresh: {', '.join(drawn) or 'nothing'}"
    )
    return params


def states_source(
    settings: TrainSettings, config: DraftConfig, target: Target, folder: Path | None
) -> hidden_states.HiddenStates:
    """In process, or from the given files."""
    if folder is None:
        return hidden_states.in_process(target)
    return hidden_states.from_files(folder, len(config.aux_layer_ids), target.config.hidden_size)


def train(
    settings: TrainSettings,
    config: DraftConfig,
    target: Target,
    loaded: LoadedTarget,
    frozen: Frozen,
    params: Any,
    data: Data,
    console: Console,
) -> tuple[Any, list[dict[str, float]]]:
    """The loop over batches: (trained parameters, logged curve)."""
    source = states_source(settings, config, target, settings.hidden_states)
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
            state, metrics = step(state, loaded.params, frozen, packed.batch, fetched)
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
    console: Console, settings: TrainSettings, checkpoint: Path, report: dict[str, Any]
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
    same = report["served"]["greedy"]["identical_to_plain"]
    console.print(f"greedy answers identical to plain decoding: {'yes' if same else 'NO'}")
    console.print(f"checkpoint {checkpoint}")
    console.print(f"report     {settings.output / 'report.md'}")
    console.print(
        f"next       python -m dspark_jax.train --warm-start {checkpoint} --steps 2000 "
        f"--output {settings.output}-longer",
    )


def report_answers(bar: Bar, settings: TrainSettings, done: int, total: int) -> None:
    """Progress of regeneration; answers count as full length."""
    bar.show(done, total, {"tokens/s": done * settings.answer_tokens / max(bar.seconds(), 1e-9)})


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
    return {"step": step, "tokens": seen, "tokens/s": seen / seconds, **means}
