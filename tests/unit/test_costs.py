"""Costs are found again whole and of the same programs, and measured in every other case."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from dspark_jax.serve import costs
from dspark_jax.serve.programs import Shape

FACTS = {"target": "abc", "sizes": {"slots": 2, "chunks": [8]}}
SECONDS = {Shape(1, 1, 4, False): 0.25, Shape(1, 5, 4, False): 0.5}


class Clock:
    """What measures, and how often it did."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[Shape, float]:
        self.times += 1
        return dict(SECONDS)


def known(
    folder: Path, clock: Clock, facts: Mapping[str, object] = FACTS, again: bool = False
) -> str:
    found, note = costs.known(folder, facts, list(SECONDS), clock, again)
    assert found == SECONDS
    return note


def test_what_was_measured_is_found_again(tmp_path: Path):
    clock = Clock()
    assert "measured, and kept" in known(tmp_path / "new", clock)
    assert "those kept" in known(tmp_path / "new", clock) and clock.times == 1
    assert len(list((tmp_path / "new").iterdir())) == 1
    known(tmp_path / "new", clock, again=True)
    known(tmp_path / "new", clock, FACTS | {"target": "other"})
    assert clock.times == 3


@pytest.mark.parametrize(
    "change",
    [
        {"made_for": {"target": "abc"}},
        {"seconds": []},
        {"seconds": [[1, 1, 4, 0.25], [1, 5, 4, -0.5]]},
        {"seconds": [[1, 1, 4, 0.25], [1, 5, 4, float("nan")]]},
        {"seconds": [[1, 1, 4, 0.25], [1, 6, 4, 0.5]]},
        {"seconds": [[1, 1, 4, 0.25], [1, 5]]},
        {"seconds": {"a": 1}},
        {"seconds": [[1, 1, 4, 0.25], [1, 5, 4, "fast"]]},
    ],
)
def test_a_file_that_is_not_whole_or_of_other_programs_is_measured_again(
    change: dict[str, object], tmp_path: Path
):
    clock = Clock()
    known(tmp_path, clock)
    path = costs.path_in(tmp_path, FACTS)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "measured, and kept" in known(tmp_path, clock) and clock.times == 2
    assert "those kept" in known(tmp_path, clock)
    path.write_bytes(b"\xff{")
    known(tmp_path, clock)
    assert clock.times == 3


def test_a_folder_that_cannot_be_written_is_said_and_nothing_fails(tmp_path: Path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    assert "cannot be kept" in known(tmp_path / "file", clock) and clock.times == 1
