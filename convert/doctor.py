"""`doctor`: whether a draft really fits its target, and if not, which reading of its files does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from dspark_jax.checkpoints.folder import resolve
from dspark_jax.convert.evidence import Evidence, gather, load, read_prompts
from dspark_jax.convert.fixes import fixes
from dspark_jax.convert.patient import Patient, open_patient, survived
from dspark_jax.convert.readings import untold
from dspark_jax.convert.settings import Doctor
from dspark_jax.convert.source import read_object
from dspark_jax.convert.verdict import DOUBT, WORTH, Diagnosis, as_json, diagnose, table_rows
from dspark_jax.targets.families import read_config

HEALTHY, ILL = 0, 1
SHOWN_POSITIONS, WIDTH = 8, 124
COUNTS = ("prompt_tokens", "answer_tokens", "blocks", "tensor_parallel")


def examine(given: Doctor) -> tuple[str, int]:
    """What to say, and the exit code: 0 when the draft works and no reading is better.

    Raises ValueError when there is no draft, no target, or they are of different sizes.
    """
    check(given)
    patient = open_patient(given.draft)
    slots, longest = patient.config.block_size, given.prompt_tokens
    if given.answer_tokens < slots:
        raise ValueError(
            f"--answer-tokens {given.answer_tokens} is shorter than a block of {slots} of draft "
            f"{given.draft}; give at least {slots}."
        )
    console, prompts = Console(stderr=True), read_prompts(given.prompts)
    folder = resolve(given.target)
    check_pair(patient, read_config(read_object(folder / "config.json")), folder)
    with console.status("reading the target"):
        ids = patient.config.aux_layer_ids
        near = [j + shift for j in ids for shift in (-1, 0, 1)]
        loaded = load(folder, near, given.tensor_parallel, given.compute_dtype)
    with console.status(f"answering {len(prompts)} prompts"):
        evidence = gather(loaded, prompts, longest, given.answer_tokens, slots, given.blocks)
    with console.status("running the draft under every reading"):
        diagnosis = diagnosis_of(patient, evidence)
    verdict, code = judged(patient, diagnosis)
    if given.json is not None:
        given.json.write_text(json.dumps(report(patient, evidence, diagnosis), indent=2) + "\n")
    return "\n".join([table(diagnosis), *footnotes(patient, evidence), "", *verdict]), code


def check(given: Doctor) -> None:
    """Raise ValueError on numbers that mean nothing and a result that could not be written."""
    for name in COUNTS:
        if getattr(given, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {getattr(given, name)}; give at least 1.")
    if given.json is not None:
        check_writable(given.json)


def check_writable(path: Path) -> None:
    """Raise ValueError when a file cannot be written there."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir():
        what = "is a folder" if path.is_dir() else f"has no folder {folder}"
        raise ValueError(f"--json {path} {what}; give a file in a folder that exists.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--json {path} may not be written; give a file in a folder of your own.")


def diagnosis_of(patient: Patient, evidence: Evidence) -> Diagnosis:
    """Every reading of a draft, on one target's answers."""
    return diagnose(
        lambda reading: survived(patient, evidence, reading),
        patient.as_configured(),
        patient.known(evidence),
        np.asarray(evidence.text.valid),
    )


def check_pair(patient: Patient, target: Any, folder: Any) -> None:
    """Raise ValueError when a draft and a target are not of one size."""
    config, draft = patient.config, patient.opened.folder
    sizes = {
        "vocab_size": (config.vocab_size, target.vocab_size),
        "hidden_size": (config.hidden_size, target.hidden_size),
        "target_hidden_size": (config.target_hidden_size or config.hidden_size, target.hidden_size),
    }
    for name, (ours, theirs) in sizes.items():
        if ours != theirs:
            raise ValueError(
                f"draft {draft} has {name} {ours} but target {folder} has {theirs}; give the "
                "target that the draft was made for."
            )
    ids = config.aux_layer_ids
    if min(ids) < 0 or max(ids) > target.num_hidden_layers:
        wrong = "low" if min(ids) < 0 else "high"
        raise ValueError(
            f"draft {draft} reads aux layers {list(ids)} but target {folder} has "
            f"states 0 to {target.num_hidden_layers}; the ids may be one too {wrong}, or those of "
            "another target."
        )


