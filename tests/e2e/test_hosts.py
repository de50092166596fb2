"""Two processes of the real command on loopback: the numbers of one, written once."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.train.loggers import read_records

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
FLAGS = (
    f"--steps {STEPS} --save-every 6 --sequence-length 64 --batch-rows 2 --max-anchors 8 "
    "--conversations 64 --prompt-tokens 48 --answer-tokens 8 --serve-prompts 2 --num-layers 1 "
    "--intermediate-size 64 --markov-rank 8"
).split()
TIMED = ("tokens_per_second", "speedup", "tokens/s", "command", "checkpoint", "machine")
TOLERANCE = 1e-5
"""Largest relative difference; both sides run the same partitioned programs and agreed bit for bit
on a CPU, where only who sums over the devices differs."""


def start(folder: Path, devices: int, *extra: str) -> subprocess.Popen[str]:
    """The real command in `folder`, with fake devices of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dspark_jax.train", *FLAGS, *extra],
        cwd=folder,
        env=os.environ
        | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(folder: Path) -> list[subprocess.Popen[str]]:
    """Both processes, one device each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--output", "two", "--coordinator", f"127.0.0.1:{port}", "--processes", "2")
    return [start(folder, 1, *flags, "--process-id", str(number)) for number in (0, 1)]


def finish(children: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; jax swallows any signal but SIGKILL while it waits."""
    try:
        found = [(child, child.communicate(timeout=500)) for child in children]
        return [(child.returncode, *said) for child, said in found]
    finally:
        for child in children:
            child.kill()


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a report or record but those that are timed or name files."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in items:
            if not (name in TIMED or "seconds" in str(name) or "per_second" in str(name)):
                yield from numbers(part, f"{place}/{name}")
    else:
        yield place, value


def results(output: Path) -> dict[str, Any]:
    """Curve and report, flat."""
    report = json.loads((output / "report.json").read_text())
    return dict(numbers({"curve": read_records(output / "metrics.jsonl"), "report": report}))


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What is not the same in both; floats may differ by the tolerance."""

    def same(a: Any, b: Any) -> bool:
        close = isinstance(a, float) and isinstance(b, float)
        return math.isclose(a, b, rel_tol=TOLERANCE) if close else a == b

    names = ours.keys() | theirs.keys()
    both = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if not same(*pair)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_stopped_by_one_signal_go_on_to_the_numbers_of_one(tmp_path: Path) -> None:
    children = start_two(tmp_path)
    while children[0].poll() is None and not read_records(tmp_path / "two/metrics.jsonl"):
        time.sleep(0.02)
    children[1].send_signal(signal.SIGTERM)
    first, second = finish(children)
    assert first[0] == second[0] == 0, (first, second)
    assert "all saved; to go on: python -m dspark_jax.train" in first[1]
    assert "stopped at" not in second[1]
    reached = int(first[1].split("stopped at step ")[1].split()[0])
    assert reached < STEPS and (tmp_path / "two/checkpoints" / str(reached)).is_dir()

    first, second = finish(start_two(tmp_path))
    assert first[0] == second[0] == 0, (first, second)
    assert f"going on from step {reached} of {STEPS}" in first[1]
    spoken = [line for line in second[1].splitlines() if not line.startswith("[Gloo]")]
    assert spoken == []

    alone = finish([start(tmp_path, 2, "--output", "one")])[0]
    assert alone[0] == 0, alone
    assert differing(results(tmp_path / "two"), results(tmp_path / "one")) == {}
    for name in ("data/train.jsonl", "data/held_out.jsonl"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    assert files(tmp_path / "two") == files(tmp_path / "one")


def files(output: Path) -> set[str]:
    """What a run wrote, but the insides of its checkpoints."""
    found = (path.relative_to(output) for path in output.rglob("*"))
    return {str(path) for path in found if path.parts[0] != "checkpoints" or len(path.parts) < 3}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--process-id 1", "give all of --coordinator HOST:PORT, --processes and --process-id"),
        ("--coordinator localhost:3000 --processes 2 --process-id 2", "process_id 2 is none of 2"),
        ("--coordinator localhost --processes 2 --process-id 1", "is no address"),
        (
            "--coordinator 127.0.0.1:1 --processes 2 --process-id 1 --join-seconds 1",
            "coordinator 127.0.0.1:1 did not answer within 1 s",
        ),
    ],
)
def test_processes_that_cannot_meet_say_so_in_one_sentence(
    tmp_path: Path, flags: str, said: str
) -> None:
    code, out, err = finish([start(tmp_path, 1, "--output", "out", *flags.split())])[0]
    assert code == 2 and said in err and len(err.splitlines()) == 1, out + err
    assert not (tmp_path / "out").exists()
