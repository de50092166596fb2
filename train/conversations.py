"""Conversations on disk: JSONL in, token rows with the trained tokens marked out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"

Messages = list[dict[str, str]]


class Row(NamedTuple):
    """One tokenised conversation; `loss_mask` is true on the tokens of answers."""

    tokens: np.ndarray
    loss_mask: np.ndarray


def read_conversations(path: Path) -> list[Messages]:
    """All conversations of a JSONL file, or of every *.jsonl in a folder in name order.

    A line is {"conversations": [{"from": "human", "value": …}, …]} or {"messages": [{"role": …,
    "content": …}, …]}; either list may use either spelling. Raises ValueError with file and line.
    """
    if not path.exists():
        raise ValueError(f"data {path} does not exist; give a JSONL file or a folder of them.")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"data {path} holds no *.jsonl file; give a JSONL file or a folder of them."
        )
    conversations = [_conversation(*line) for file in files for line in _lines(file)]
    if not conversations:
        raise ValueError(f"data {path} holds no conversation; every line is one JSON object.")
    return conversations


def write_conversations(path: Path, conversations: Iterable[Messages]) -> None:
    """Write the format that `read_conversations` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations:
            turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
            file.write(json.dumps({"conversations": turns}) + "\n")


def tokenise(tokenizer: Any, messages: Messages) -> Row:
    """Render with the chat template and mark what the assistant wrote.

    An answer is what a turn adds to the rendering that ends in the generation prompt, its end
    token included; no pattern of the template is assumed.
    """
    full = _render(tokenizer, messages, False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:i], True)
            after = _render(tokenizer, messages[: i + 1], False)
            if not (after.startswith(before) and full.startswith(after)):
                raise ValueError(
                    "the chat template rewrites earlier turns when later ones follow, so the "
                    f"answer of turn {i + 1} has no place of its own; use a template that appends."
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    mask = np.zeros(len(starts), bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    return Row(np.array(encoded["input_ids"], np.int32), mask)


def tokenise_all(tokenizer: Any, conversations: Sequence[Messages], path: Path | str) -> list[Row]:
    """Rows of all conversations; ValueError names one that the chat template refuses."""
    rows = []
    for number, messages in enumerate(conversations, 1):
        try:
            rows.append(tokenise(tokenizer, messages))
        except (TemplateError, ValueError) as error:
            raise ValueError(f"conversation {number} of {path} cannot be used: {error}") from error
    return rows


def check_trainable(rows: Sequence[Row], length: int, what: str) -> None:
    """Raise ValueError when no row has a trained token among its first `length`."""
    if not any(row.loss_mask[:length].any() for row in rows):
        raise ValueError(
            f"none of {len(rows)} {what} has a trainable token among its first {length}; each "
            "needs an assistant turn, and --sequence-length must reach a block beyond the prompts."
        )


def prompt_tokens(tokenizer: Any, messages: Messages) -> np.ndarray:
    """The first user turn, ready for an answer."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    text = _render(tokenizer, messages[: first + 1], True)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _render(tokenizer: Any, messages: Messages, prompt: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _lines(file: Path) -> Iterable[tuple[str, Any]]:
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


def _conversation(where: str, value: Any) -> Messages:
    turns = None
    if isinstance(value, Mapping):
        turns = value.get("conversations", value.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f'{where} has no list "conversations" or "messages"; write '
            '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}.'
        )
    messages = [_message(where, turn) for turn in turns]
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where} begins with an answer; begin with a human or system turn.")
    return messages


def _message(where: str, turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} has a turn that is {type(turn).__name__}, not an object.")
    role = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise ValueError(
            f"{where} has a turn with role {role!r} and text of type {type(content).__name__}; "
            f"roles are {', '.join(ROLES)} and the text is a string."
        )
    return {"role": ROLES[role], "content": content}
