"""Greedy tokens that are served are plain decoding's, whatever else the server does meanwhile.

Sequences come and go, their pages lie anywhere and hold what others left there, and every round
serves some of them in any order within some budget.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.property.server import (
    FULL,
    GROUP,
    OWNED,
    PAGES,
    PLAIN,
    PROMPTS,
    SLOTS,
    TARGETS,
    TIGHT,
    TOKENS,
    G,
    Member,
    Server,
    V,
    pages_needed,
    plain_answers,
    script_of,
)

pytestmark = pytest.mark.optimised


def test_the_example_is_worth_checking():
    for name in TARGETS:
        answers = plain_answers(name)
        assert np.mean([len(set(row)) for row in answers]) > V / 3
        assert len({tuple(row) for row in answers}) == len(PROMPTS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TARGETS)
def test_served_tokens_are_plain_decodings(name: str, seed: int):
    """More sequences than slots, in pages and slots that others have left behind."""
    rng = np.random.default_rng(seed)
    server = Server(name, stale_seed=seed)
    waiting = [int(n) for n in rng.permutation(len(PROMPTS))]
    free_pages, free_slots = [*range(1, PAGES)], [*range(SLOTS)]
    serving, lengths, finished = list[Member](), set[int](), 0
    while waiting or serving:
        if waiting and free_slots and len(free_pages) >= OWNED and rng.random() < 0.5:
            prompt = PROMPTS[waiting[0]]
            rng.shuffle(free_pages)
            rng.shuffle(free_slots)
            pages = [free_pages.pop() for _ in range(pages_needed(prompt))]
            member = Member(waiting.pop(0), free_slots.pop(), np.array(pages, np.int32), prompt)
            server.read(prompt, member.pages)
            serving.append(member)
            server.script(script_of(name, serving, seed=seed))
        size = int(rng.integers(0, min(GROUP, len(serving)) + 1))
        rows: list[Member | None] = [serving[i] for i in rng.permutation(len(serving))[:size]]
        rows += [None] * (GROUP - size)
        rng.shuffle(rows)  # pyright: ignore[reportArgumentType]
        budget, cap = rng.choice([PLAIN, TIGHT, FULL, FULL]), rng.integers(0, G + 2, GROUP)
        result = server.round(int(budget), rows, cap)
        for row, member in enumerate(rows):
            if member is not None:
                member.hear(result, row)
                lengths.add(int(result.accepted[row]))
                assert result.finite[row]
        for member in [x for x in serving if len(x.tokens) >= TOKENS]:
            assert member.tokens[:TOKENS] == plain_answers(name)[member.number].tolist()
            serving.remove(member)
            free_slots.append(member.slot)
            free_pages += member.pages[member.pages > 0].tolist()
            finished += 1
    assert finished == len(PROMPTS) and lengths == set(range(G + 1))
    assert not any(np.any(x) for x in server.pages(0))


def entered(server: Server, numbers: Sequence[int], seed: int = 0) -> list[Member]:
    """Sequences with these prompts, read, in slots and pages drawn at random."""
    rng, members = np.random.default_rng(seed), list[Member]()
    pages, slots = rng.permutation(np.arange(1, PAGES)), rng.permutation(SLOTS)
    for n, slot in zip(numbers, slots, strict=False):
        need = pages_needed(PROMPTS[n])
        members.append(Member(n, int(slot), pages[:need], PROMPTS[n]))
        pages = pages[need:]
        server.read(PROMPTS[n], members[-1].pages)
    return members


def say(server: Server, members: list[Member], budget: int, rounds: int, cap: Any = G) -> Any:
    """So many rounds of these: (accepted, verified) [rounds, members]."""
    results = [server.round(budget, members, cap) for _ in range(rounds)]
    for result in results:
        for row, member in enumerate(members):
            member.hear(result, row)
    for member in members:
        spoken = plain_answers(server.name)[member.number, : len(member.tokens)]
        assert member.tokens[:TOKENS] == spoken.tolist()
    both = (np.stack([x.accepted for x in results]), np.stack([x.verified for x in results]))
    return tuple(x[:, : len(members)] for x in both)


ROUNDS = TOKENS // (G + 1)


@pytest.mark.parametrize("budget", [TIGHT, FULL])
@pytest.mark.parametrize("name", TARGETS)
def test_of_a_draft_that_is_always_right_everything_verified_is_accepted(name: str, budget: int):
    server = Server(name)
    members = entered(server, range(GROUP))
    server.script(script_of(name, members, error_rate=0))
    accepted, verified = say(server, members, budget, ROUNDS)
    assert np.array_equal(accepted, verified)
    assert np.all(verified.sum(axis=1) == budget - GROUP)


@pytest.mark.parametrize("name", TARGETS)
def test_of_a_draft_that_is_always_wrong_nothing_is_accepted(name: str):
    server = Server(name)
    members = entered(server, range(GROUP))
    server.script(script_of(name, members, error_rate=1))
    accepted, verified = say(server, members, FULL, TOKENS)
    assert not accepted.any() and np.all(verified == G)


@pytest.mark.parametrize("wrong", range(G))
def test_of_a_draft_that_is_wrong_from_a_slot_on_all_before_it_is_accepted(wrong: int):
    server = Server("qwen3")
    members = entered(server, range(GROUP))
    script = script_of("qwen3", members, error_rate=0)
    # What follows the first error is judged by nobody, right or wrong.
    for later in (jnp.arange(G) >= wrong, jnp.arange(G) == wrong):
        server.script(script._replace(wrong_slot=later.astype(jnp.int32)))
        accepted, _ = say(server, members, FULL, 2)
        assert np.all(accepted == wrong)


def test_caps_bound_what_is_verified_and_accepted():
    server, cap = Server("qwen3"), np.array([0, 1, 3, G + 4])
    members = entered(server, range(GROUP))
    server.script(script_of("qwen3", members, error_rate=0))
    accepted, verified = say(server, members, FULL, ROUNDS, cap)
    assert np.all(accepted == verified) and np.all(verified == np.minimum(cap, G))
