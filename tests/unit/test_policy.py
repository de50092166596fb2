"""A round's budget is the one that promises most tokens per second, by a brute force."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.serve.policy import MARGIN, PROBE_EVERY, Policy

G, GROUP = 4, 4
BUDGETS = (GROUP, 2 * GROUP, 3 * GROUP, (G + 1) * GROUP)
CONFIDENCES = st.lists(st.floats(0, 1), min_size=G, max_size=G) | st.just([])
ROUNDS = st.lists(
    st.tuples(CONFIDENCES, st.integers(0, G)), min_size=1, max_size=GROUP
)  # of every sequence: its last block's confidences, its cap
SECONDS = st.tuples(*(st.floats(0.5, 4.0) for _ in BUDGETS))


@dataclass
class Priced(Policy):
    """A policy and what the rounds it is asked about cost."""

    seconds: dict[int, float] = field(default_factory=dict)


def policy_of(seconds: tuple[float, ...], kind: str = "adaptive") -> Priced:
    table = dict(zip(BUDGETS, seconds, strict=True))
    return Priced(kind, G, seconds=table)  # pyright: ignore[reportArgumentType]


def rates(policy: Priced, rounds: list[tuple[list[float], int]]) -> dict[int, float]:
    """Tokens per second of every budget: anchors' own tokens and the likeliest drafts."""
    survivals: list[float] = []
    for confidence, cap in rounds:
        survival = 1.0
        for j in range(cap):
            survival = survival * confidence[j] if confidence else policy.survival[j]
            survivals.append(survival)
    found = {}
    for budget in BUDGETS:
        room = 0 if budget == BUDGETS[0] else budget - len(rounds)
        promised = len(rounds) + sum(sorted(survivals, reverse=True)[:room])
        found[budget] = promised / policy.seconds[budget]
    return found


def ask(policy: Priced, rounds: list[tuple[list[float], int]]) -> int:
    return policy.budget(policy.seconds, [c for c, _ in rounds], [cap for _, cap in rounds])


@settings(max_examples=300)
@given(SECONDS, ROUNDS, st.booleans())
def test_the_budget_is_the_best_unless_too_little_better_than_what_was(
    seconds: tuple[float, ...], rounds: list[tuple[list[float], int]], drafting: bool
):
    policy = policy_of(seconds)
    policy.drafting = drafting
    rate, chosen = rates(policy, rounds), ask(policy, rounds)
    if not any(cap for _, cap in rounds):
        assert chosen == BUDGETS[0]
        return
    best = max(rate[b] for b in BUDGETS[1:])
    needed = rate[BUDGETS[0]] * (1 / MARGIN if drafting else MARGIN)
    if abs(best / needed - 1) < 1e-9:  # rounding decides
        return
    if best > needed:
        assert chosen != BUDGETS[0] and rate[chosen] == pytest.approx(best, rel=1e-9)
    else:
        assert chosen == BUDGETS[0]


def advantage(policy: Priced, gain: float) -> list[tuple[list[float], int]]:
    """Sequences whose drafts promise `gain` times the tokens per second of plain rounds."""
    rounds = [([1.0] * G, G)] * GROUP
    plain = policy.seconds[BUDGETS[0]]
    policy.seconds = dict.fromkeys(BUDGETS, 1e9)
    policy.seconds |= {BUDGETS[0]: plain, BUDGETS[-1]: (G + 1) * plain / gain}
    return rounds


def test_a_small_advantage_changes_nothing_and_a_large_one_does():
    for gain, drafting in ((1 / 1.02, True), (1 / 1.04, False), (1.02, False), (1.04, True)):
        policy = policy_of((1.0,) * len(BUDGETS))
        policy.drafting = gain < 1
        chosen = ask(policy, advantage(policy, gain))
        assert (chosen == BUDGETS[-1]) == drafting and policy.drafting == drafting


def test_choices_do_not_flutter_about_the_break_even():
    policy, rng = policy_of((1.0,) * len(BUDGETS)), np.random.default_rng(0)
    chosen = [ask(policy, advantage(policy, gain)) for gain in rng.uniform(0.98, 1.02, 50)]
    assert set(chosen) == {BUDGETS[-1]}


