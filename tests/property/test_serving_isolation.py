"""What a sequence is answered depends on nothing that stands beside it, not in one bit.

Numbers are compared as they are, of one compiled program: tokens, log-probabilities, confidences
and everything that is left in the sequence's pages.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.paged_loop import Result
from tests.property.server import (
    FULL,
    GROUP,
    OWNED,
    PAGE,
    PAGES,
    PLAIN,
    PROMPTS,
    TARGETS,
    TIGHT,
    TOKENS,
    G,
    Member,
    Server,
    pages_needed,
    plain_answers,
    script_of,
)

pytestmark = pytest.mark.optimised

ROUNDS = 4
DOZEN = 12


class Life(NamedTuple):
    """All that rounds said to a sequence, and what is left in its pages."""

    said: list[np.ndarray]
    confidence: list[np.ndarray]
    pages: list[np.ndarray]


def member(n: int, prompt: int) -> Member:
    """Sequence n of a test: it has slot n and some of the n-th dozen of pages, in no order."""
    need, start = pages_needed(PROMPTS[prompt]), 1 + DOZEN * n
    pages = np.random.default_rng(n).permutation(np.arange(start, start + need))
    return Member(prompt, n, pages, PROMPTS[prompt])


def owned(x: Member) -> np.ndarray:
    return x.pages[x.pages > 0]


def numbers(result: Result, row: int) -> list[np.ndarray]:
    """All that a round says to one sequence, without what stands after its last token."""
    real = int(result.accepted[row]) + 1
    assert result.logprobs is not None
    told = [np.asarray(x)[row, :real] for x in (result.tokens, *result.logprobs)]
    return [*told, *(np.asarray(x)[row] for x in (result.accepted, result.verified, result.finite))]


def same(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def life(name: str, budget: int, company: tuple[Any, Sequence[int]], row: int, seed: int) -> Life:
    """Of the sequence of prompt 1 in row `row`, others in the rest; the seed is of stale rows."""
    rows, caps = company
    server, me = Server(name, stale_seed=seed), member(0, 1)
    others = [None if p is None else member(n + 1, p) for n, p in enumerate(rows)]
    present = [x for x in others if x is not None]
    members: list[Member | None] = [*others]
    members.insert(row, me)
    cap = np.insert(np.array(caps), row, G)
    server.script(script_of(name, [me, *present]))
    server.change(jnp.zeros_like, owned(me))  # so that all that is in them can be compared
    for x in (me, *present):
        server.read(x.prompt, x.pages)
    results = [server.round(budget, members, cap) for _ in range(ROUNDS)]
    said = [x for result in results for x in numbers(result, row)]
    confidence = [np.asarray(x.confidence)[row] for x in results]
    return Life(said, confidence, server.pages(owned(me)))


COMPANIES: tuple[Any, ...] = (
    ((None, None, None), (0, 0, 0)),
    ((2, None, 4), (G, 0, 1)),
    ((3, 7, 8), (2, G, G)),
    ((3, 7, 8), (0, 0, 0)),
)
"""Who else is served, and their caps: rows of the same sequence stand at other flat places."""


@pytest.mark.parametrize("budget", [PLAIN, FULL])
@pytest.mark.parametrize("name", TARGETS)
def test_neither_neighbours_nor_places_change_a_bit(name: str, budget: int):
    """The sequence stands in every row of the round, and its verified rows at other flat places."""
    first = life(name, budget, COMPANIES[0], row=0, seed=0)
    for row in range(GROUP):
        alone = life(name, budget, COMPANIES[0], row=row, seed=0)
        assert same(alone.said, first.said) and same(alone.pages, first.pages)
        # Its place in the batch, not its neighbours, may change how a processor rounds a sigmoid.
        np.testing.assert_allclose(alone.confidence, first.confidence, rtol=3e-7)
        for seed, company in enumerate(COMPANIES[1:], start=1):
            among = life(name, budget, company, row=row, seed=seed)
            assert same(among.said, alone.said) and same(among.pages, alone.pages)
            assert same(among.confidence, alone.confidence)


FOUR = (1, 2, 4, 7)


def four() -> list[Member]:
    return [member(n, prompt) for n, prompt in enumerate(FOUR)]


def poisoned(name: str, victim: int | None, only: str | None = None) -> tuple[Server, list[Member]]:
    """A server that has read four prompts, and nothing but NaN in one sequence's pages."""
    server, members = Server(name, stale_seed=1), four()
    server.script(script_of(name, members))
    for x in members:
        server.read(x.prompt, x.pages)
    if victim is not None:
        server.change(lambda rows: jnp.full_like(rows, jnp.nan), owned(members[victim]), only)
    return server, members


