"""What is read from JSONL, how a chat template splits it into rows, and what is trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.target_folder import load_tokenizer
from dspark_jax.train.conversations import (
    check_trainable,
    prompt_tokens,
    read_conversations,
    tokenise_all,
    write_conversations,
)
from dspark_jax.train.data import asked, servable
from dspark_jax.train.tokenise import Conversation, Row, tokenise

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

# As Qwen3 and GLM do: thinking is shown only after the last question.
THINKING = """
{%- if tools -%}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor -%}
{%- for m in messages -%}
<|{{ m.role }}|>
{%- if m.role == 'assistant' and loop.index0 > last.question -%}
<think>{{ m.reasoning_content | default('') }}</think>
{%- endif -%}
{{- m.content -}}
{%- for call in m.tool_calls | default([]) -%}
<call>{{ call.function.name }}({% for k, v in call.function.arguments.items() %}{{ k }}={{ v }}
{%- endfor %})</call>
{%- endfor -%}
{%- if m.role == 'assistant' %}<|endoftext|>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""
# As DeepSeek's distilled models do: the generation prompt begins the thinking.
OPENED = THINKING.replace(
    "{%- if add_generation_prompt %}<|assistant|>",
    "{%- if add_generation_prompt %}<|assistant|><think>\n",
)


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(embedded("tiny-glm"))


def parts(tokenizer: Any, rows: list[Row]) -> list[list[str]]:
    """Decoded runs of every row, untrained and trained in turn, beginning with untrained."""
    found = []
    for row in rows:
        assert row.tokens.dtype == np.int32 and row.loss_mask.dtype == bool
        borders = np.flatnonzero(np.diff(row.loss_mask)) + 1
        assert not row.loss_mask[0]
        found.append([tokenizer.decode(tokens) for tokens in np.split(row.tokens, borders)])
    return found


def read(tmp_path: Path, *lines: Any) -> list[Any]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_conversations(path)


def rows_of(tokenizer: Any, tmp_path: Path, *lines: Any) -> list[list[str]]:
    return parts(tokenizer, tokenise_all(tokenizer, read(tmp_path, *lines), "lines"))


def chat(*turns: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def test_a_template_that_appends_gives_one_row_with_every_answer(tokenizer: Any, tmp_path: Path):
    found = rows_of(tokenizer, tmp_path, {"messages": chat("one", "two", "three", "four", "five")})
    assert found == [
        ["<|user|>one<|assistant|>", "two<|endoftext|>"]
        + ["<|user|>three<|assistant|>", "four<|endoftext|>"]
    ]


def test_thinking_that_later_turns_drop_is_trained_where_it_is_shown(
    tokenizer: Any, tmp_path: Path
):
    tokenizer.chat_template = THINKING
    messages = chat("one", "two", "three", "four")
    messages[1]["reasoning_content"] = "hm"
    messages[3]["reasoning_content"] = "ho"
    assert rows_of(tokenizer, tmp_path, {"messages": messages}) == [
        ["<|user|>one<|assistant|>", "<think>hm</think>two<|endoftext|>"],
        [
            "<|user|>one<|assistant|>two<|endoftext|><|user|>three<|assistant|>",
            "<think>ho</think>four<|endoftext|>",
        ],
    ]


def test_tool_calls_and_their_results_stay_in_one_row_until_the_user_speaks(
    tokenizer: Any, tmp_path: Path
):
    tokenizer.chat_template = THINKING
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "reasoning_content": "sum", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "bye"},
    ]
    start = "<|system|>" + json.dumps(TOOL) + "<|user|>1+1?<|assistant|>"
    call = "<call>add(a=1)</call><|endoftext|>"
    result = "<|tool|>2<|assistant|>"
    for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
        assert rows_of(tokenizer, tmp_path, {"messages": messages, "tools": tools}) == [
            [
                start,
                f"<think>sum</think>{call}",
                result,
                "<think></think>Two.<|endoftext|>",
            ],
            [
                f"{start}{call}{result}Two.<|endoftext|><|user|>thanks<|assistant|>",
                "<think></think>Sure.<|endoftext|>",
            ],
        ]


def test_a_generation_prompt_the_answer_does_not_repeat_counts_as_far_as_both_agree(
    tokenizer: Any, tmp_path: Path
):
    tokenizer.chat_template = OPENED
    messages = chat("one", "two")
    prompt, answer = rows_of(tokenizer, tmp_path, {"messages": messages})[0]
    assert prompt + answer == "<|user|>one<|assistant|><think></think>two<|endoftext|>"
    assert prompt.startswith("<|user|>one<|assistant|><think") and answer.endswith(
        "</think>two<|endoftext|>"[1:]
    )
    messages[1]["reasoning_content"] = "\nhm"
    prompt, answer = rows_of(tokenizer, tmp_path, {"messages": messages})[0]
    assert prompt == "<|user|>one<|assistant|><think>\n"
    assert answer == "hm</think>two<|endoftext|>"


