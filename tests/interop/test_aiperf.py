"""aiperf, a load generator, measures the real server: every request answered, no token missing.

`pip install aiperf` in an environment of its own, which takes 100 packages; DSPARK_JAX_AIPERF names
its folder. Without it this test is skipped.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_jax.checkpoints.folder import embedded

ENVIRONMENT = Path(os.environ.get("DSPARK_JAX_AIPERF", "nowhere")).resolve()
REQUESTS, ANSWER_TOKENS = 24, 32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ENVIRONMENT / "bin/aiperf").exists(),
        reason="no aiperf: `pip install aiperf` in an environment that DSPARK_JAX_AIPERF names",
    ),
]


def test_every_request_of_a_load_is_answered_whole(tmp_path: Path) -> None:
    flags = ("--port", "0", "--max-num-seqs", "4", "--max-model-len", "512")
    server = subprocess.Popen(
        [sys.executable, "-m", "dspark_jax.serve", *flags], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    ready = next(line for line in server.stdout if line.startswith("ready: "))
    load = subprocess.run(
        [
            *(ENVIRONMENT / "bin/aiperf", "profile", "--url", ready.split()[1]),
            *("-m", "tiny-glm", "--tokenizer", embedded("tiny-glm")),
            *("--endpoint-type", "chat", "--streaming", "--ui-type", "none"),
            *("--concurrency", "4", "--request-count", str(REQUESTS)),
            *("--isl", "64", "--osl", str(ANSWER_TOKENS), "--extra-inputs", "ignore_eos:true"),
            *("--artifact-dir", tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert load.returncode == 0, load.stdout + load.stderr
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == REQUESTS and not found["error_summary"]
    assert found["request_error_rate"]["avg"] == 0
    assert found["total_usage_completion_tokens"]["avg"] == REQUESTS * ANSWER_TOKENS