@pytest.mark.parametrize("victim", range(GROUP))
@pytest.mark.parametrize(
    ("name", "budget"),
    [("glm", PLAIN), ("glm", FULL), ("qwen3", PLAIN), ("qwen3", TIGHT), ("qwen3", FULL)],
)
def test_what_is_not_a_number_stays_with_its_sequence(name: str, budget: int, victim: int):
    """The others' numbers keep every bit; in a tight budget they may get the room it leaves."""
    (ill, ill_members), (well, well_members) = poisoned(name, victim), poisoned(name, None)
    others = [n for n in range(GROUP) if n != victim]
    for _ in range(ROUNDS):
        sick, sound = ill.round(budget, ill_members), well.round(budget, well_members)
        assert not sick.finite[victim] and np.all(sick.finite[others]) and np.all(sound.finite)
        for n in others:
            ill_members[n].hear(sick, n)
            well_members[n].hear(sound, n)
            if budget != TIGHT:
                assert same(numbers(sick, n), numbers(sound, n))
                assert np.array_equal(sick.confidence[n], sound.confidence[n])
    for n in others:
        for x in (ill_members[n], well_members[n]):
            spoken = plain_answers(name)[x.number, : len(x.tokens)].tolist()
            assert x.tokens[:TOKENS] == spoken
        if budget != TIGHT:
            mine, theirs = (x.pages(owned(ill_members[n])) for x in (ill, well))
            assert same(mine, theirs)
    assert not any(np.any(x) for x in ill.pages(0))
    free = np.setdiff1d(np.arange(PAGES), np.concatenate([owned(x) for x in ill_members]))
    assert same(ill.pages(free), well.pages(free))


@pytest.mark.parametrize("name", TARGETS)
def test_a_draft_without_numbers_changes_no_token(name: str):
    server, members = poisoned(name, 2, only="draft")
    while min(len(x.tokens) for x in members) < TOKENS:
        result = server.round(FULL, members)
        assert np.all(result.finite)
        for row, x in enumerate(members):
            x.hear(result, row)
    for x in members:
        assert x.tokens[:TOKENS] == plain_answers(name)[x.number].tolist()


@pytest.mark.parametrize("scrubbed", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_scrubbed_pages_are_as_good_as_new(name: str, scrubbed: bool):
    """And those that are not are not: nothing times what is not a number is not a number."""
    server, members = poisoned(name, 1)
    server.round(FULL, members)
    before = server.pages(owned(members[0]))
    if scrubbed:
        padded = jnp.asarray(members[1].pages)  # with zeros, as the engine pads them
        server.state = server.models.scrub(server.state, padded)
        assert not any(np.any(x) for x in server.pages(owned(members[1])))
        assert not any(np.any(x) for x in server.pages(0))
        assert same(before, server.pages(owned(members[0])))
    again = member(1, FOUR[1])
    server.read(again.prompt, again.pages)
    while len(again.tokens) < TOKENS:
        result = server.round(FULL, [None, again])
        again.hear(result, 1)
        assert result.finite[1] == scrubbed
    if scrubbed:
        assert again.tokens[:TOKENS] == plain_answers(name)[again.number].tolist()


@pytest.mark.parametrize("budget", [PLAIN, FULL])
@pytest.mark.parametrize("name", TARGETS)
def test_what_does_not_fit_a_sequences_pages_is_written_nowhere(name: str, budget: int):
    """A sequence that decodes on past its pages, until its table ends and further."""
    server, few = Server(name, stale_seed=2), 2
    x = member(0, 1)
    x.pages[few:] = 0
    server.script(script_of(name, [member(0, 1)], error_rate=0))
    server.read(x.prompt, x.pages)
    others = np.setdiff1d(np.arange(PAGES), owned(x))
    before, kept = server.pages(others), None
    for _ in range(PAGE * (OWNED + 1)):
        server.round(budget, [x])
        length = int(server.state.length[x.slot])
        if kept is None and length > few * PAGE:
            kept = server.pages(owned(x))
    assert int(server.state.length[x.slot]) > OWNED * PAGE
    assert same(server.pages(others), before)
    assert kept is not None and same(server.pages(owned(x)), kept)
