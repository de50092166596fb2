"""Two processes of the real command on loopback: one server, and one process's answers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from dspark_jax import calibration_file
from dspark_jax.checkpoints.folder import embedded

FLAGS = ("--max-num-seqs", "1", "--max-model-len", "128", "--port", "0")
FLAGS += ("--tensor-parallel-size", "2", "--per-request-spec-decode-metrics", "detailed")
FIXED = '{"num_speculative_tokens": 2, "enable_adaptive_verification": false}'
"""Few programs, and counters that do not depend on how fast this machine is."""
ASKED = tuple(f'def {name}(self):\n    """Return it."""' for name in ("size", "name"))


def start(devices: int, *flags: str) -> subprocess.Popen[str]:
    """The real command, with fake devices of its own."""
    chosen = () if "--calibrate" in flags else ("--speculative-config", FIXED)
    return subprocess.Popen(
        [sys.executable, "-m", "dspark_jax.serve", *FLAGS, *chosen, *flags],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*more: str) -> list[subprocess.Popen[str]]:
    """Both processes, one device each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id")
    return [start(1, *more, *flags, str(number)) for number in (0, 1)]


def address(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Where a server listens once it is ready, and what it said until then."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        if line.startswith("ready: "):
            return line.split()[1], said
        said.append(line)
    raise AssertionError(f"the server ended with {process.wait()}: {said}")


def ask(url: str, **more: Any) -> list[Any]:
    """(text, what its drafts were worth) of every answer."""
    given = {"model": "tiny-glm", "max_tokens": 24, "temperature": 0, "ignore_eos": True} | more
    replies = [
        httpx.post(f"{url}/v1/completions", json=given | {"prompt": text}, timeout=120)
        for text in ASKED
    ]
    assert all(reply.status_code == 200 for reply in replies), [r.text for r in replies]
    return [(reply.json()["choices"][0]["text"], reply.json()["metrics"]) for reply in replies]


def end(processes: list[subprocess.Popen[str]], seconds: int = 60) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
        return [(p.returncode, *s) for p, s in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_answer_as_one_and_end_with_the_first() -> None:
    alone = start(2)
    url = address(alone)[0]
    wanted = [ask(url, **more) for more in ({}, {"frequency_penalty": 1.5})]
    alone.send_signal(signal.SIGTERM)
    assert end([alone])[0][0] == 0

    both = start_two()
    url, said = address(both[0])
    assert any("1 x 2 devices (data x tensor), 2 processes" in line for line in said), said
    assert [ask(url, **more) for more in ({}, {"frequency_penalty": 1.5})] == wanted
    both[1].send_signal(signal.SIGTERM)  # not its to judge
    assert ask(url) == wanted[0]
    both[0].send_signal(signal.SIGTERM)
    first, second = end(both)
    assert first[0] == second[0] == 0, (first, second)
    assert [line for line in second[1].splitlines() if not line.startswith("[Gloo]")] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_calibrate_a_draft_together(tmp_path: Path) -> None:
    draft, data = tmp_path / "draft", tmp_path / "prompts.jsonl"
    shutil.copytree(embedded("tiny-glm-dspark"), draft)
    (draft / calibration_file.NAME).unlink()
    turns = ({"messages": [{"role": "user", "content": text}]} for text in ASKED)
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    flags = ("--checkpoint", str(draft), "--calibrate", "--data", str(data), "--max-tokens", "24")
    first, second = end(start_two(*flags), seconds=900)
    assert first[0] == second[0] == 0, (first, second)
    assert f"wrote {draft / calibration_file.NAME}" in first[1].replace("\n", "")
    assert calibration_file.read(draft, 8) is not None


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_lost_takes_the_other_with_it(number: int) -> None:
    both = start_two()
    ask(address(both[0])[0])
    both[number].kill()
    code, _, err = end(both)[1 - number]
    # jax sees the first process end as soon as we do, and aborts.
    assert code == 1 or (number == 0 and code == -signal.SIGABRT), err
    assert f"process {number} is gone" in err or code < 0, err
