"""The end of a run: its draft is written, proved and reported."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from dspark_jax import calibration_file
from dspark_jax.hosts import fetch, from_first, leading
from dspark_jax.target_folder import LoadedTarget
from dspark_jax.train.command_line import command, going_on
from dspark_jax.train.data import Data
from dspark_jax.train.draft_files import save_draft
from dspark_jax.train.loggers import read_records
from dspark_jax.train.proof import prove
from dspark_jax.train.report import write_report
from dspark_jax.train.settings import TrainSettings
from dspark_jax.train.summary import machine
from dspark_jax.train.trainer import Job
from dspark_jax.train.training import Trained
from dspark_jax.train.transformers_speed import measure_transformers

TRANSFORMERS_PROMPTS = 8


def finish(
    job: Job,
    loaded: LoadedTarget,
    target_id: np.ndarray,
    trained: Trained,
    data: Data,
    arguments: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Write the draft, prove it, calibrate it, write the report."""
    settings, folder = job.settings, job.settings.output / "draft"
    params = fetch(trained.params)
    from_first(lambda: save_draft(folder, job.config, params, loaded, target_id))
    report = prove(job, loaded, trained.params, data, console)
    reliability, calibration = report.pop("reliability"), report["calibration"]
    if calibration is not None:
        from_first(lambda: str(calibration_file.write(folder, calibration)))
        report["calibration"] = calibration_file.described(calibration)
    report |= {"target": loaded.folder.name, "checkpoint": str(folder), "steps": trained.best}
    report |= {"command": command(going_on(arguments)), "machine": machine()}
    if leading():
        publish(settings, report, reliability, loaded, data, partial(console.print, markup=False))
    return report


def publish(
    settings: TrainSettings,
    report: dict[str, Any],
    reliability: dict[str, list[float]],
    loaded: LoadedTarget,
    data: Data,
    say: Callable[[str], None],
) -> None:
    """Write the report; where transformers can be timed, once more with its speed."""
    records = read_records(settings.output / "metrics.jsonl")
    curve = [record for record in records if "validation" not in record]
    write_report(settings.output, report, curve, reliability)
    timed = data.prompts[:TRANSFORMERS_PROMPTS]
    elsewhere = measure_transformers(loaded.folder, timed, settings.answer_tokens, say)
    if elsewhere is not None:
        report["served"]["greedy"]["transformers"] = elsewhere
        write_report(settings.output, report, curve, reliability)
