"""Calibration asks the first question of every line, or what a run asked."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark_jax.serve.questions import find_prompts, read_questions


def test_the_first_question_of_every_line_is_read(tmp_path: Path):
    lines: list[Any] = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
        {"prompt": "d"},
    ]
    (tmp_path / "data").write_text("\n\n".join(map(json.dumps, lines)))
    assert read_questions(tmp_path / "data") == ["a", "b", "d"]


@pytest.mark.parametrize(
    "line", ["[]", "{", "3", '{"messages": [{"role": "user"}]}', '{"text": "a"}']
)
def test_a_line_that_asks_nothing_is_named(line: str, tmp_path: Path):
    (tmp_path / "data").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match="data line 2 asks nothing; write"):
        read_questions(tmp_path / "data")


def test_without_a_file_a_runs_own_prompts_are_asked(tmp_path: Path):
    with pytest.raises(ValueError, match="no run's report.json with prompts beside it"):
        find_prompts(None, tmp_path / "draft", SimpleNamespace())
    prompts = [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    (tmp_path / "report.json").write_text(json.dumps({"served": {"greedy": {"prompts": prompts}}}))
    assert find_prompts(None, tmp_path / "draft", SimpleNamespace()) == [(1, 2), (3,)]
