"""Numbers go to metrics.jsonl always, and to TensorBoard and Weights & Biases as they read them."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.train.loggers import MetricsLog, check_loggers, read_records

ROOT = Path(__file__).resolve().parents[2]


def record(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "loss": 1.0 / step}


def write(output: Path, names: tuple[str, ...], steps: range, from_step: int = 0) -> None:
    log = MetricsLog(output, names, {"seed": 0}, from_step)
    for step in steps:
        log.write(record(step))
    log.write_validation(steps[-1], {"mean_accepted_length": 2.5, "position_accuracy": [0.5]})
    log.close()


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path):
    write(tmp_path, (), range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    write(tmp_path, (), range(4, 8), from_step=3)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert records[0] == record(1)
    assert records[-1]["validation"]["mean_accepted_length"] == 2.5


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What event files hold: records of length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

    found = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_reads_the_same_numbers(tmp_path: Path):
    write(tmp_path, ("tensorboard",), range(1, 4))
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss", 2] == pytest.approx(0.5)
    assert found["validation/mean_accepted_length", 3] == 2.5


def test_weights_and_biases_gets_them_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, ("wandb",), range(1, 4))
    name = (tmp_path / "wandb_run").read_text().strip()
    write(tmp_path, ("wandb",), range(4, 6), from_step=3)
    assert (tmp_path / "wandb_run").read_text().strip() == name
    logs = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
    assert logs and any(b"train/loss" in path.read_bytes() for path in logs)


def test_a_logger_that_is_not_installed_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package wandb.*pip install -e '.\[wandb"):
        check_loggers(["wandb"])


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "--loggers wandb finds no API key; run `wandb login`, or set WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "--loggers wandb cannot be used: WANDB_API_KEY invalid"),
        ({"WANDB_MODE": "nowhere"}, "--loggers wandb cannot be used: "),
        ({"WANDB_API_KEY": "a" * 40}, ""),
        ({"WANDB_MODE": "offline"}, ""),
    ],
)
def test_weights_and_biases_without_a_key_is_refused_at_once(
    variables: dict[str, str], said: str, tmp_path: Path
):
    code = """
from dspark_jax.train.loggers import check_loggers
try:
    check_loggers(["wandb"])
except ValueError as error:
    print("said:", error)
"""
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_SILENT": "true"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | home | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"said: {said}") if said else not done.stdout
    assert len(done.stdout.splitlines()) <= 1


def test_every_line_is_json_of_its_own(tmp_path: Path):
    write(tmp_path, (), range(1, 3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]
