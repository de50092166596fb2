"""A yardstick that cannot be had is a note; it never ends a finished run."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.checkpoints.fingerprint import RECORD
from dspark_jax.checkpoints.folder import embedded
from dspark_jax.train import transformers_speed
from dspark_jax.train.transformers_speed import LARGEST_BYTES, measure_transformers, obstacle

TINY = embedded("tiny-glm")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A copy of the embedded target."""
    shutil.copy(TINY / "config.json", tmp_path)
    shutil.copy(TINY / "model.safetensors", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def pretend_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def noted(folder: Path) -> str:
    """The one note of a measurement that gives nothing."""
    notes: list[str] = []
    assert measure_transformers(folder, [], 8, notes.append) is None
    (note,) = notes
    return note


def test_without_torch_nothing_is_said(target: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert measure_transformers(target, [], 8, pytest.fail) is None


def test_orbax_arrays_are_not_timed(target: Path):
    (target / RECORD).write_text("{}")
    assert "not timed" in noted(target) and "Orbax arrays" in noted(target)


def test_a_quantised_target_is_not_timed(target: Path):
    described = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(described | {"quantization_config": FP8}))
    assert "is quantised" in noted(target)


def test_a_large_target_is_not_timed(target: Path, monkeypatch: pytest.MonkeyPatch):
    assert obstacle(target) is None and LARGEST_BYTES == 2_000_000_000
    monkeypatch.setattr(transformers_speed, "LARGEST_BYTES", 10_000_000)
    assert "bytes in float32, more than 10,000,000" in noted(target)


def test_a_failure_is_a_note(target: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(transformers_speed, "generate_speed", fail)
    assert noted(target).endswith("RuntimeError: no kernel for this.")
