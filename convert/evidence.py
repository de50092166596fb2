"""What a draft is judged by: a target's own greedy answers, and its states at the layers asked for.

The target runs once, for all readings of the draft.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dspark_jax.config import TargetConfig
from dspark_jax.convert.scoring import Text
from dspark_jax.convert.source import read_object
from dspark_jax.generation import plain_generate, plain_prefill, plain_state
from dspark_jax.loop import Request
from dspark_jax.sharding import target_mesh
from dspark_jax.target_folder import read_tokenizer
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.targets.orbax import read_params
from dspark_jax.types import Frozen, Rows, Target

PROMPTS = (
    'def binary_search(values, wanted):\n    """Index of a value in a sorted list, or -1."""',
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file as a list."""',
    'class Stack:\n    """A stack with push, pop and peek."""',
    'def merge(left, right):\n    """Merge two sorted lists into one sorted list."""',
    'def parse_date(text):\n    """Parse a date written as YYYY-MM-DD."""',
    "Write a Python function that counts the words of a text.",
    "Explain step by step how to solve 3x + 5 = 20.",
    "What is the difference between a list and a tuple in Python?",
    "Natalia sold 48 clips in April and half as many in May. How many did she sell altogether?",
    "Write an SQL query that lists the ten customers with the most orders.",
    "Summarise in three sentences why the sky is blue.",
    "Write a short letter to a landlord about a broken heater.",
    "List five things to check before a long trip by car.",
    "Translate into French: The library opens at nine and closes at six.",
    'def flatten(nested):\n    """Flatten a list of lists into one list."""',
    "How does a bicycle stay upright while it is moving?",
    'def gcd(a, b):\n    """Greatest common divisor of two whole numbers."""',
    'def slugify(title):\n    """Turn a title into lower-case words joined by hyphens."""',
    'class Counter:\n    """Count how often things were seen."""',
    'def walk(folder, suffix):\n    """Yield the paths below a folder that end in a suffix."""',
    'def moving_average(values, width):\n    """Means of every `width` neighbouring values."""',
    'def retry(call, times):\n    """Call a function again when it raises, at most so often."""',
    "Write a regular expression that finds e-mail addresses, and explain it.",
    "A train covers 180 km in two hours and a quarter. What is its mean speed?",
    "What happens when I type an address into a browser?",
    "Give me a recipe for a vegetable soup for four people.",
    "Explain recursion to a child of ten.",
    "Write a function in JavaScript that removes duplicates from an array.",
    "Compare the advantages of trains and aeroplanes for a journey of 600 km.",
    "Who was Ada Lovelace, and what is she known for?",
    "If all roses are flowers and some flowers fade quickly, do some roses fade quickly?",
    "Draft a polite reply that declines an invitation to a wedding.",
)
FEWEST = 4
"""Prompts below which no interval means anything."""


class Loaded(NamedTuple):
    """A target as the doctor runs it; an answer stops at any of the tokens `ends`."""

    folder: Path
    config: TargetConfig
    target: Target
    params: Any
    tokenizer: Any
    ends: tuple[int, ...]


class Evidence(NamedTuple):
    """Answers, and the state entering every layer of `layers`, which ascend, side by side."""

    loaded: Loaded
    text: Text
    layers: tuple[int, ...]
    states: Float[Array, "B T A D"]
    frozen: Frozen
    last_norm: Float[Array, "D"]

    @property
    def longest_context(self) -> int:
        """Context rows before the last judged anchor."""
        return int(np.max(np.where(self.text.valid, self.text.anchor, 0)))


def load(folder: Path, layers: Sequence[int], tensor_parallel: int, dtype: str) -> Loaded:
    """A target that captures the layers of these that it has; ValueError when it is none."""
    described = read_object(folder / "config.json")
    depth = read_config(described).num_hidden_layers
    config = read_config(
        described, aux_layer_ids=tuple(sorted({j for j in layers if 0 <= j <= depth}))
    )
    tokenizer, mesh = (
        read_tokenizer(folder),
        target_mesh(jax.devices()[:tensor_parallel], tensor_parallel),
    )
    target = make_target(config, mesh)
    params = read_params(config, folder, described, mesh, dtype)
    return Loaded(
        folder, config, target, params, tokenizer, end_tokens(folder, described, tokenizer)
    )


