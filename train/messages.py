"""The turns of one line of data, in any of their spellings, as the messages chat templates take."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system", "developer": "system", "function_call": "assistant"}
ROLES |= {"tool": "tool", "observation": "tool", "function": "tool"}
REASONING = ("reasoning_content", "reasoning", "thinking")


def messages_of(
    where: str, turns: Sequence[Any], system: Any = None
) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """The messages, and which of them are answers that must not be trained on.

    `system` is what some ShareGPT files keep beside the turns. Raises ValueError that begins with
    `where`.
    """
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    messages = [_message(where, turn) for turn in turns]
    trained = [_trained(where, turn) for turn in turns]
    return messages, frozenset(i for i, wanted in enumerate(trained) if not wanted)


def tools_of(where: str, value: Any) -> list[dict[str, Any]] | None:
    """The tools in OpenAI's form, of a list or of its JSON; None when there are none."""
    tools = _from_json(where, "tools", value) if isinstance(value, str) and value else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"{where} has tools of type {type(tools).__name__}; give a list of functions, each "
            'an object such as {"type": "function", "function": {"name": …, "parameters": …}}.'
        )
    return [t if "function" in t else {"type": "function", "function": t} for t in tools]


def _message(where: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} has a turn that is {type(turn).__name__}, not an object.")
    role = turn.get("from", turn.get("role"))
    content = _text(where, turn.get("value", turn.get("content")))
    calls = turn.get("tool_calls")
    if role == "function_call" and isinstance(content, str):
        content, calls = "", _from_json(where, "function_call", content)
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise ValueError(
            f"{where} has a turn with role {role!r} and text of type {type(content).__name__}; "
            f"roles are {', '.join(ROLES)} and the text is a string."
        )
    message: dict[str, Any] = {"role": ROLES[role], "content": content}
    if message["role"] == "assistant":
        message |= _thought_and_calls(where, turn, calls)
    if message["role"] == "tool":
        named = {name: turn.get(name) for name in ("tool_call_id", "name")}
        message |= {name: value for name, value in named.items() if isinstance(value, str)}
    return message


def _text(where: str, content: Any) -> Any:
    """Text parts joined; anything but a list as it is."""
    if not isinstance(content, list):
        return content
    kinds = {p.get("type") if isinstance(p, Mapping) else type(p).__name__ for p in content}
    if kinds - {"text"} or not all(isinstance(p.get("text"), str) for p in content):
        raise ValueError(
            f"{where} has a turn with parts of type {', '.join(sorted(map(str, kinds)))}; only "
            '{"type": "text", "text": "…"} can be trained on, so leave such conversations out.'
        )
    return "".join(part["text"] for part in content)


def _thought_and_calls(where: str, turn: Mapping[str, Any], calls: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    thought = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise ValueError(
                f"{where} has reasoning_content of type {type(thought).__name__}; give a string."
            )
        found["reasoning_content"] = thought
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        found["tool_calls"] = [_call(where, call) for call in calls]
    return found


def _call(where: str, call: Any) -> dict[str, Any]:
    """One tool call; its arguments become an object, which is what templates and servers use."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise ValueError(
            f"{where} has a tool call without a function's name; write "
            '{"type": "function", "function": {"name": "…", "arguments": {…}}}.'
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _from_json(where, f"call of {name}", arguments)
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where} calls {name} with arguments of type {type(arguments).__name__}; give an "
            "object of names and values, or its JSON."
        )
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _trained(where: str, turn: Mapping[str, Any]) -> bool:
    """OpenAI's `weight` of 0 and ShareGPT's `loss` of false keep an answer out of the loss."""
    given = [turn[name] for name in ("weight", "loss") if turn.get(name) is not None]
    if any(value not in (0, 1) for value in given):
        raise ValueError(
            f"{where} has a turn with weight or loss {given[0]!r}; use 1 or true to train on an "
            "answer, 0 or false to only read it."
        )
    return all(given)


def _from_json(where: str, what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} has a {what} that is not JSON: {error}.") from None
    except RecursionError:
        raise ValueError(f"{where} has a {what} nested too deeply to be read.") from None
