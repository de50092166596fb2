"""Regenerated answers: what a stopped run wrote whole is kept, the rest is made again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_jax.train.conversations import Messages, conversation_line
from dspark_jax.train.regenerate import BATCH, complete, keep_whole_batches, unfinished

TEXTS = [f"question {i} é" for i in range(2 * BATCH + 5)]


def conversation(text: str) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]


def make(first: int) -> Iterator[tuple[list[Messages], int]]:
    for start in range(first, len(TEXTS), BATCH):
        yield [conversation(text) for text in TEXTS[start : start + BATCH]], BATCH


def whole() -> list[str]:
    return [conversation_line(conversation(text)) for text in TEXTS]


@pytest.mark.parametrize("lines", [0, 3, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 5])
@pytest.mark.parametrize("half", ["", '{"conversations": [{"fr'])
def test_only_whole_batches_are_kept_and_the_file_ends_as_if_never_stopped(
    lines: int, half: str, tmp_path: Path
):
    path = tmp_path / "train.jsonl"
    unfinished(path).write_text("".join(whole()[:lines]) + half)
    kept = lines // BATCH * BATCH
    assert [count for count, _ in complete(path, TEXTS, make)][0] == kept
    assert path.read_text() == "".join(whole()) and not unfinished(path).exists()


def test_a_run_that_is_killed_again_before_its_first_batch_loses_nothing(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    unfinished(path).write_text("".join(whole()[: BATCH + 3]))
    before = unfinished(path).stat().st_ino
    next(complete(path, TEXTS, make))
    assert unfinished(path).read_text() == "".join(whole()[:BATCH])
    assert unfinished(path).stat().st_ino == before
    assert keep_whole_batches(unfinished(path)) == BATCH
    assert keep_whole_batches(tmp_path / "nothing") == 0
