"""The main job's data: functions of the standard library, answered by the target itself."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.generation import Generation, plain_generate, plain_prefill, plain_state
from dspark_jax.hosts import fetch
from dspark_jax.loop import Request
from dspark_jax.train import python_corpus
from dspark_jax.train.conversations import Messages, prompt_tokens
from dspark_jax.types import Rows, Target


class Prompts(NamedTuple):
    """Texts to ask; the held-out ones come from files the target never trained on."""

    train: list[str]
    held_out: list[str]


def library_prompts(seed: int) -> Prompts:
    """Signature and docstring of the standard library's documented functions, in random order."""
    train, held_out = [], []
    for source in python_corpus.sources(python_corpus.standard_library()):
        found = [e.prompt for e in python_corpus.functions(source) if e.documented]
        (held_out if source.held_out else train).extend(found)
    prompts = Prompts(list(dict.fromkeys(train)), list(dict.fromkeys(held_out)))
    known = set(train)
    prompts = prompts._replace(held_out=[text for text in prompts.held_out if text not in known])
    for texts in prompts:
        np.random.default_rng(seed).shuffle(texts)
    return prompts


def fitting(tokenizer: Any, texts: Sequence[str], longest_prompt: int, wanted: int) -> list[str]:
    """The first `wanted` texts whose prompt has at most `longest_prompt` tokens; all if fewer."""

    def fits(text: str) -> bool:
        return len(prompt_tokens(tokenizer, [{"role": "user", "content": text}])) <= longest_prompt

    return list(islice(filter(fits, texts), wanted))


def answers(
    target: Target,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str],
    longest_prompt: int,
    max_tokens: int,
    ends: tuple[int, ...],
    batch: int,
    seed: int,
    dtype: str,
    first: int = 0,
) -> Iterator[tuple[list[Messages], int]]:
    """Conversations of the prompts from `first` on, with the target's own answers at temperature 1.

    Yields (conversations, tokens made) of one batch after another. No prompt may have more than
    `longest_prompt` tokens. The caches are of the parameters' own `dtype`. An answer depends on its
    place in `texts` and the seed alone, so beginning later changes none.
    """
    run = jax.jit(partial(_answer_batch, target, longest_prompt, max_tokens, dtype))
    prepared = jax.jit(target.prepare)(params)
    for start in range(first, len(texts), batch):
        asked = [[{"role": "user", "content": text}] for text in texts[start : start + batch]]
        prompts = [prompt_tokens(tokenizer, messages) for messages in asked]
        padded = prompts + [prompts[-1]] * (batch - len(prompts))
        keys = jax.random.split(jax.random.key(seed + start), batch)
        made = run(prepared, *pad_prompts(padded, longest_prompt), keys, jnp.array(ends))
        tokens, count = fetch((made.tokens, made.length))
        conversations: list[Messages] = []
        for i, messages in enumerate(asked):
            ids = [t for t in tokens[i, : count[i]] if t not in ends]
            reply = {"role": "assistant", "content": tokenizer.decode(ids)}
            conversations.append([*messages, reply])
        yield conversations, int(count[: len(asked)].sum())


def pad_prompts(prompts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, length], count [B]) of prompts of at most `length` tokens."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def prompt_rows(tokens: Any, count: Any, capacity: int) -> tuple[Rows, Any]:
    """All but the last token of every prompt as rows, and the last token: the first anchor."""
    order = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    position = jnp.where(order < count[:, None] - 1, order, capacity)
    return Rows(tokens, position), jnp.take_along_axis(tokens, count[:, None] - 1, axis=1)[:, 0]


def _answer_batch(
    target: Target,
    longest_prompt: int,
    max_tokens: int,
    dtype: str,
    prepared: Any,
    tokens: Any,
    count: Any,
    keys: Any,
    end: Any,
) -> Generation:
    batch, capacity = tokens.shape[0], longest_prompt + max_tokens
    state = plain_state(target, keys, capacity, dtype)
    state = plain_prefill(target, prepared, state, *prompt_rows(tokens, count, capacity))
    request = Request(
        verify_length=jnp.zeros(batch, jnp.int32),
        temperature=jnp.ones(batch),
        max_tokens=jnp.full(batch, max_tokens),
    )
    return plain_generate(target, prepared, state, request, max_tokens, end)[1]