def test_rounds_without_drafts_probe_now_and_then():
    policy = policy_of((1.0,) * len(BUDGETS))
    hopeless = advantage(policy, 0.2)
    chosen = [ask(policy, hopeless) for _ in range(3 * PROBE_EVERY)]
    probes = [i + 1 for i, b in enumerate(chosen) if b != BUDGETS[0]]
    assert probes == [PROBE_EVERY, 2 * PROBE_EVERY, 3 * PROBE_EVERY]
    assert not policy.drafting


def test_the_count_to_a_probe_starts_again_when_drafts_pay():
    policy = policy_of((1.0,) * len(BUDGETS))
    for _ in range(PROBE_EVERY - 1):
        assert ask(policy, advantage(policy, 0.2)) == BUDGETS[0]
    assert ask(policy, advantage(policy, 2.0)) == BUDGETS[-1]
    for _ in range(PROBE_EVERY - 1):
        assert ask(policy, advantage(policy, 0.2)) == BUDGETS[0]


def test_a_group_that_may_not_draft_is_plain_whatever_the_kind():
    for kind in ("fixed", "adaptive"):
        assert ask(policy_of((1.0,) * len(BUDGETS), kind), [([1.0] * G, 0)] * 3) == BUDGETS[0]


@given(ROUNDS)
def test_the_fixed_kind_has_room_for_every_draft_and_no_more(
    rounds: list[tuple[list[float], int]],
):
    chosen, caps = ask(policy_of((1.0,) * len(BUDGETS), "fixed"), rounds), [c for _, c in rounds]
    if not any(caps):
        return
    rows = len(caps) + sum(caps)
    assert chosen >= rows
    assert all(smaller < rows for smaller in BUDGETS if smaller < chosen)


def test_drafts_that_say_nothing_are_judged_by_what_became_of_others():
    always, never = (policy_of((1.0, 1.2, 1.4, 2.0)) for _ in range(2))
    for _ in range(500):
        always.observe(G, G)
        never.observe(0, G)
    assert np.all(always.survival > 0.99) and np.all(never.survival < 0.01)
    silent: list[tuple[list[float], int]] = [([], G)] * GROUP
    assert ask(always, silent) == BUDGETS[-1] and ask(never, silent) == BUDGETS[0]


def test_slots_past_what_was_verified_are_judged_only_after_a_refusal():
    policy = policy_of((1.0,) * len(BUDGETS))
    before = policy.survival.copy()
    policy.observe(2, 2)
    assert np.all(policy.survival[:2] > before[:2])
    assert np.array_equal(policy.survival[2:], before[2:])
    policy = policy_of((1.0,) * len(BUDGETS))
    policy.observe(1, 2)
    assert policy.survival[0] > before[0] and np.all(policy.survival[1:] < before[1:])


def test_what_a_draft_says_of_itself_is_taken_as_it_has_turned_out():
    boastful, modest = (policy_of((1.0, 1.2, 1.4, 2.0)) for _ in range(2))
    for _ in range(500):
        boastful.observe(0, G, [0.9] * G)
        modest.observe(G, G, [0.3] * G)
    sure: list[tuple[list[float], int]] = [([0.9] * G, G)] * GROUP
    unsure: list[tuple[list[float], int]] = [([0.3] * G, G)] * GROUP
    assert ask(policy_of((1.0, 1.2, 1.4, 2.0)), sure) == BUDGETS[-1]
    assert ask(boastful, sure) == BUDGETS[0] and ask(modest, unsure) == BUDGETS[-1]


def test_what_is_never_verified_of_a_block_counts_for_nothing():
    chance = [0.9, 0.8, 0.7, 0.6]
    chosen = []
    for said in (chance, [*chance, 0.99, 0.99]):
        policy = policy_of((1.0, 1.1, 1.2, 1.3))
        policy.observe(2, G, said)
        chosen.append(policy.budget(policy.seconds, [said] * GROUP, [G] * GROUP))
    assert chosen[0] == chosen[1] > BUDGETS[0]
