"""Serving emits what the target alone would emit, whatever decides how much is verified.

As `test_lossless`, with its tabular target behind pages: thousands of sequences share a round's
budget, so that every sequence's verify length depends on all of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from dspark_jax.cache import Cached
from dspark_jax.config import DraftConfig
from dspark_jax.draft import dspark_draft
from dspark_jax.loop import Weights
from dspark_jax.paged_loop import Control, init_slots, plain_round, prefill_pages, serve_round
from dspark_jax.truncation import Edits, Truncation
from dspark_jax.types import Draft, Frozen, Proposal, Rows, Target, TargetStates
from tests.property.test_lossless import (
    FALSE_ALARM,
    FIRST,
    HEADS,
    PROMPT,
    Table,
    V,
    cached_weights,
    draft_config,
    exact,
    first_tokens,
    p_value,
    table_target,
)
from tests.unit.test_truncation import kept

BATCH, PAGE, OWNED = 4000, 4, 4
G = 3
NOTICED = 1e-12
NOTHING: Any = (
    np.uint32(0b111111),
    np.zeros(V, np.float32),
    np.zeros(V, bool),
    np.float32(1),
    np.zeros(V, np.float32),
)
"""Edits of one sequence that change nothing."""
VANILLA = draft_config("vanilla", False, False)
TIGHT, HALF, ALL = (BATCH + BATCH * G * share // 6 for share in (1, 3, 6))
"""Budgets with room for a sixth, half and all of the drafts."""
PLAIN = 0
EDITED = (PLAIN, HALF)
"""Of these budgets there is only the program that edits, which may change nothing."""


class Told(NamedTuple):
    """Parameters of a draft whose confidences are looked up.

    In the confidence of a slot `before` knows the token before it, `itself` the one drafted there,
    which no scheduler may; both are 1 where `head` leaves the draft's own confidence.
    """

    draft: Any
    before: Array
    itself: Array
    head: Array


class Asked(NamedTuple):
    """How every sequence is served."""

    cap: Any = G
    temperature: Any = 1.0
    draft_temperature: Any = None
    min_p: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0


def paged_target() -> Target:
    """The tabular target with its tokens in pages: a page mixed up changes its answers."""

    def extend(table: Table, cache: Array, rows: Rows) -> tuple[Array, TargetStates]:
        held = Cached(cache, rows).write(rows.tokens[..., None])
        tokens = held.read()[..., 0]
        assert rows.pages is not None
        sequence = jnp.arange(len(rows.tokens)) if rows.places is None else rows.places.sequence
        place = jnp.clip(rows.position, 1, tokens.shape[1]) - 1
        pair = tokens[sequence[:, None], place] * V + rows.tokens
        return held.arrays, TargetStates(table.aux[pair], jax.nn.one_hot(pair, V * V))

    return table_target()._replace(extend=extend)


def telling(draft: Draft) -> Draft:
    """The same draft, of which is told how sure it is."""

    def draft_block(told: Told, frozen: Any, cache: Any, *given: Any) -> Proposal:
        proposal = draft.draft_block(told.draft, frozen, cache, *given)
        anchor = given[1]
        before = jnp.concatenate([anchor[:, None], proposal.tokens[:, :-1]], axis=1)
        own = jnp.where(told.head, jax.nn.sigmoid(proposal.confidence), 1.0)
        chance = own * told.before[before] * told.itself[proposal.tokens]
        return proposal._replace(confidence=jax.scipy.special.logit(chance))

    def extend_context(told: Told, *given: Any) -> Any:
        return draft.extend_context(told.draft, *given)

    return draft._replace(draft_block=draft_block, extend_context=extend_context)


def told_weights(weights: Weights, before: Any = 1.0, itself: Any = 1.0, head: bool = False) -> Any:
    before, itself = (jnp.broadcast_to(jnp.float32(x), V) for x in (before, itself))
    return weights._replace(draft=Told(weights.draft, before, itself, jnp.asarray(head)))


def control_of(asked: Asked, keys: Array, draft_length: int = G) -> Control:
    """The first round of BATCH sequences whose pages lie about at random."""

    def all_of(x: Any, dtype: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(x, dtype), BATCH)

    owned = np.random.default_rng(5).permutation(np.arange(1, 1 + BATCH * OWNED))
    guess = asked.draft_temperature
    floats, ints = jnp.float32, jnp.int32
    return Control(
        slot=jnp.asarray(np.random.default_rng(6).permutation(BATCH)),
        fresh=all_of(True, bool),
        anchor=all_of(PROMPT[-1], ints),
        length=all_of(len(PROMPT) - 1, ints),
        pages=jnp.asarray(owned.reshape(BATCH, OWNED)),
        cap=all_of(asked.cap, ints),
        key=jax.random.key_data(keys),
        temperature=all_of(asked.temperature, floats),
        draft_temperature=all_of(asked.temperature if guess is None else guess, floats),
        slope=jnp.ones((BATCH, draft_length)),
        intercept=jnp.zeros((BATCH, draft_length)),
        truncation=Truncation(
            all_of(asked.min_p, floats), all_of(asked.top_k, ints), all_of(asked.top_p, floats)
        ),
    )


def player(draft: Draft, budget: int) -> Callable[..., Any]:
    """A compiled function that serves FIRST rounds: (tokens, count, verified) of every one."""
    target = paged_target()

    def play(weights: Weights, control: Control, edits: Edits | None) -> Any:
        state = init_slots(target, draft, BATCH, 1 + BATCH * OWNED, PAGE, jnp.float32)
        tokens = jnp.tile(jnp.asarray(PROMPT[:-1]), (BATCH, 1))
        position = jnp.tile(jnp.arange(tokens.shape[1]), (BATCH, 1))
        rows = Rows(tokens, position, control.pages)
        state = prefill_pages(target, draft, weights, state, rows)

        def round_(state: Any, number: Array) -> Any:
            now = control._replace(fresh=control.fresh & (number == 0))
            given = (target, draft, weights, state, now, edits)
            state, result = serve_round(*given, budget) if budget else plain_round(*given)
            return state, (result.tokens, result.accepted + 1, result.verified)

        _, emitted = jax.lax.scan(round_, state, jnp.arange(FIRST))
        return tuple(jnp.moveaxis(x, 0, 1) for x in emitted)

    return jax.jit(play)


@lru_cache
def player_of(config: DraftConfig, budget: int) -> Callable[..., Any]:
    return player(telling(dspark_draft(config)), budget)


def serve(
    asked: Asked,
    weights: Any,
    budget: int,
    config: DraftConfig = VANILLA,
    edits: Edits | None = None,
    seed: int = 17,
) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of every sequence, and the verify lengths of every round."""
    keys = jax.random.split(jax.random.key(seed), BATCH)
    play = player_of(config, budget)
    if edits is None and budget in EDITED:
        edits = Edits(*(jnp.tile(jnp.asarray(x), (BATCH, 1)) for x in NOTHING))
        edits = edits._replace(repetition=edits.repetition[:, 0])
    tokens, count, verified = play(weights, control_of(asked, keys), edits)
    return first_tokens(tokens, count), np.asarray(verified)


