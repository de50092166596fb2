"""Signals outside the training loop, and what `--fresh` and `--inspect-data` leave alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_jax.train.conversations import write_conversations
from dspark_jax.train.loggers import read_records

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--steps 4 --save-every 4 --sequence-length 64 --batch-rows 2 --max-anchors 8 "
    "--answer-tokens 8 --serve-prompts 1 --num-layers 1 --intermediate-size 64 --markov-rank 8"
).split()
GO_ON = "to go on: python -m dspark_jax.train "


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    """The real command, in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "dspark_jax.train", *FLAGS, *extra],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=400)
    return child.returncode, out, err


def stop_when(child: subprocess.Popen[str], ready: Callable[[], bool]) -> str:
    """Send SIGTERM once `ready`; returns the last line of a run that ended cleanly."""
    while child.poll() is None and not ready():
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    code, out, err = finish(child)
    assert code == 0 and not err, out + err
    return out.splitlines()[-1]


def reached(output: Path, step: int) -> bool:
    """Whether a step is recorded; its validation comes after."""
    return any(r["step"] == step for r in read_records(output / "metrics.jsonl"))


def files(folder: Path) -> dict[Path, int]:
    """The files in a folder, and when they were written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and `run`: it was begun with --fresh and stopped in its last step's validation."""
    folder = tmp_path_factory.mktemp("stopping")
    conversation = [
        [
            {"role": "user", "content": f"def add_{i}(a, b):"},
            {"role": "assistant", "content": f"    return a + b + {i} * (a - b)\n"},
        ]
        for i in range(12)
    ]
    write_conversations(folder / "d.jsonl", conversation)
    child = start(folder, *("--data", "d.jsonl", "--output", "run", "--fresh", "--no-resume"))
    line = stop_when(child, lambda: reached(folder / "run", 4))
    (folder / "line").write_text(line)
    return folder


@pytest.mark.slow
def test_a_signal_in_the_last_validation_saves_and_skips_the_proof(folder: Path):
    line = (folder / "line").read_text()
    assert line.startswith(f"stopped at step 4 of 4, all saved; {GO_ON}")
    assert line.endswith("--data d.jsonl --output run")  # neither --fresh nor --no-resume
    assert (folder / "run/checkpoints/4").is_dir() and not (folder / "run/draft").exists()


@pytest.mark.slow
def test_files_named_otherwise_and_another_mesh_go_on_and_a_signal_ends_the_proof(folder: Path):
    output = folder / "proof"
    shutil.copytree(folder / "run", output)
    child = start(
        folder,
        *("--data", str(folder / "d.jsonl"), "--target", str(ROOT / "dspark_jax/assets/tiny-glm")),
        *("--data-parallel", "1", "--output", "proof"),
    )
    line = stop_when(child, lambda: (output / "draft/model.safetensors").exists())
    kept = "the trained draft is kept in proof/checkpoints"
    assert line.startswith(f"stopped in the proof, {kept}; {GO_ON}"), line
    assert (output / "checkpoints/4").is_dir()


@pytest.mark.slow
def test_a_signal_while_the_target_answers_keeps_the_answers_and_the_old_run(folder: Path):
    output = folder / "answering"
    shutil.copytree(folder / "run", output)
    before = files(output)
    child = start(folder, *("--conversations", "150", "--output", "answering", "--fresh"))
    line = stop_when(child, (output / "data/train.jsonl.partial").exists)
    kept = "answers made so far are kept in answering/data"
    assert line.startswith(f"stopped before training, {kept}; {GO_ON}")
    assert line.endswith("--fresh")  # nothing is deleted yet
    assert before.items() <= files(output).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--fresh", "--inspect-data"], 0),
        (["--inspect-data", "--markov-rank", "16", "--no-resume"], 0),
        (["--fresh", "--prompt-tokens", "2"], 2),
    ],
    ids=["fresh inspection", "inspection with other settings", "fresh data that will not do"],
)
def test_a_run_is_left_alone_by(folder: Path, flags: list[str], code: int):
    before = files(folder / "run")
    found, out, err = finish(start(folder, "--data", "d.jsonl", "--output", "run", *flags))
    assert found == code, out + err
    assert "⟦" in out if code == 0 else "raise --prompt-tokens" in err
    assert files(folder / "run") == before and not (folder / "run/data").exists()


@pytest.mark.slow
def test_fresh_starts_over_after_a_kill_while_it_deleted_and_cuts_links(folder: Path):
    output, elsewhere = folder / "again", folder / "elsewhere"
    shutil.copytree(folder / "run", output)
    (output / "checkpoints").rename(elsewhere)
    (output / "checkpoints").symlink_to(elsewhere)
    (output / "checkpoints.deleted/4").mkdir(parents=True)
    child = start(folder, *("--data", "d.jsonl", "--output", "again", "--fresh"))
    line = stop_when(child, lambda: not reached(output, 4) and reached(output, 1))
    assert "of 4, all saved" in line and line.endswith("--data d.jsonl --output again")
    assert not (output / "checkpoints").is_symlink() and (elsewhere / "4").is_dir()
    assert not (output / "checkpoints.deleted").exists()


@pytest.mark.slow
def test_answers_of_a_run_are_shown_from_a_copy(folder: Path):
    output = folder / "shown"
    shutil.copytree(folder / "run", output)
    before = files(output)
    flags = ("--conversations", "8", "--markov-rank", "16", "--inspect-data", "--output", "shown")
    code, out, err = finish(start(folder, *flags))
    assert code == 0 and "⟦" in out, out + err
    assert files(output) == before
