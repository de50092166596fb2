"""Temperatures are found again beside the draft they were written for, and only whole ones."""

from pathlib import Path

import numpy as np
import pytest

from dspark_jax import calibration_file
from dspark_jax.calibrate import Calibration

GIVEN = Calibration(np.array([1.25, 0.5]), np.array([0.1, 0.2]), np.array([0.05, 0.1]), 100)


def found(folder: Path) -> list[float]:
    temperatures = calibration_file.read(folder, 2)
    assert temperatures is not None
    return temperatures.tolist()


def test_what_is_written_is_read(tmp_path: Path):
    assert calibration_file.read(tmp_path, 2) is None
    assert calibration_file.write(tmp_path, GIVEN) == tmp_path / "calibration.json"
    assert found(tmp_path) == GIVEN.temperatures.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "text",
    [
        *('{"temperatures": [1.0]}', '{"temperatures": [1.0, -1.0]}', "{", "[]", "\\udcff"),
        *('{"temperatures": [1.0, NaN]}', '{"temperatures": "hot"}', '{"temperature": [1, 1]}'),
    ],
)
def test_a_broken_file_is_named_and_nothing_else_is_read_from_it(text: str, tmp_path: Path):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/calibration.json does not give 2 positive"):
        calibration_file.read(tmp_path, 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(OSError, match="calibration.json cannot be written .*copy the draft"):
        calibration_file.write(tmp_path / "nowhere", GIVEN)


def test_a_draft_that_is_copied_takes_its_temperatures_along(tmp_path: Path):
    for name in ("from", "to", "bare"):
        (tmp_path / name).mkdir()
    calibration_file.write(tmp_path / "from", GIVEN)
    calibration_file.carry(tmp_path / "from", tmp_path / "to", 2)
    calibration_file.carry(tmp_path / "bare", tmp_path / "bare", 2)
    assert found(tmp_path / "to") == GIVEN.temperatures.tolist()
    assert not list((tmp_path / "bare").iterdir())