BEFORE = (0.9, 0.2, 0.6, 1.0, 0.05, 0.5)
"""Confidences by the token before: very uneven, so that few sequences get most of the budget."""


@lru_cache
def random_weights() -> Weights:
    return cached_weights(VANILLA, "random")


@pytest.mark.parametrize("budget", [TIGHT, HALF, ALL])
def test_first_tokens_are_the_targets_at_every_budget(budget: int):
    expected = exact(random_weights().target)
    for weights in (
        told_weights(random_weights()),
        told_weights(random_weights(), head=True),
        told_weights(random_weights(), before=BEFORE),
    ):
        drawn, verified = serve(Asked(), weights, budget)
        assert p_value(drawn, expected) > FALSE_ALARM
        assert np.all(verified.sum(axis=0) == budget - BATCH)


@pytest.mark.parametrize(
    ("budget", "knowledge"),
    [(TIGHT, (0.01, 1, 1, 0.01, 1, 0.01)), (HALF, (1, 1, 0.01, 0.01, 1, 1))],
    ids=["tight", "half"],
)
def test_a_scheduler_that_has_seen_the_token_is_noticed(budget: int, knowledge: Any):
    """The same confidences are lossless when they know the token before the one they speak of."""
    expected = exact(random_weights().target)
    drawn, verified = serve(Asked(), told_weights(random_weights(), itself=knowledge), budget)
    assert p_value(drawn, expected) < NOTICED
    assert np.all(verified.sum(axis=0) == budget - BATCH)
    drawn, _ = serve(Asked(), told_weights(random_weights(), before=knowledge), budget)
    assert p_value(drawn, expected) > FALSE_ALARM


