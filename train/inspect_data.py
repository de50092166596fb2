"""`--inspect-data`: what a few rows look like, the tokens that are trained on in colour."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dspark_jax.train.conversations import Row

VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡"}
VISIBLE |= {ord(" "): "·", ord("\t"): "⇥", ord("\n"): "⏎\n"}
"""Whitespace as marks; control characters as their pictures, so that none reaches the terminal."""


def inspect(rows: Sequence[Row], tokenizer: Any, console: Console, count: int = 3) -> None:
    """Print the first `count` rows; without colour, ⟦ and ⟧ enclose what is trained on."""
    colour = console.color_system is not None and not console.no_color
    for number, row in enumerate(islice(rows, count)):
        trained = int(row.loss_mask.sum())
        title = f"row {number}: {len(row.tokens)} tokens, {trained} of them trained on"
        console.print(Text(title, "bold"), soft_wrap=True)
        console.print(shown(row, tokenizer, colour), soft_wrap=True, end="\n\n")


def shown(row: Row, tokenizer: Any, colour: bool) -> Text:
    """A row's text; what reads like markup of rich stays text."""
    text = Text()
    for tokens, trained in runs(row):
        part = tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        ).translate(VISIBLE)
        if trained and not colour:
            part = f"⟦{part}⟧"
        text.append(part, "bold green" if trained else "dim")
    return text


def runs(row: Row) -> Iterator[tuple[np.ndarray, bool]]:
    """Neighbouring tokens that are all trained on or all not; only whole runs decode to whole
    characters."""
    borders = np.flatnonzero(np.diff(row.loss_mask)) + 1
    parts = zip(np.split(row.tokens, borders), np.split(row.loss_mask, borders), strict=True)
    for tokens, mask in parts:
        if len(tokens):
            yield tokens, bool(mask[0])
