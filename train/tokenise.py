"""A conversation through a chat template: token rows with what the assistant wrote marked out."""

from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

Messages = list[dict[str, Any]]


class Conversation(NamedTuple):
    """Turns and tools as chat templates take them; the answers in `untrained` are only read.

    `where` is the file and line it came from. `unasked` counts the turns left out at its beginning
    because they answer nothing.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    where: str = ""
    unasked: int = 0


class Row(NamedTuple):
    """Tokens (int32) to train on; `loss_mask` is true on the tokens of answers."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class Rendered(NamedTuple):
    """A text and the [begin, end) of its answers that are trained on, in characters."""

    text: str
    answers: list[tuple[int, int]]


def tokenise(tokenizer: Any, conversation: Conversation) -> list[Row]:
    """The rows of a conversation: one, or several where its template rewrites earlier turns.

    A token is trained on when it holds a character of an answer. Turns after the last answer are
    left out, and so is a row whose answers are all untrained.
    """
    rows = []
    for text, answers in rendered(tokenizer, conversation):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begins), bool)
        for begin, end in answers:
            mask |= (ends > begin) & (begins < end)
        rows.append(Row(np.array(encoded["input_ids"], np.int32), mask))
    return [row for row in rows if row.loss_mask.any()]


def rendered(tokenizer: Any, conversation: Conversation) -> list[Rendered]:
    """Every answer once, after exactly the text the template puts before it when it is asked for.

    An answer is what a turn adds to the rendering that ends in the generation prompt, its end
    token included; no pattern of the template is assumed. Answers share a text as long as each
    rendering begins with the one before. Templates of reasoning models drop the thinking of
    earlier turns once the user speaks again; there the next text begins.
    """
    messages, tools = conversation.messages, conversation.tools
    found: list[Rendered] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = render(tokenizer, messages[: i + 1], tools, False)
        answer = (answer_begin(tokenizer, conversation, i, text), len(text))
        answers = [] if i in conversation.untrained else [answer]
        if found and text.startswith(found[-1].text):
            found[-1] = Rendered(text, found[-1].answers + answers)
        else:
            found.append(Rendered(text, answers))
    return found


def answer_begin(tokenizer: Any, conversation: Conversation, turn: int, text: str) -> int:
    """Where the answer of a turn begins in the rendering `text` that it ends.

    That is where the generation prompt ends; a prompt that goes on in another way than the answer
    (an empty <think></think>, say) counts as far as both agree. ValueError when they disagree
    about earlier turns.
    """
    messages, tools = conversation.messages[:turn], conversation.tools
    prompt = render(tokenizer, messages, tools, True)
    if text.startswith(prompt):
        return len(prompt)
    agreed = len(commonprefix([prompt, text]))
    history = render(tokenizer, messages, tools, False)
    if agreed < len(history) or not text.startswith(history):
        raise ValueError(
            f"the chat template shows the turns before turn {turn + 1} in one way to ask for its "
            "answer and in another beside it, so the answer has no place of its own; use a "
            "template that shows them alike."
        )
    return agreed


def render(
    tokenizer: Any, messages: Messages, tools: list[dict[str, Any]] | None, prompt: bool
) -> str:
    """The template's text, with the generation prompt at its end or not."""
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )
