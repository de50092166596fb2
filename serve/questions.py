"""The prompts of `--calibrate`: the first questions of a file, or those that a run served."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_jax.serve.terminal import prompt_tokens

Prompts = list[tuple[int, ...]]


def find_prompts(data: Path | None, folder: Path, tokenizer: Any) -> Prompts:
    """Of `--data`, else those that the draft's run served at its end; ValueError without either."""
    if data is not None:
        questions = read_questions(data)
        return [prompt_tokens(tokenizer, text) for text in questions]
    report = folder.parent / "report.json"
    try:
        served = json.loads(report.read_text())["served"]["greedy"]["prompts"]
        return [tuple(prompt["prompt_token_ids"]) for prompt in served]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"draft {folder} has no run's report.json with prompts beside it; give some with "
            "--data FILE, a JSONL file of conversations."
        ) from error


def read_questions(path: Path) -> list[str]:
    """The first question of every line of a JSONL file; ValueError with file and line.

    A line is {"messages": …}, {"conversations": …} or {"prompt": "…"}.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data {path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(next(_questions(json.loads(line))))
        except (ValueError, AttributeError, TypeError, RecursionError, StopIteration) as error:
            raise ValueError(
                f'{path} line {number} asks nothing; write {{"messages": [{{"role": "user", '
                '"content": "…"}]}, {"conversations": [{"from": "human", "value": "…"}]} or '
                '{"prompt": "…"}.'
            ) from error
    return found


def _questions(value: Any) -> Iterator[str]:
    if isinstance(value.get("prompt"), str):
        yield value["prompt"]
    for turn in value.get("messages", value.get("conversations", ())):
        said = turn.get("content", turn.get("value"))
        if turn.get("role", turn.get("from")) in ("user", "human") and isinstance(said, str):
            yield said