def test_with_room_for_everything_no_scheduler_has_a_choice():
    drawn, _ = serve(Asked(), told_weights(random_weights(), itself=BEFORE), ALL)
    assert p_value(drawn, exact(random_weights().target)) > FALSE_ALARM


def test_first_tokens_are_the_targets_without_a_confidence_head():
    """What drafts are judged by then is how likely their likeliest token was."""
    config = replace(VANILLA, enable_confidence_head=False, confidence_head_with_markov=False)
    weights = cached_weights(config, "random")
    drawn, verified = serve(Asked(), told_weights(weights, head=True), TIGHT, config)
    assert p_value(drawn, exact(weights.target)) > FALSE_ALARM
    assert len(np.unique(verified)) > 2


@pytest.mark.parametrize("head", [x for x in HEADS if x != "vanilla"])
def test_first_tokens_are_the_targets_with_every_markov_head(head: str):
    config = draft_config(head, head == "gated", head == "rnn")
    for kind in ("random", "perfect", "adversarial"):
        weights = cached_weights(config, kind)
        drawn, _ = serve(Asked(), told_weights(weights, before=BEFORE), TIGHT, config)
        assert p_value(drawn, exact(weights.target)) > FALSE_ALARM


def test_a_block_drafted_greedily_for_a_request_that_samples_is_judged_as_such():
    weights = told_weights(random_weights(), before=BEFORE)
    drawn, _ = serve(Asked(draft_temperature=0.0), weights, HALF)
    assert p_value(drawn, exact(random_weights().target)) > FALSE_ALARM


def transitions(temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0):
    """The random table's rows, truncated and renormalised: [V, V, V]."""
    logits = np.asarray(random_weights().target.logits, float)
    found = [kept(row, temperature, min_p, top_k, top_p) for row in logits]
    assert all(clear for _, clear in found)
    left = np.array([left for left, _ in found])
    weight = np.where(left, np.exp(logits / temperature), 0)
    return (weight / weight.sum(axis=1, keepdims=True)).reshape(V, V, V)


def chained(p: np.ndarray) -> np.ndarray:
    """Probability of every triple of first tokens."""
    a, b = PROMPT[-2:]
    return p[a, b][:, None, None] * p[b][:, :, None] * p


MIXED: dict[str, list[float]] = {
    "temperature": [1.0, 0.7, 1.3, 0.0],
    "min_p": [0.0, 0.15, 0.0, 0.4],
    "top_k": [0, 0, 4, 1],
    "top_p": [1.0, 1.0, 0.8, 0.5],
}


@pytest.mark.parametrize("greedily", [False, True], ids=["drafts_drawn", "drafts_greedy"])
def test_requests_that_draw_differently_are_served_side_by_side(greedily: bool):
    """Of every four sequences one is untruncated, one has min-p, one top-k and top-p, one is
    greedy."""
    row = np.arange(BATCH) % 4
    each = {name: np.array(values)[row] for name, values in MIXED.items()}
    asked = Asked(**each, draft_temperature=0.0 if greedily else None)
    drawn, _ = serve(asked, told_weights(random_weights(), before=BEFORE), HALF)
    for n in range(3):
        only = {name: values[n] for name, values in MIXED.items()}
        expected = chained(transitions(**only))  # pyright: ignore[reportArgumentType]
        assert p_value(drawn[row == n], expected) > FALSE_ALARM
        if n:
            assert p_value(drawn[row == n], exact(random_weights().target)) < NOTICED
    table = np.asarray(random_weights().target.logits).reshape(V, V, V)
    best = list(PROMPT[-2:])
    for _ in range(FIRST):
        best.append(int(table[best[-2], best[-1]].argmax()))  # pyright: ignore[reportArgumentType]
    assert np.all(drawn[row == 3] == best[2:])


