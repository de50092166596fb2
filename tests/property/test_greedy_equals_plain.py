"""Greedy speculative answers are plain decoding's answers, token for token.

Plain decoding is verify length 0 of the same compiled program, so both see the same arithmetic.
The target is a small random GLM whose attention is sparse long before the answers end.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from dspark_jax.config import DraftConfig, GlmConfig
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.generation import generate
from dspark_jax.loop import Request, init_state, prefill, prepare_weights
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.types import Draft, Proposal, Rows

pytestmark = pytest.mark.optimised

V, CHUNK, BATCH, LIMIT, LONG = 24, 4, 4, 60, 2000
NEVER = -1
"""An end token that no answer contains."""
PROMPTS = ((3,), (7, 1, 20, 5), (2, 2, 9, 14, 23, 0, 11), (19, 8, 8, 1, 16, 4, 21, 10, 6, 13))

GLM = GlmConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=20,
    moe_intermediate_size=6,
    num_hidden_layers=4,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    index_topk=6,
    index_head_dim=6,
    index_n_heads=2,
    first_k_dense_replace=1,
    indexer_types=("full", "shared", "full", "shared"),
    aux_layer_ids=(1, 4),
)
DRAFT = DraftConfig(
    vocab_size=V,
    draft_vocab_size=V,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    aux_layer_ids=GLM.aux_layer_ids,
    mask_token_id=V - 1,
    block_size=5,
    layer_types=("full_attention", "sliding_attention"),
    sliding_window=9,
    markov_rank=4,
)
G = DRAFT.draft_length


class Script(NamedTuple):
    """Parameters of a draft that knows the answers: token by position, where it errs, and how."""

    token: Array
    wrong: Array


class Answers(NamedTuple):
    """What `generate` returned, by its place rather than its names."""

    tokens: np.ndarray
    length: np.ndarray
    rounds: np.ndarray
    survived: np.ndarray


def scripted_draft() -> Draft:
    """A draft that proposes the scripted tokens, right until it errs: every length is accepted."""

    def draft_block(script: Script, _: Any, cache: Any, length: Array, *rest: Any) -> Proposal:
        row = jnp.arange(len(length))[:, None]
        place = jnp.minimum(length[:, None] + 1 + jnp.arange(G), script.token.shape[1] - 1)
        tokens = (script.token[row, place] + script.wrong[row, place]) % V
        return Proposal(tokens, jnp.zeros((*tokens.shape, V)), jnp.ones(tokens.shape))

    return Draft(
        draft_length=G,
        prepare=lambda script: script,
        init_cache=lambda batch, capacity, dtype=None: jnp.zeros((batch, capacity)),
        extend_context=lambda script, cache, aux_hidden, position: cache,
        draft_block=draft_block,
    )


@lru_cache
def target_params() -> Any:
    """Weights wide enough that the next token depends on much and answers do not soon repeat."""
    params = init_params(GLM, 7)
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 12 * x), params)


@lru_cache
def compiled(scripted: bool, batch: int, limit: int) -> Callable[..., Any]:
    """Prefill in given chunks, then generate; one program whatever is asked of it."""
    target, draft = make_target(GLM), scripted_draft() if scripted else dspark_draft(DRAFT)
    capacity = limit + max(map(len, PROMPTS)) + G + 1
    frozen = target.frozen(target_params())

    def answer(
        params: Any, chunks: Rows, anchor: Array, request: Request, end: Array
    ) -> tuple[Array, ...]:
        weights = prepare_weights(target, draft, target_params(), params, frozen)
        state = init_state(target, draft, jax.random.split(jax.random.key(0), batch), capacity)

        def chunk(state: Any, rows: Rows) -> Any:
            return prefill(target, draft, weights, state, rows, anchor), None

        state, _ = jax.lax.scan(chunk, state, chunks)
        return tuple(generate(target, draft, weights, state, request, limit, end)[1])

    return jax.jit(answer)


def answers(
    prompts: tuple[tuple[int, ...], ...],
    verify_length: int,
    script: Script | None = None,
    end: int = NEVER,
    max_tokens: Any = None,
    limit: int = LIMIT,
    first_chunk: int = CHUNK,
) -> Answers:
    """Greedy answers of a batch, drafted by the real drafter or by a script."""
    batch = len(prompts)
    params = init_draft_params(DRAFT, 2) if script is None else script
    chunks = chunked(prompts, first_chunk, limit + max(map(len, PROMPTS)) + G + 1)
    anchor = jnp.asarray([prompt[-1] for prompt in prompts])
    request = Request(
        jnp.full(batch, verify_length),
        jnp.zeros(batch),
        jnp.broadcast_to(jnp.asarray(limit if max_tokens is None else max_tokens), batch),
    )
    run = compiled(script is not None, batch, limit)
    found = run(params, chunks, anchor, request, jnp.asarray([end]))
    return Answers(*map(np.asarray, found[: len(Answers._fields)]))


def chunked(prompts: tuple[tuple[int, ...], ...], first: int, capacity: int) -> Rows:
    """Prompt rows [chunks, B, CHUNK]; the first chunk holds `first` of them, padding the rest."""
    starts = [0, *range(first, max(map(len, PROMPTS)) - 1, CHUNK)]
    starts += [capacity] * (4 - len(starts))  # whole chunks of padding: one shape for all
    tokens = np.zeros((len(starts), len(prompts), CHUNK), np.int32)
    position = np.full(tokens.shape, capacity, np.int32)
    for b, prompt in enumerate(prompts):
        rows = prompt[:-1]
        for c, start in enumerate(starts):
            size = len(rows[start : start + (first if c == 0 else CHUNK)])
            tokens[c, b, :size] = rows[start : start + size]
            position[c, b, :size] = np.arange(start, start + size)
    return Rows(jnp.asarray(tokens), jnp.asarray(position))


def script_of(
    prompts: tuple[tuple[int, ...], ...], plain: Answers, error_rate: float = 0.25
) -> Script:
    """A draft of these answers that is wrong at random places."""
    limit = plain.tokens.shape[1]
    token = np.zeros((len(prompts), limit + max(map(len, PROMPTS))), np.int32)
    for b, prompt in enumerate(prompts):
        token[b, len(prompt) : len(prompt) + limit] = plain.tokens[b]
    wrong = np.random.default_rng(1).random(token.shape) < error_rate
    return Script(jnp.asarray(token), jnp.asarray(wrong.astype(np.int32)))


@lru_cache
def plain_answers() -> Answers:
    """Plain decoding by the program that the scripted draft runs in."""
    nothing = jnp.zeros((BATCH, LIMIT + max(map(len, PROMPTS))), jnp.int32)
    return answers(PROMPTS, 0, Script(nothing, nothing))


@lru_cache
def the_script() -> Script:
    return script_of(PROMPTS, plain_answers())


def test_the_example_is_worth_checking():
    plain = plain_answers()
    assert np.array_equal(plain.length, [LIMIT] * BATCH) and np.array_equal(
        plain.rounds, plain.length
    )
    assert all(len(set(row)) > V // 3 for row in plain.tokens)
    assert LIMIT > 5 * GLM.index_topk


@pytest.mark.parametrize("verify_length", [1, 2, G, G + 3])
def test_speculation_changes_no_token(verify_length: int):
    spoken = answers(PROMPTS, verify_length, the_script())
    assert np.array_equal(spoken.tokens, plain_answers().tokens)
    survived = spoken.survived.sum(axis=0)
    assert np.all(survived[: min(verify_length, G)] > 0) and not survived[verify_length:].any()
    assert np.all(spoken.rounds < LIMIT)


def test_a_real_drafter_changes_no_token():
    plain, spoken = answers(PROMPTS, 0), answers(PROMPTS, G)
    assert np.array_equal(spoken.tokens, plain.tokens)
    assert np.array_equal(plain.rounds, [LIMIT] * BATCH) and not plain.survived.any()


def test_a_draft_that_is_always_right_fills_every_round():
    spoken = answers(PROMPTS, G, script_of(PROMPTS, plain_answers(), error_rate=0))
    assert np.array_equal(spoken.tokens, plain_answers().tokens)
    assert np.array_equal(spoken.rounds, [-(-LIMIT // (G + 1))] * BATCH)


def test_a_draft_that_is_always_wrong_costs_nothing_but_time():
    spoken = answers(PROMPTS, G, script_of(PROMPTS, plain_answers(), error_rate=1))
    assert np.array_equal(spoken.tokens, plain_answers().tokens)
    assert np.array_equal(spoken.rounds, [LIMIT] * BATCH) and not spoken.survived.any()


@pytest.mark.parametrize("order", [(3, 0, 2, 1), (1, 2, 3, 0)])
def test_an_answer_does_not_depend_on_its_slot(order: tuple[int, ...]):
    script = jax.tree.map(lambda x: x[jnp.asarray(order)], the_script())
    moved = answers(tuple(PROMPTS[i] for i in order), G, script)
    still = answers(PROMPTS, G, the_script())
    assert np.array_equal(moved.tokens, plain_answers().tokens[list(order)])
    for mine, theirs in zip(moved, still, strict=True):
        assert np.array_equal(mine, theirs[list(order)])


def test_an_answer_does_not_depend_on_its_neighbours():
    others = ((5, 5), PROMPTS[1], (12,), (0, 1, 2, 3, 4, 5, 6))
    still = answers(PROMPTS, G)
    for max_tokens in (LIMIT, np.array([1, LIMIT, 7, 2])):
        among = answers(others, G, max_tokens=max_tokens)
        for mine, theirs in zip(among, still, strict=True):
            assert np.array_equal(mine[1], theirs[1])


@pytest.mark.parametrize("first_chunk", [1, 2, 3])
def test_an_answer_does_not_depend_on_how_its_prompt_was_cut(first_chunk: int):
    whole, cut = answers(PROMPTS, G), answers(PROMPTS, G, first_chunk=first_chunk)
    assert np.array_equal(whole.tokens, cut.tokens)
    assert np.array_equal(whole.survived, cut.survived)


@pytest.mark.parametrize("verify_length", [0, 1, G])
def test_an_end_token_ends_the_answer_and_is_its_last(verify_length: int):
    plain = plain_answers().tokens
    for end in (plain[0, 9], plain[1, 16], plain[2, 31]):
        spoken = answers(PROMPTS, verify_length, the_script(), end=int(end))
        for b in range(BATCH):
            places = np.flatnonzero(plain[b] == end)
            length = places[0] + 1 if len(places) else LIMIT
            assert spoken.length[b] == length
            assert np.array_equal(spoken.tokens[b, :length], plain[b, :length])
            assert not spoken.tokens[b, length:].any()


@pytest.mark.parametrize("verify_length", [0, 2, G])
def test_answers_end_at_their_last_allowed_token(verify_length: int):
    allowed = np.array([1, 2, 29, LIMIT + 50])
    spoken = answers(PROMPTS, verify_length, the_script(), max_tokens=allowed)
    assert np.array_equal(spoken.length, np.minimum(allowed, LIMIT))
    for b, length in enumerate(spoken.length):
        assert np.array_equal(spoken.tokens[b, :length], plain_answers().tokens[b, :length])
        assert not spoken.tokens[b, length:].any()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 30, 41, LIMIT])
def test_every_token_is_an_accepted_draft_or_a_rounds_own(max_tokens: int):
    spoken = answers(PROMPTS, G, the_script(), max_tokens=max_tokens)
    accepted = spoken.survived.sum(axis=1)
    # The last round has no token of its own when the answer ends among its drafts.
    cut = spoken.rounds + accepted - spoken.length
    assert np.all((cut == 0) | (cut == 1))
    assert np.all(np.diff(spoken.survived, axis=1) <= 0)
    assert np.all(spoken.survived[:, 0] <= spoken.rounds)
    assert np.all(spoken.rounds >= -(-spoken.length // (G + 1)))


def test_speculation_changes_no_token_of_a_long_answer():
    prompts = PROMPTS[1:3]
    nothing = jnp.zeros((2, LONG + max(map(len, PROMPTS))), jnp.int32)
    plain = answers(prompts, 0, Script(nothing, nothing), limit=LONG)
    spoken = answers(prompts, G, script_of(prompts, plain), limit=LONG)
    assert np.array_equal(plain.length, [LONG, LONG])
    assert np.array_equal(spoken.tokens, plain.tokens)
    assert np.all(spoken.rounds < LONG / 2)