def test_a_token_that_begins_in_the_prompt_and_ends_in_the_answer_is_trained(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = tokenise(tokenizer, Conversation(chat("def f():\n ", "   return 1")))[0]
    encoded = tokenizer(
        "def f():\n    return 1", add_special_tokens=False, return_offsets_mapping=True
    )
    assert row.tokens.tolist() == encoded["input_ids"]
    assert row.loss_mask.tolist() == [end > 10 for _, end in encoded["offset_mapping"]]


def test_a_template_that_changes_history_beside_the_answer_is_refused_with_file_and_line(
    tokenizer: Any, tmp_path: Path
):
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    examples = read(tmp_path, {"messages": chat("one", "two")})
    with pytest.raises(ValueError, match=r"data.jsonl line 1 .* before turn 2 in one way"):
        tokenise_all(tokenizer, examples, "lines")


def test_messages_a_template_refuses_are_named_with_file_and_line(tokenizer: Any, tmp_path: Path):
    tokenizer.chat_template = "{{ raise_exception('no system turn here') }}"
    examples = read(tmp_path, {"messages": chat("one", "two")})
    with pytest.raises(ValueError, match=r"data.jsonl line 1 cannot be used: no system turn"):
        tokenise_all(tokenizer, examples, "lines")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}])
def test_an_answer_of_weight_zero_is_read_and_not_trained(
    tokenizer: Any, tmp_path: Path, mark: dict[str, Any]
):
    messages = chat("one", "two", "three", "four")
    messages[1] |= mark
    assert rows_of(tokenizer, tmp_path, {"messages": messages}) == [
        [
            "<|user|>one<|assistant|>two<|endoftext|><|user|>three<|assistant|>",
            "four<|endoftext|>",
        ]
    ]
    messages[3] |= mark
    with pytest.raises(ValueError, match="none of 1 lines has a trainable token"):
        rows_of(tokenizer, tmp_path, {"messages": messages})


def test_sharegpt_and_openai_spellings_are_read_alike(tmp_path: Path):
    share = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two."},
    ]
    function = {"name": "add", "arguments": '{"a": 1}'}
    openai = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    first, second = read(
        tmp_path, {"conversations": share, "system": "Be brief."}, {"messages": openai}
    )
    assert first.messages == second.messages
    assert first.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert (first.where, second.where) == tuple(f"{tmp_path}/data.jsonl line {n}" for n in (1, 2))


