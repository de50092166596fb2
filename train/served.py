"""The proof: held-out prompts decoded with the draft and without it, by real programs, timed.

Reading the prompt and decoding are timed apart: tokens per second are those of decoding.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.calibrate import Rounds
from dspark_jax.generation import generate, plain_generate, plain_prefill, plain_state
from dspark_jax.hosts import fetch
from dspark_jax.loop import Request, Weights, init_state, prefill
from dspark_jax.train.prompts import pad_prompts, prompt_rows
from dspark_jax.types import DecodeState, Draft, Target

LOOP_PERIODS, LOOP_COPIES = 24, 4


class Answer(NamedTuple):
    """One prompt's answer and what it took."""

    tokens: list[int]
    prompt_seconds: float
    seconds: float
    rounds: int
    survived: list[int]
    confidence: np.ndarray
    """Of every round, what the draft said of its block before the sigmoid; and how many of its
    drafts were accepted."""
    accepted: np.ndarray


class Programs(NamedTuple):
    """Compiled once each; all take a prompt and a temperature, the first a verify length too.

    `shorter` verify no more of a block than the number of drafts they are named by.
    """

    speculative: Callable[[np.ndarray, float, int], Answer]
    plain: Callable[[np.ndarray, float], Answer]
    shorter: Mapping[int, Callable[[np.ndarray, float], Answer]]


def make_programs(
    target: Target,
    draft: Draft,
    weights: Weights,
    longest_prompt: int,
    max_tokens: int,
    ends: tuple[int, ...],
    seed: int,
    dtype: str,
) -> Programs:
    """One sequence at a time: the prompt in one pass, then the answer without the host.

    The caches are of the type of the weights, `dtype`.
    """
    # A round may write a whole block past the last token.
    capacity = longest_prompt + max_tokens + draft.draft_length + 1
    stop = jnp.array(ends)

    def start(weights: Weights, prompt: Any, keys: Any) -> DecodeState:
        state = init_state(target, draft, keys, capacity, dtype)
        return prefill(target, draft, weights, state, *prompt_rows(*prompt, capacity))

    def speculative(
        weights: Weights, state: DecodeState, request: Request, most: int | None = None
    ) -> Any:
        return generate(target, draft, weights, state, request, max_tokens, stop, most)

    def plain_start(prepared: Any, prompt: Any, keys: Any) -> DecodeState:
        state = plain_state(target, keys, capacity, dtype)
        return plain_prefill(target, prepared, state, *prompt_rows(*prompt, capacity))

    def plain(prepared: Any, state: DecodeState, request: Request) -> Any:
        return plain_generate(target, prepared, state, request, max_tokens, stop)

    def timed(
        run: Any, weights: Any, prompt: np.ndarray, temperature: float, length: int
    ) -> Answer:
        request = Request(jnp.array([length]), jnp.array([temperature]), jnp.array([max_tokens]))
        own = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(prompt.tobytes())))
        keys = jax.random.split(own, 1)
        padded = pad_prompts([prompt], longest_prompt)
        begin = time.perf_counter()
        state = jax.block_until_ready(run[0](weights, padded, keys))
        read = time.perf_counter()
        made = jax.block_until_ready(run[1](weights, state, request)[1])
        end = time.perf_counter()
        made = fetch(made)
        tokens, survived = made.tokens[0, : made.length[0]].tolist(), made.survived[0].tolist()
        rounds = int(made.rounds[0])
        said = (made.confidence[0, :rounds], made.accepted[0, :rounds])
        return Answer(tokens, read - begin, end - read, rounds, survived, *said)

    begin, alone = jax.jit(start), (jax.jit(plain_start), jax.jit(plain, donate_argnums=1))

    def drafted(most: int | None) -> Any:
        return begin, jax.jit(partial(speculative, most=most), donate_argnums=1)

    return Programs(
        speculative=partial(timed, drafted(None), weights),
        plain=partial(timed, alone, weights.target, length=0),
        shorter={
            most: partial(timed, drafted(most), weights, length=most)
            for most in shorter_lengths(draft.draft_length)
        },
    )


