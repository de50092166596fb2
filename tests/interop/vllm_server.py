"""A real vLLM server on a CPU, started as a draft's card says, and what it answers."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
START_SECONDS = 600
ANSWER_SECONDS = 600
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": str(HERE / "cpu_triton"),
    "TRITON_INTERPRET": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
"""What a CPU needs: Triton's interpreter under the one model runner that knows DSpark."""
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--per-request-spec-decode-metrics", "detailed", "--host", "127.0.0.1"),
)


class Served(NamedTuple):
    """An answer, and how many drafts every step proposed and kept."""

    tokens: list[int]
    accepted: list[int]
    drafted: list[int]


class Server(NamedTuple):
    """Where a running server listens, and what it calls its target."""

    url: str
    model: str

    def complete(self, prompt: list[int], max_tokens: int) -> Served:
        """The greedy answer to a prompt of token ids, past every end token."""
        asked = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
            said: dict[str, Any] = json.load(reply)
        metrics = said["metrics"]["speculative_decoding"]
        steps = metrics["per_step_accepted"], metrics["per_step_drafted"]
        return Served(said["choices"][0]["token_ids"], *steps)


def serve_command(card: Path) -> list[str]:
    """The `vllm serve` command of a draft's card."""
    (command,) = (x for x in card.read_text().splitlines() if x.startswith("vllm serve "))
    return shlex.split(command)


@contextmanager
def serving(environment: Path, target: Path, draft: Path, log: Path) -> Iterator[Server]:
    """The server of the draft's card, with the target's folder for its hub id, until it is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, command, _, *options = serve_command(draft / "README.md")
    whole = [environment / "bin" / program, command, target, *options, *FLAGS, "--port", port]
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    with log.open("w") as said:
        process = subprocess.Popen(
            [str(word) for word in whole],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"PATH": path},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, process, log)
        yield Server(url, str(target))
    finally:
        stop(process)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server is healthy; RuntimeError with its last words when it ends or hangs."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:  # urllib's own errors are such, and nobody listens at first
            time.sleep(1)
    raise RuntimeError(f"vLLM did not start, {log} ends:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes it started."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
