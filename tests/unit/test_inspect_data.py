"""`--inspect-data` shows rows as they are, and which of their tokens are trained on."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.target_folder import load_tokenizer
from dspark_jax.train.data import Data, describe, fingerprint
from dspark_jax.train.inspect_data import inspect
from dspark_jax.train.tokenise import Conversation, Row, tokenise

GREEN, DIM, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(embedded("tiny-glm"))


def row(tokenizer: Any, question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tokenise(tokenizer, Conversation(turns))[0]


def printed(rows: list[Row], tokenizer: Any, terminal: bool, count: int = 3) -> str:
    file = io.StringIO()
    system = "standard" if terminal else None
    console = Console(file=file, force_terminal=terminal, color_system=system, width=40)
    inspect(rows, tokenizer, console, count)
    return file.getvalue()


def test_without_colour_brackets_enclose_what_is_trained_on(tokenizer: Any):
    one = row(tokenizer, "[bold]x[/bold] :smile:", "a\tb\n  é∀🙂 [/]")
    assert printed([one], tokenizer, terminal=False) == (
        f"row 0: {len(one.tokens)} tokens, {one.loss_mask.sum()} of them trained on\n"
        "<|user|>[bold]x[/bold]·:smile:<|assistant|>⟦a⇥b⏎\n··é∀🙂·[/]<|endoftext|>⟧\n\n"
    )


def test_on_a_terminal_it_is_coloured(tokenizer: Any):
    text = printed([row(tokenizer, "q", "[red]a")], tokenizer, terminal=True)
    assert f"{DIM}<|user|>q<|assistant|>{RESET}{GREEN}[red]a<|endoftext|>{RESET}" in text
    assert "⟦" not in text


def test_long_lines_are_not_broken_and_control_characters_do_not_reach_the_terminal(
    tokenizer: Any,
):
    text = printed([row(tokenizer, "w " * 100, "\x1b[31mred\r\x07")], tokenizer, terminal=False)
    assert "w·" * 100 in text and "⟦␛[31mred␍␇<|endoftext|>⟧" in text


def test_no_more_rows_than_asked_for_are_shown(tokenizer: Any):
    rows = [row(tokenizer, f"q{i}", "a") for i in range(5)]
    assert printed(rows, tokenizer, terminal=False, count=2).count("⟦") == 2
    assert printed(rows[:1], tokenizer, terminal=False).count("⟦") == 1


def made(lengths: list[int]) -> list[Row]:
    return [Row(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths]


def test_the_description_counts_answers_and_what_is_cut():
    data = Data(made([4, 10, 6]), made([3]), [], "")
    assert describe(data, 10) == (
        "data: 3 training rows of 20 tokens, 50% of them answers to train on; 1 rows held out"
    )
    assert describe(data, 8).endswith(
        "--sequence-length 8 cuts 1 training rows, which lose 2 (20.0%) of the answer tokens"
    )
    assert describe(data._replace(unasked=3, skipped=1), 10).endswith(
        "1 rows held out; 3 conversations began with an answer, which is left out "
        "(1 had no other and are skipped)"
    )


def test_the_fingerprint_sees_tokens_masks_and_borders():
    rows = made([4, 4])
    joined = [Row(np.concatenate([r.tokens for r in rows]), np.concatenate([r[1] for r in rows]))]
    other = [rows[0], rows[1]._replace(loss_mask=~rows[1].loss_mask)]
    found = {fingerprint(x) for x in (rows, joined, other, made([4, 5]))}
    assert len(found) == 4 and fingerprint(made([4, 4])) in found