def shorter_lengths(draft_length: int) -> tuple[int, ...]:
    """A quarter and half of a block: where a row costs time, its end may not be worth it."""
    return tuple(n for n in (draft_length // 4, draft_length // 2) if n)


def degenerates(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: its tail is at least four copies of one short piece."""
    for period in range(1, LOOP_PERIODS + 1):
        tail = tokens[-period * LOOP_COPIES :]
        if len(tail) == period * LOOP_COPIES and list(tail) == list(tail[:period]) * LOOP_COPIES:
            return True
    return False


def measure(
    programs: Programs,
    prompts: Sequence[np.ndarray],
    temperature: float,
    draft_length: int,
    progress: Callable[[], None],
) -> tuple[dict[str, Any], Rounds]:
    """One part of the report: every prompt answered by all programs in turn, after a warm-up.

    And what the drafts of whole blocks said and came to, which most of the part tells of too.
    """
    answers, plain = [], []
    shorter: dict[int, list[Answer]] = {most: [] for most in programs.shorter}
    for prompt in (prompts[0], *prompts):  # the first one twice: it compiles
        answers.append(programs.speculative(prompt, temperature, draft_length))
        plain.append(programs.plain(prompt, temperature))
        for most, run in programs.shorter.items():
            shorter[most].append(run(prompt, temperature))
        progress()
    for made in (answers, plain, *shorter.values()):
        del made[0]
    looping = [degenerates(a.tokens) for a in answers]
    parts = {
        "all": [True] * len(answers),
        "looping": looping,
        "not_looping": [not x for x in looping],
    }
    tables = {name: summarise(answers, plain, keep, draft_length) for name, keep in parts.items()}
    result = tables["all"] | {
        "by_answer": {name: tables[name] for name in ("not_looping", "looping")}
    }
    each = {**shorter, draft_length: answers}
    lengths = {most: speeds(made, plain, draft_length) for most, made in each.items()}
    result["by_verify_length"] = {str(most): table for most, table in lengths.items()}
    if temperature == 0:
        result |= identity(programs, prompts, answers, plain)
        for most, made in shorter.items():
            found = differing(answers, made)
            result["by_verify_length"][str(most)]["whole_block_divergences"] = found
    result["prompts"] = [
        {
            "prompt_token_ids": prompt.tolist(),
            "answer_token_ids": answer.tokens,
            "rounds": answer.rounds,
            "looping": loop,
        }
        for prompt, answer, loop in zip(prompts, answers, looping, strict=True)
    ]
    return result, rounds_of(answers)


def rounds_of(answers: Sequence[Answer]) -> Rounds:
    """The rounds of all answers, one after another."""
    return Rounds(
        np.concatenate([answer.confidence for answer in answers]),
        np.concatenate([answer.accepted for answer in answers]),
        np.repeat(np.arange(len(answers)), [answer.rounds for answer in answers]),
    )


def summarise(
    answers: Sequence[Answer], plain: Sequence[Answer], keep: Sequence[bool], draft_length: int
) -> dict[str, Any]:
    """Acceptance and speed over the chosen answers; acceptance_length = 1 + accepted / rounds."""
    chosen = [
        pair for pair, wanted in zip(zip(answers, plain, strict=True), keep, strict=True) if wanted
    ]
    rounds = sum(a.rounds for a, _ in chosen)
    if not rounds:
        return {"answers": 0}
    survived = np.sum([a.survived for a, _ in chosen], axis=0)
    speed = sum(len(a.tokens) for a, _ in chosen) / sum(a.seconds for a, _ in chosen)
    plain_speed = sum(len(p.tokens) for _, p in chosen) / sum(p.seconds for _, p in chosen)
    return {
        "answers": len(chosen),
        "tokens": sum(len(a.tokens) for a, _ in chosen),
        "rounds": rounds,
        "acceptance_length": 1 + float(survived.sum()) / rounds,
        "position_survival": [float(x) / rounds for x in survived[:draft_length]],
        "tokens_per_second": speed,
        "plain_tokens_per_second": plain_speed,
        "speedup": speed / plain_speed,
        "prompt_seconds": sum(a.prompt_seconds for a, _ in chosen),
        "plain_prompt_seconds": sum(p.prompt_seconds for _, p in chosen),
    }


def speeds(answers: Sequence[Answer], plain: Sequence[Answer], draft_length: int) -> dict[str, Any]:
    """What verifying so much of every block came to."""
    table = summarise(answers, plain, [True] * len(answers), draft_length)
    return {k: table[k] for k in ("acceptance_length", "tokens_per_second", "speedup")}


def identity(
    programs: Programs,
    prompts: Sequence[np.ndarray],
    answers: Sequence[Answer],
    plain: Sequence[Answer],
) -> dict[str, Any]:
    """Greedy answers against plain decoding: by the same program, and by the one-token program."""
    same = [
        programs.speculative(prompt, 0.0, 0).tokens == answer.tokens
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found = differing(answers, plain)
    return {"identical_to_plain": all(same), "one_token_program_divergences": found}


def differing(answers: Sequence[Answer], others: Sequence[Answer]) -> list[dict[str, Any]]:
    """Which answers of another program differ, and where first."""
    return [
        {"prompt": i, "position": first_difference(a.tokens, b.tokens)}
        for i, (a, b) in enumerate(zip(answers, others, strict=True))
        if a.tokens != b.tokens
    ]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first token that differs, or the shorter length."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
