"""`python -m dspark_jax.plan`: the real command, for chips that are not there."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = "dspark_jax/assets/tiny-glm"
tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed (pip install -e '.[tpu]')",
)
cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="the GPU compiler is not installed (pip install -e '.[cuda]')",
)


def plan(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command; the eight fake devices of the tests are none of its business."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "dspark_jax.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def planned(tmp_path: Path, *flags: str) -> tuple[str, dict]:
    """What a plan that works prints and writes."""
    path = tmp_path / "out" / "plan.json"
    ran = plan("--target", TINY, "--json", str(path), *flags)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, json.loads(path.read_text())


def check_figures(figures: dict) -> None:
    """Figures agree with one another, and no step moves less than any program must."""
    held = figures["bytes_per_device"]
    assert held["total"] == held["weights"] + held["cache"] + held["temporaries"]
    assert figures["fits"] and figures["would_fit"] is None
    for name, step in figures["steps"].items():
        assert 0 < step["spread_floor_bytes"] <= min(step["floor_bytes"], step["bytes"])
        assert step["bytes"] == pytest.approx(step["bytes_above_floor"] * step["floor_bytes"])
        seconds = step["seconds"]
        longest = max(seconds["moving"], seconds["computing"])
        assert seconds["total"] == pytest.approx(longest + seconds["exchanging"])
        yields = figures["acceptance_length"] if name == "speculative" else 1
        rate = figures["batch"] * yields / seconds["total"]
        assert figures["tokens_per_second"][name] == pytest.approx(rate)
        assert figures["tokens_per_second"][f"{name}_floor"] > 0


@tpu
def test_a_tiny_target_is_planned_for_a_tpu(tmp_path: Path):
    flags = ("--mesh", "v5p:2x2x1", "--batch", "8", "--context", "1024")
    shown, figures = planned(tmp_path, *flags, "--acceptance-length", "2")
    check_figures(figures)
    assert (figures["devices"], figures["data_parallel"], figures["tensor_parallel"]) == (4, 2, 2)
    rows = 4 * 1024 * 2
    # Rotary keys of 16 numbers and draft heads of 96 lie 128 wide on a TPU, as kernels read them.
    target = rows * (4 * (96 + 128) + 2 * 32)
    draft = rows * 2 * 128 * 4
    assert figures["bytes_per_device"]["cache"] == target + draft
    assert "It fits" in shown and "tokens/s, at most" in shown and "verify/" in shown


@tpu
@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_would(tmp_path: Path):
    flags = ("--mesh", "v5e:2x2", "--batch", "64", "--context", "262144")
    shown, figures = planned(tmp_path, *flags)
    assert not figures["fits"]
    assert "It does not fit:" in shown and "too much per device. What would:" in shown
    assert figures["would_fit"]["devices"] > 4
    assert 0 < figures["would_fit"]["batch"] < 64


@cuda
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["h200:1x8", "b300:1x8"])
def test_a_tiny_target_is_planned_for_gpus(tmp_path: Path, mesh: str):
    _, figures = planned(tmp_path, "--mesh", mesh, "--batch", "8", "--context", "1024")
    check_figures(figures)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mesh", "h900:1x8"), "chip 'h900' of mesh 'h900:1x8' is unknown"),
        (("--mesh", "tpu7x:4"), "does not say how its chips are arranged"),
        (("--mesh", "v6e:8x8", "--batch", "0"), "batch is 0; use at least 1"),
        (
            ("--mesh", "v6e:8x8", "--tensor-parallel", "3"),
            "tensor_parallel 3 does not divide 64",
        ),
    ],
)
def test_bad_flags_end_with_one_sentence(flags: tuple[str, ...], said: str):
    ran = plan("--target", TINY, *flags)
    assert ran.returncode == 2
    assert said in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_help_needs_no_jax():
    start = time.perf_counter()
    ran = plan("--help")
    assert ran.returncode == 0 and "--acceptance-length" in ran.stdout
    assert time.perf_counter() - start < 10  # under two seconds on a machine that is not busy
    program = "import sys, dspark_jax.plan.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