def test_rows_of_tokens_are_taken_as_they_are_and_may_stand_among_conversations(
    tokenizer: Any, tmp_path: Path
):
    examples = read(
        tmp_path,
        {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 0]},
        {"messages": chat("one", "two")},
        {"input_ids": [8, 9], "loss_mask": [False, True]},
    )
    rows = tokenise_all(tokenizer, examples, "lines")
    assert [row.tokens.tolist() for row in (rows[0], rows[2])] == [[5, 6, 7], [8, 9]]
    assert [row.loss_mask.tolist() for row in (rows[0], rows[2])] == [[0, 1, 0], [0, 1]]
    assert all(row.tokens.dtype == np.int32 and row.loss_mask.dtype == bool for row in rows)


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**40])
def test_a_token_outside_the_vocabulary_is_named_with_file_and_line(
    tokenizer: Any, tmp_path: Path, wrong: int
):
    examples = read(
        tmp_path, {"messages": chat("a", "b")}, {"input_ids": [1, wrong], "loss_mask": [0, 1]}
    )
    with pytest.raises(ValueError, match=f"line 2 has token {wrong}, but the tokenizer has"):
        tokenise_all(tokenizer, examples, "lines")


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"} | changes]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"input_ids": [1, 2], "loss_mask": [1]}, "has 2 input_ids but a loss_mask of 1"),
        ({"input_ids": [1], "loss_mask": [2]}, "no proper"),
        ({"input_ids": [1.5], "loss_mask": [1]}, "no proper"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [1, 1]}, "no proper"),
        ({"input_ids": [1, "2"], "loss_mask": [1, 1]}, "no proper"),
        ({"input_ids": [], "loss_mask": []}, "no proper"),
        ({"input_ids": [1]}, "no proper"),
        (turn(content=None), "text of type NoneType"),
        (turn(content=[{"type": "image_url", "image_url": "x"}]), "parts of type image_url"),
        (turn(content=["x"]), "parts of type str"),
        (turn(content="x", weight=0.5), "weight or loss 0.5"),
        (turn(content="x", reasoning_content=["y"]), "reasoning_content of type list"),
        (turn(content=None, tool_calls=[{"id": "1"}]), "without a function's name"),
        (turn(tool_calls=[{"name": "f", "arguments": "{"}]), "call of f that is not JSON"),
        (turn(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments of type list"),
        (turn(content="x") | {"tools": "{"}, "tools that is not JSON"),
        (turn(content="x") | {"tools": ["f"]}, "tools of type list"),
        ({"messages": chat("a") + [{"role": ["x"], "content": "y"}]}, r"role \['x'\]"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is not JSON"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_and_line(tmp_path: Path, line: Any, said: str):
    with pytest.raises(ValueError, match=f"data.jsonl line 2 .*{said}"):
        read(tmp_path, {"messages": chat("a", "b")}, line)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_line_nested_without_end_is_named_with_file_and_line(tmp_path: Path, opening: str):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": chat("a", "b")}) + "\n" + opening * 10**5)
    with pytest.raises(ValueError, match="data.jsonl line 2 is nested too deeply"):
        read_conversations(path)
    with pytest.raises(ValueError, match="data.jsonl line 1 has a tools nested too deeply"):
        read(tmp_path, turn(content="x") | {"tools": opening * 10**5})


def test_answers_before_the_first_question_are_left_out_and_counted(tokenizer: Any, tmp_path: Path):
    share = [
        {"from": "gpt", "value": "zero"},
        {"from": "observation", "value": "nil"},
        {"from": "gpt", "value": "none", "loss": False},
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "two", "loss": False},
        {"from": "human", "value": "three"},
        {"from": "gpt", "value": "four"},
    ]
    alone = {"messages": [{"role": "assistant", "content": "x"}]}
    system = {
        "messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "y"}]
    }
    lines = ({"conversations": share}, alone, {"messages": chat("a", "b")}, system)
    examples = read(tmp_path, *lines)
    assert [example.unasked for example in examples] == [3, 1, 0, 0]
    assert parts(tokenizer, tokenise_all(tokenizer, examples, "lines"))[0] == [
        "<|user|>one<|assistant|>two<|endoftext|><|user|>three<|assistant|>",
        "four<|endoftext|>",
    ]
    assert [len(tokenise(tokenizer, example)) for example in examples] == [1, 0, 1, 1]


def test_what_is_written_is_read_back(tmp_path: Path):
    messages = chat("ünï\u2028", "[bold]x[/bold]\n")
    write_conversations(tmp_path / "new/data.jsonl", [messages, messages])
    found = read_conversations(tmp_path / "new")
    assert [example.messages for example in found if isinstance(example, Conversation)] == [
        messages,
        messages,
    ]


def test_a_prompt_ends_where_its_answer_begins(tokenizer: Any):
    tokenizer.chat_template = THINKING
    messages = chat("one", "two", "three")
    row = tokenise(tokenizer, Conversation(messages, [TOOL]))[0]
    prompt = prompt_tokens(tokenizer, messages, [TOOL])
    assert prompt.tolist() == row.tokens[~row.loss_mask].tolist()


def test_what_is_asked_is_the_first_question_or_the_tokens_before_the_first_trained_one(
    tokenizer: Any, tmp_path: Path
):
    examples = read(
        tmp_path,
        {"messages": chat("one", "two", "three", "four")},
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 0]},
        {"input_ids": [5, 6], "loss_mask": [1, 0]},
        {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]},
    )
    found = [asked(tokenizer, example) for example in examples]
    assert tokenizer.decode(found[0][0]) == "<|user|>one<|assistant|>"
    assert found[1][0].tolist() == [5, 6] and found[2:] == [[], []]


def test_held_out_rows_that_cannot_be_served_are_told_apart(tokenizer: Any, tmp_path: Path):
    answered = {"input_ids": [5, 6], "loss_mask": [1, 0]}
    alone = {
        "messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]
    }
    long = {"input_ids": [5] * 9, "loss_mask": [0] * 7 + [1, 1]}
    with pytest.raises(
        ValueError, match="none of 2 held-out .* of X has a prompt before its first"
    ):
        servable(tokenizer, read(tmp_path, answered, alone), 128, "X")
    with pytest.raises(ValueError, match="at most 6 tokens .* --prompt-tokens .the shortest has 7"):
        servable(tokenizer, read(tmp_path, answered, long), 6, "X")
    assert len(servable(tokenizer, read(tmp_path, answered, alone, long), 7, "X")) == 1


def test_rows_without_a_trained_token_within_reach_are_refused():
    row = Row(np.arange(4, dtype=np.int32), np.array([False, False, True, True]))
    check_trainable([row], 3, "training conversations")
    with pytest.raises(ValueError, match="none of 1 rows of the training conversations"):
        check_trainable([row], 2, "training conversations")