def judged(patient: Patient, diagnosis: Diagnosis) -> tuple[list[str], int]:
    """The verdict in words, and the exit code."""
    lines = [f"fault: {fault}" for fault in patient.faults]
    for mistake in diagnosis.mistakes:
        gain = mistake.difference
        lines.append(
            f"mistake: {mistake.change.kind}. {mistake.change.what} is better by {gain.mean:.2f} "
            f"± {gain.margin:.2f} accepted drafts a round."
        )
    lines += [f"fix: {fix}" for fix in fixes(patient, diagnosis)]
    if not patient.faults:
        lines += [
            f"note: the draft is no worse {part.change.what}."
            for part in diagnosis.idle_parts
            if diagnosis.reads_its_target
        ]
    length = diagnosis.configured.acceptance_length
    if diagnosis.mistakes:
        kinds = ", ".join(mistake.change.kind for mistake in diagnosis.mistakes)
        return [
            *lines,
            f"verdict: misread ({kinds}); acceptance length {length:.2f} as it is.",
        ], ILL
    if patient.faults:
        return [*lines, f"verdict: damaged weights; acceptance length {length:.2f}."], ILL
    if not diagnosis.reads_its_target:
        said = (
            f"verdict: unusable; acceptance length {length:.2f} is no better than without the "
            "target's states, and no reading tried mends it. It may be untrained, for another "
            "target or revision, or broken in two ways that hide each other."
        )
        return [*lines, said], ILL
    alike = sum(tried.difference.standing == "same" for tried in diagnosis.tried)
    if alike:
        lines.append(
            f"note: {alike} of {len(diagnosis.tried)} other readings do as well: this draft is too "
            "weak, or the blocks are too few, to tell them from it."
        )
    return [*lines, f"verdict: it fits; acceptance length {length:.2f}."], HEALTHY


def table(diagnosis: Diagnosis) -> str:
    """Acceptance by position under every reading."""
    rows = list(table_rows(diagnosis))
    count = min(max(len(tried.by_position) for _, tried in rows), SHOWN_POSITIONS)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("reading", no_wrap=True)
    for position in range(1, count + 1):
        shown.add_column(str(position), justify="right", no_wrap=True)
    for name in ("length", "difference", "±"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    for word, tried in rows:
        cells = [f"{share:.0%}" for share in tried.by_position[:count]]
        cells += [""] * (count - len(cells)) + [f"{tried.acceptance_length:.2f}"]
        compared = word != "configured"
        cells += [f"{x:.2f}" if compared else "" for x in tried.difference]
        style = {"better": "bold red", "configured": "bold"}.get(word)
        shown.add_row(tried.change.what, *cells, word if compared else "", style=style)
    console = Console()
    console.width = max(console.width, WIDTH)  # a table cut short tells nothing
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def footnotes(patient: Patient, evidence: Evidence) -> Iterator[str]:
    """How it was measured, and what it cannot tell."""
    valid = np.asarray(evidence.text.valid)
    yield ""
    yield (
        f"{valid.sum()} blocks of {valid.any(axis=1).sum()} greedy answers; share of blocks whose "
        "first drafts up to this one are the target's own tokens."
    )
    yield (
        f"better: by at least {WORTH} accepted drafts a round and by more than luck gives once in "
        f"{round(1 / DOUBT):,} (± above)."
    )
    for line in untold(patient.as_configured(), patient.known(evidence)):
        yield f"not told: {line}."
    told = patient.told
    for line in (*told.notes, *(f"config.json has {line}" for line in told.misfits)):
        yield f"note: {line}."


def report(patient: Patient, evidence: Evidence, diagnosis: Diagnosis) -> dict[str, Any]:
    """The same for machines."""
    verdict, code = judged(patient, diagnosis)
    return {
        "draft": str(patient.opened.folder),
        "target": str(evidence.loaded.folder),
        "fits": code == HEALTHY,
        "mistakes": [mistake.change.kind for mistake in diagnosis.mistakes],
        "fixes": fixes(patient, diagnosis),
        "faults": list(patient.faults),
        "reads_its_target": diagnosis.reads_its_target,
        "readings": [as_json(word, tried) for word, tried in table_rows(diagnosis)],
        "not_told": list(untold(patient.as_configured(), patient.known(evidence))),
        "verdict": verdict[-1],
    }
