"""Conversations on disk: JSONL in, token rows with the trained tokens marked out."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.train.messages import messages_of, tools_of
from dspark_jax.train.tokenise import Conversation, Messages, Row, render, tokenise


class Tokenised(NamedTuple):
    """A line of tokens already made, not yet compared with a tokenizer."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    where: str


Example = Conversation | Tokenised


def read_conversations(path: Path) -> list[Example]:
    """Every line of a JSONL file, or of every *.jsonl in a folder in name order.

    A line is one of these, and a file may mix them:
    {"conversations": [{"from": "human", "value": …}, …]}, ShareGPT's;
    {"messages": [{"role": …, "content": …}, …], "tools": […]}, OpenAI's;
    {"input_ids": [int, …], "loss_mask": [0 or 1, …]}, tokens.
    Answers before the first question or system turn are left out and counted in `unasked`.
    Raises ValueError with file and line.
    """
    if not path.exists():
        raise ValueError(f"data {path} does not exist; give a JSONL file or a folder of them.")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"data {path} holds no *.jsonl file; give a JSONL file or a folder of them."
        )
    examples = [_example(*line) for file in files for line in _lines(file)]
    if not examples:
        raise ValueError(f"data {path} holds no conversation; every line is one JSON object.")
    return examples


def write_conversations(path: Path, conversations: Iterable[Messages]) -> None:
    """Write plain turns in the first format that `read_conversations` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(conversation_line, conversations))


def conversation_line(messages: Messages) -> str:
    """One conversation of plain turns as a line of JSONL."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    return json.dumps({"conversations": turns}) + "\n"


def tokenise_all(tokenizer: Any, examples: Sequence[Example], what: Path | str) -> list[Row]:
    """Rows of all examples, in order: of a conversation as many as `tokenise` makes.

    Hidden-state files are numbered by these rows, which are one a line unless a template rewrites
    earlier turns or a conversation has no answer. Raises ValueError with file and line.
    """
    rows: list[Row] = []
    vocab_size = len(tokenizer)
    for number, example in enumerate(examples, 1):
        where = example.where or f"conversation {number} of {what}"
        if isinstance(example, Tokenised):
            rows.append(_row(example, vocab_size))
            continue
        try:
            rows += tokenise(tokenizer, example)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"{where} cannot be used: {error}") from error
    if not rows:
        raise ValueError(
            f"none of {len(examples)} {what} has a trainable token; each needs an assistant turn "
            "whose weight is not 0."
        )
    return rows


def check_trainable(rows: Sequence[Row], length: int, what: str) -> None:
    """Raise ValueError when no row has a trained token among its first `length`."""
    if not any(row.loss_mask[:length].any() for row in rows):
        raise ValueError(
            f"none of {len(rows)} rows of the {what} has a trainable token among its first "
            f"{length}; each needs an assistant turn, and --sequence-length must reach a block "
            "beyond the prompts."
        )


def prompt_tokens(
    tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None = None
) -> np.ndarray:
    """The first user turn, ready for an answer."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    text = render(tokenizer, messages[: first + 1], tools, True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data {file} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON: {error}; write one object a line."
                ) from None
            except RecursionError:
                raise ValueError(
                    f"{where} is nested too deeply to be read; write one object of flat turns a "
                    "line."
                ) from None


def _example(where: str, value: Any) -> Example:
    if isinstance(value, Mapping) and "input_ids" in value:
        return _tokenised(where, value)
    turns = None
    if isinstance(value, Mapping):
        turns = value.get("conversations", value.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f'{where} has neither "conversations", "messages" nor "input_ids"; write '
            '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}.'
        )
    messages, untrained = messages_of(where, turns, value.get("system"))
    asked = (i for i, m in enumerate(messages) if m["role"] in ("user", "system"))
    begin = next(asked, len(messages))
    return Conversation(
        messages[begin:],
        tools_of(where, value.get("tools")),
        frozenset(i - begin for i in untrained if i >= begin),
        where,
        unasked=begin,
    )


def _tokenised(where: str, value: Mapping[str, Any]) -> Tokenised:
    tokens, mask = _integers(value["input_ids"]), _integers(value.get("loss_mask"))
    if tokens is None or mask is None or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f'{where} has no proper "input_ids" and "loss_mask"; write two lists of one length, '
            "token ids and for each 1 (trained on) or 0."
        )
    if len(tokens) != len(mask):
        raise ValueError(
            f"{where} has {len(tokens)} input_ids but a loss_mask of {len(mask)}; give one number "
            "for each token."
        )
    return Tokenised(tokens, mask.astype(bool), where)


def _integers(value: Any) -> np.ndarray | None:
    """The list as an array, None when it is none of whole numbers."""
    if not isinstance(value, list) or not all(isinstance(x, int) for x in value[:1]):
        return None
    try:
        found = np.array(value)
    except ValueError:  # lists within it
        return None
    return found if found.ndim == 1 and found.dtype.kind in "iub" else None


def _row(given: Tokenised, vocab_size: int) -> Row:
    wrong = given.tokens[(given.tokens < 0) | (given.tokens >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"{given.where} has token {wrong[0]}, but the tokenizer has {vocab_size} tokens; make "
            "the rows with this target's tokenizer."
        )
    return Row(given.tokens.astype(np.int32), given.loss_mask)