def changes() -> tuple[Edits, np.ndarray]:
    """Edits, other ones for even and odd sequences, and the two tables of logits they leave."""
    logits = np.asarray(random_weights().target.logits, float)
    bias = np.array([[1.5, 0, 0, -2, 0, 0], [0, -np.inf, 0, 0, 1, 0]])
    penalty = np.array([[0, 0.5, 0.5, 0, 0, 1], [0, 0, -1, 0, 0, 0.25]])
    seen = np.array([[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0]], bool)
    repetition, allowed = np.array([1.8, 0.6]), np.array([0b111111, 0b110111])
    tables = []
    for n in range(2):
        one = np.where((allowed[n] >> np.arange(V)) & 1, logits, -np.inf) + bias[n]
        factor = np.where(one > 0, 1 / repetition[n], repetition[n])
        tables.append(np.where(seen[n], one * factor, one) - penalty[n])
    row = np.arange(BATCH) % 2
    given: Any = (
        jnp.uint32(allowed)[row][:, None],
        jnp.float32(bias)[row],
        jnp.asarray(seen)[row],
        jnp.float32(repetition)[row],
        jnp.float32(penalty)[row],
    )
    return Edits(*given), np.array(tables)


def drawn_from(logits: np.ndarray) -> np.ndarray:
    weight = np.exp(logits)
    return chained((weight / weight.sum(axis=1, keepdims=True)).reshape(V, V, V))


def test_edited_requests_draw_from_the_edited_target_in_plain_rounds():
    edits, tables = changes()
    drawn, verified = serve(Asked(), told_weights(random_weights()), PLAIN, edits=edits)
    for n in range(2):
        assert p_value(drawn[n::2], drawn_from(tables[n])) > FALSE_ALARM
        assert p_value(drawn[n::2], exact(random_weights().target)) < NOTICED
    assert not verified.any()


def test_edited_requests_that_draft_nothing_are_served_among_those_that_draft():
    edits, tables = changes()
    odd = np.arange(BATCH) % 2

    def only_even(x: Array, nothing: Any) -> Array:
        return x.at[1::2].set(nothing)

    edits = Edits(*map(only_even, edits, NOTHING))
    weights = told_weights(random_weights(), before=BEFORE)
    drawn, verified = serve(Asked(cap=G * odd), weights, HALF, edits=edits)
    assert p_value(drawn[0::2], drawn_from(tables[0])) > FALSE_ALARM
    assert p_value(drawn[1::2], exact(random_weights().target)) > FALSE_ALARM
    assert not verified[0::2].any() and np.all(verified[1::2].mean() > 1)


def test_plain_rounds_draw_from_the_target():
    drawn, _ = serve(Asked(), told_weights(random_weights()), PLAIN)
    assert p_value(drawn, exact(random_weights().target)) > FALSE_ALARM


def test_a_scheduler_that_admits_likely_tokens_gives_the_papers_wrong_answer():
    """Appendix A: a target of 0.7 and 0.3, a draft of halves. Admitted only where it drafted the
    first token, that token comes half the time, and in the other half with 0.7: 0.85 in all.

    The budget here has room for 0.45 of the drafts rather than half: 0.45 + 0.55 * 0.7.
    """
    logits = jnp.full((V, V), -50.0).at[:, :2].set(jnp.log(jnp.array([0.7, 0.3])))
    table = Table(jnp.tile(logits, (V, 1)), jnp.zeros((V * V, 1)))

    def draft_block(_: Any, __: Any, ___: Any, length: Any, anchor: Any, keys: Any, *rest: Any):
        tokens = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, 2))(keys)
        return Proposal(tokens, jnp.zeros((len(length), 1, 2)), jnp.ones(tokens.shape))

    draft = Draft(
        draft_length=1,
        prepare=lambda params: params,
        init_cache=lambda batch, capacity, dtype=None: jnp.zeros((batch, capacity)),
        extend_context=lambda params, cache, *rest: cache,
        draft_block=draft_block,
    )
    frozen = Frozen(jnp.zeros((V, 1)), jnp.zeros((1, 2)), jnp.arange(2))
    play = player(telling(draft), BATCH + 45 * BATCH // 100)
    keys = jax.random.split(jax.random.key(1), BATCH)
    share = {}
    for name, tables in {"before": {}, "itself": {"itself": (1, 0.5, 1, 1, 1, 1)}}.items():
        weights = told_weights(Weights(table, None, frozen), **tables)
        tokens, count, _ = play(weights, control_of(Asked(), keys, draft_length=1), None)
        share[name] = np.mean(first_tokens(tokens, count)[:, 0] == 0)
    assert abs(share["before"] - 0.7) < 0.03
    assert abs(share["itself"] - 0.835) < 0.03
