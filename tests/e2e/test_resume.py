"""A run that is killed, stopped or disturbed loses nothing: the real command, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.train.conversations import write_conversations
from dspark_jax.train.loggers import read_records
from dspark_jax.train.packing import Packed
from dspark_jax.train.training import Recent
from dspark_jax.types import Batch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
FLAGS = [
    *("--steps", STEPS, "--sequence-length", 128, "--max-anchors", 8, "--batch-rows", 2),
    *("--save-every", 3, "--validation-batches", 1, "--serve-prompts", 1, "--answer-tokens", 16),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and one run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("shared")
    names = [f"add_{i}" for i in range(120)]
    write_conversations(
        folder / "data.jsonl",
        [
            [
                {"role": "user", "content": f"def {name}(a, b):"},
                {
                    "role": "assistant",
                    "content": f"    return a + b + {i} * (a - b)\n" * (i % 4 + 1),
                },
            ]
            for i, name in enumerate(names)
        ],
    )
    done = start(folder, folder / "whole").communicate(timeout=400)
    assert (folder / "whole/report.json").exists(), done
    return folder


def start(shared: Path, output: Path, *extra: Any, data: bool = True) -> subprocess.Popen[str]:
    flags = [*FLAGS, "--output", output, *extra]
    flags += ["--data", shared / "data.jsonl"] if data and "--data" not in extra else []
    return subprocess.Popen(
        [sys.executable, "-m", "dspark_jax.train", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=400)
    return child.returncode, out, err


def curve(output: Path) -> list[dict[str, Any]]:
    """Everything recorded but the speed."""
    return [{k: v for k, v in r.items() if k != "tokens/s"} for r in read_records(metrics(output))]


def metrics(output: Path) -> Path:
    return output / "metrics.jsonl"


def wait_for(child: subprocess.Popen[str], output: Path, records: int) -> None:
    """Until the run has written that many records."""
    while child.poll() is None and len(read_records(metrics(output))) < records:
        time.sleep(0.02)


def kill_often(shared: Path, output: Path, kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        child = start(shared, output)
        wait_for(child, output, len(read_records(metrics(output))) + int(rng.integers(0, 3)))
        try:
            child.wait(timeout=rng.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
        child.communicate()


def same_end(shared: Path, output: Path) -> None:
    assert curve(output) == curve(shared / "whole")
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == sorted(
        p.name for p in (shared / "whole/checkpoints").iterdir()
    )
    weights = "draft/model.safetensors"
    assert (output / weights).read_bytes() == (shared / "whole" / weights).read_bytes()


@pytest.mark.slow
def test_a_run_killed_at_many_random_moments_ends_as_if_nothing_had_happened(
    shared: Path, tmp_path: Path
):
    kill_often(shared, tmp_path, 12, seed=1)
    code, out, err = finish(start(shared, tmp_path))
    assert code == 0, out + err
    same_end(shared, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_the_same_command_goes_on(
    shared: Path, tmp_path: Path, number: signal.Signals
):
    child = start(shared, tmp_path)
    wait_for(child, tmp_path, 3)
    child.send_signal(number)
    code, out, err = finish(child)
    assert code == 0 and not err, err
    assert f"of {STEPS}, all saved; to go on: python -m dspark_jax.train" in out
    reached = int(out.split("stopped at step ")[1].split()[0])
    assert (tmp_path / "checkpoints" / str(reached)).is_dir()
    code, out, err = finish(start(shared, tmp_path))
    assert code == 0 and f"going on from step {reached} of {STEPS}" in out, out + err
    assert curve(tmp_path) == curve(shared / "whole")


def refused(shared: Path, output: Path, *extra: Any) -> str:
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    code, out, err = finish(start(shared, output, *extra))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, out + err
    after = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    changed = {p.name for p in before if before[p] != after.get(p)}
    assert changed <= {"config.json", "metrics.jsonl"}, changed
    return err


@pytest.mark.slow
def test_another_runs_folder_and_changed_data_are_refused(shared: Path, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(shared / "whole", output)
    error = refused(shared, output, "--loss-decay", 5, "--markov-rank", 32)
    assert "draft.markov_rank is 32 here and 64 there" in error
    assert "loss.loss_decay is 5.0 here and 4.0 there" in error and "--fresh" in error
    data = tmp_path / "data.jsonl"
    shutil.copy(shared / "data.jsonl", data)
    code, out, err = finish(start(shared, tmp_path / "other", "--data", data, "--steps", 3))
    assert code == 0, out + err
    data.write_text(data.read_text().replace("add_3(", "sub_3("))
    error = refused(shared, tmp_path / "other", "--data", data, "--steps", 3)
    assert "the data changed since the run in" in error
    code, out, err = finish(
        start(shared, tmp_path / "other", "--data", data, "--steps", 3, "--fresh")
    )
    assert code == 0, out + err


@pytest.mark.slow
def test_a_config_can_be_passed_back_and_a_misspelt_setting_is_refused(
    shared: Path, tmp_path: Path
):
    config = shared / "whole/config.json"
    output = tmp_path / "again"
    child = start(shared, output, "--config", config, "--output", output)
    assert finish(child)[0] == 0
    same_end(shared, output)
    values = json.loads(config.read_text())
    values["optimizer"]["learning_rat"] = values["optimizer"].pop("learning_rate")
    (tmp_path / "wrong.json").write_text(json.dumps(values))
    error = finish(start(shared, tmp_path / "x", "--config", tmp_path / "wrong.json"))[2]
    assert "'optimizer.learning_rat' that does not exist; did you mean 'learning_rate'?" in error


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_the_run_ends_the_same(shared: Path, tmp_path: Path):
    child = start(shared, tmp_path)
    wait_for(child, tmp_path, 8)
    child.send_signal(signal.SIGTERM)
    finish(child)
    newest = max((p for p in (tmp_path / "checkpoints").iterdir()), key=lambda p: int(p.name))
    for path in (newest / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, out, err = finish(start(shared, tmp_path))
    assert code == 0, out + err
    assert f"checkpoint {newest.name} cannot be read and is skipped" in out
    assert curve(tmp_path) == curve(shared / "whole")


@pytest.mark.slow
def test_weights_that_are_no_numbers_stop_the_run_and_are_never_saved(shared: Path, tmp_path: Path):
    code, out, err = finish(start(shared, tmp_path, "--learning-rate", 1e30, "--save-every", 1))
    assert code == 2, out + err
    assert "error: the validation loss is nan after step 1; no checkpoint was made before" in err
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loss_that_is_no_number_names_its_step_and_rows():
    recent = Recent()
    batch = Batch(*(jnp.zeros((1, 4), jnp.int32) for _ in Batch._fields))
    for step, loss in ((7, 1.0), (8, float("nan"))):
        recent.add(step, {"loss_sum": loss}, Packed(batch, np.array([[step, step, 2, -1]])))
    with pytest.raises(ValueError) as raised:
        recent.checked("checkpoint 6 is kept")
    message = str(raised.value)
    assert "the loss is nan at step 8, whose batch held rows 2, 8 of the data" in message
    assert "checkpoint 6 is kept" in message


@pytest.mark.slow
def test_a_kill_while_the_target_answers_keeps_its_answers(shared: Path, tmp_path: Path):
    flags = ("--conversations", 150, "--inspect-data")
    for name in ("whole", "killed"):
        child = start(shared, tmp_path / name, *flags, data=False)
        growing = tmp_path / name / "data/train.jsonl.partial"
        while name == "killed" and child.poll() is None:
            if growing.exists() and growing.read_text().count("\n") >= 64:
                child.send_signal(signal.SIGKILL)
        child.communicate()
    assert growing.exists()
    kept = growing.read_text()
    code, out, err = finish(start(shared, tmp_path / "killed", *flags, data=False))
    assert code == 0 and "tokens, " in out and "⟦" in out, out + err
    for name in ("train", "held_out"):
        files = [tmp_path / run / f"data/{name}.jsonl" for run in ("whole", "killed")]
        assert files[0].read_text() == files[1].read_text()
    assert files[1].with_name("train.jsonl").read_text().startswith(kept[: kept.rindex("\n")])


@pytest.mark.slow
def test_a_run_is_not_touched_with_no_resume(shared: Path):
    assert "holds a run and --no-resume is given" in refused(
        shared, shared / "whole", "--no-resume"
    )


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(shared: Path, tmp_path: Path):
    first = start(shared, tmp_path)
    wait_for(first, tmp_path, 1)
    code, _, err = finish(start(shared, tmp_path))
    assert code == 2 and "another process is training in" in err
    first.send_signal(signal.SIGKILL)
    first.communicate()