def end_tokens(folder: Path, described: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Where answers stop; none where nothing says so, and they are as long as asked."""
    generation = folder / "generation_config.json"
    found = read_object(generation).get("eos_token_id") if generation.exists() else None
    for choice in (found, described.get("eos_token_id"), tokenizer.eos_token_id):
        if choice is not None:
            return tuple(choice) if isinstance(choice, list) else (choice,)
    return ()


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """One prompt a line; a line that is a JSON object gives its `prompt` or first of `turns`.

    Raises ValueError when there are too few.
    """
    if path is None:
        return PROMPTS
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path} cannot be read: {error}.") from error
    found = tuple(_prompt(path, number, line) for number, line in enumerate(lines, 1))
    if len(found) < FEWEST:
        raise ValueError(
            f"prompts {path} holds {len(found)} prompts; give at least {FEWEST}, better 32: an "
            "interval needs them."
        )
    return found


def _prompt(path: Path, number: int, line: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        value = json.loads(line)
        found = value["prompt"] if "prompt" in value else value["turns"][0]
        if isinstance(found, str):
            return found
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    raise ValueError(
        f'prompts {path}, prompt {number}: write {{"prompt": "…"}}, {{"turns": ["…"]}} or text.'
    )


def rendered(tokenizer: Any, prompts: Sequence[str], longest: int) -> list[np.ndarray]:
    """Prompts through the chat template, as text where there is none, cut to their last tokens."""
    found = []
    for prompt in prompts:
        text = prompt
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
        found.append(np.array(ids[-longest:], np.int32))
    return found


def gather(
    loaded: Loaded,
    prompts: Sequence[str],
    longest: int,
    answer_tokens: int,
    slots: int,
    anchors: int,
) -> Evidence:
    """Answer the prompts, then run the target over all of it once.

    Args:
        slots: Longest block of the drafts to be judged.
        anchors: Blocks judged in every answer.

    Raises ValueError when fewer answers than `FEWEST` are long enough for a block.
    """
    asked = rendered(loaded.tokenizer, prompts, longest)
    tokens, begin, end = answer(loaded, asked, answer_tokens)
    anchor, valid = choose_anchors(begin, end, slots, anchors)
    if valid.any(axis=1).sum() < FEWEST:
        raise ValueError(
            f"only {valid.any(axis=1).sum()} of {len(prompts)} answers are longer than a block of "
            f"{slots}; give other --prompts, or check the target's chat template."
        )
    segment = (np.arange(tokens.shape[1]) < end[:, None]).astype(np.int32)
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    forward = jax.jit(loaded.target.forward)
    found = forward(loaded.params, *map(jnp.asarray, (tokens, segment, position)))
    layers = loaded.config.aux_layer_ids
    return Evidence(
        loaded,
        Text(*map(jnp.asarray, (tokens, segment, anchor, valid))),
        layers,
        found.aux_hidden.reshape(*tokens.shape, len(layers), -1),
        jax.jit(loaded.target.frozen)(loaded.params),
        loaded.params["norm"]["weight"][...],
    )


def answer(
    loaded: Loaded, asked: Sequence[np.ndarray], answer_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [B, T] with the answers, where each answer begins, where it ends)."""
    begin = np.array([len(prompt) for prompt in asked], np.int32)
    longest = int(begin.max())
    tokens = np.zeros((len(asked), longest + answer_tokens), np.int32)
    for i, prompt in enumerate(asked):
        tokens[i, : len(prompt)] = prompt
    run = jax.jit(partial(_generate, loaded.target, longest, answer_tokens))
    prepared = jax.jit(loaded.target.prepare)(loaded.params)
    made, count = run(prepared, tokens[:, :longest], begin, jnp.array(loaded.ends or (-1,)))
    made, count = np.asarray(made), np.asarray(count)
    for i, length in enumerate(count):
        tokens[i, begin[i] : begin[i] + length] = made[i, :length]
    return tokens, begin, begin + count


def _generate(
    target: Target, longest: int, limit: int, prepared: Any, tokens: Any, count: Any, end: Any
) -> tuple[Any, Any]:
    batch, capacity = tokens.shape[0], longest + limit
    order = jnp.arange(longest, dtype=jnp.int32)
    rows = Rows(tokens, jnp.where(order < count[:, None] - 1, order, capacity))
    last = jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)[:, 0]
    state = plain_state(target, jax.random.split(jax.random.key(0), batch), capacity)
    state = plain_prefill(target, prepared, state, rows, last)
    request = Request(jnp.zeros(batch, jnp.int32), jnp.zeros(batch), jnp.full(batch, limit))
    made = plain_generate(target, prepared, state, request, limit, end)[1]
    return made.tokens, made.length


def choose_anchors(
    begin: np.ndarray, end: np.ndarray, slots: int, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """(anchor [B, N], valid): evenly over every answer, where a whole block and one more follow."""
    anchor = np.zeros((len(begin), wanted), np.int32)
    valid = np.zeros((len(begin), wanted), bool)
    for i, (first, last) in enumerate(zip(begin - 1, end - slots - 1, strict=True)):
        places = (
            np.unique(np.linspace(first, last, wanted).astype(np.int32)) if last >= first else []
        )
        anchor[i, : len(places)] = places
        valid[i, : len(places)] = True
    return anchor, valid
