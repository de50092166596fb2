"""Drafts are admitted as a brute force would admit them, and rows packed as a loop packs them."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dspark_jax.schedule import pack, verify_lengths, worth_verifying

N, G = 4, 3
WIDTH, ROWS, BEYOND = G + 1, N * (G + 1) + 3, 1 << 20
# Products of these are exact, so that equal survivals are equal.
TYING = arrays.arrays(np.float32, (N, G), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
ANY = arrays.arrays(np.float32, (N, G), elements=st.floats(0, 1, width=32))
CAPS = arrays.arrays(np.int32, N, elements=st.integers(0, G + 2))
BUDGETS = st.integers(0, N * G + 2)
LENGTHS = [np.array(x) for x in itertools.product(range(G + 1), repeat=N)]

admit = jax.jit(verify_lengths)
lay = jax.jit(pack, static_argnums=(3, 4))


def admitted(confidence: np.ndarray, cap: np.ndarray, budget: int) -> np.ndarray:
    return np.asarray(admit(confidence, cap, jnp.asarray(budget)))


def survivals(confidence: np.ndarray) -> np.ndarray:
    """[N, G + 1]: what so many admitted drafts of a sequence promise together."""
    survival = np.cumprod(confidence.astype(float), axis=1)
    return np.concatenate([np.zeros((N, 1)), np.cumsum(survival, axis=1)], axis=1)


def in_order(confidence: np.ndarray, cap: np.ndarray, budget: int) -> np.ndarray:
    """By a sorted list: likeliest first, then the earlier slot, then the earlier sequence."""
    survival = np.cumprod(confidence, axis=1)
    slots = [(-survival[n, j], j, n) for n in range(N) for j in range(min(cap[n], G))]
    lengths = np.zeros(N, int)
    for _, j, n in sorted(slots)[:budget]:
        assert j == lengths[n], "what is admitted is the beginning of a block"
        lengths[n] += 1
    return lengths


@settings(deadline=None, max_examples=150)
@given(ANY | TYING, CAPS, BUDGETS)
def test_the_budget_is_spent_and_nothing_better_can_be_bought(
    confidence: np.ndarray, cap: np.ndarray, budget: int
):
    lengths, cap = admitted(confidence, cap, budget), np.minimum(cap, G)
    assert lengths.sum() == min(budget, cap.sum())
    assert np.all((lengths >= 0) & (lengths <= cap))
    worth, row = survivals(confidence), np.arange(N)
    allowed = (x for x in LENGTHS if x.sum() == lengths.sum() and np.all(x <= cap))
    best = max(worth[row, x].sum() for x in allowed)
    assert worth[row, lengths].sum() >= best - 1e-5


@settings(deadline=None, max_examples=150)
@given(TYING, CAPS, BUDGETS)
def test_of_equals_the_earlier_slot_then_the_earlier_sequence_is_admitted(
    confidence: np.ndarray, cap: np.ndarray, budget: int
):
    assert np.array_equal(admitted(confidence, cap, budget), in_order(confidence, cap, budget))


@settings(deadline=None, max_examples=60)
@given(TYING, TYING, CAPS, BUDGETS, st.integers(0, N - 1), st.integers(0, G - 1))
def test_whether_a_slot_is_admitted_does_not_depend_on_later_slots_of_its_block(
    confidence: np.ndarray, other: np.ndarray, cap: np.ndarray, budget: int, n: int, j: int
):
    changed = confidence.copy()
    changed[n, j + 1 :] = other[n, j + 1 :]
    before, after = (admitted(x, cap, budget)[n] for x in (confidence, changed))
    assert (before > j) == (after > j)


@pytest.mark.parametrize("width", [3, 7, 15, 16])
def test_survival_never_rises_along_a_block_even_by_rounding(width: int):
    """Where it did, a slot could be admitted for the sake of a later one, which has seen it."""
    steps = np.random.default_rng(width).integers(0, 4, (2000, width))
    near_one = (1 - steps * 2.0**-24).astype(np.float32)
    survival = np.asarray(jax.jit(lambda x: jnp.cumprod(x, axis=1))(near_one))
    assert np.all(np.diff(survival, axis=1) <= 0)


SECONDS = arrays.arrays(
    np.float32, N * WIDTH + 1, elements=st.sampled_from([0.5, 0.75, 1, 1.25, 4])
)
worth = jax.jit(worth_verifying)


def by_algorithm_1(chance: np.ndarray, cap: np.ndarray, seconds: np.ndarray) -> int:
    """The paper's loop, in float32."""
    survival = np.cumprod(chance, axis=1)
    slots = sorted(-survival[n, j] for n in range(N) for j in range(min(cap[n], G)))
    taken, promised = 0, np.float32(N)
    best = promised / seconds[N]
    for negative in slots:
        promised = promised - negative
        if not promised / seconds[N + taken + 1] > best:
            break
        taken, best = taken + 1, promised / seconds[N + taken + 1]
    return taken


@settings(deadline=None, max_examples=150)
@given(TYING, CAPS, SECONDS)
def test_as_many_are_worth_verifying_as_the_papers_loop_takes(
    chance: np.ndarray, cap: np.ndarray, seconds: np.ndarray
):
    found = int(worth(chance, cap, jnp.asarray(N), seconds))
    assert found == by_algorithm_1(chance, cap, seconds)


@settings(deadline=None, max_examples=150)
@given(TYING, TYING, CAPS, SECONDS, st.integers(0, N - 1), st.integers(0, G - 1), st.integers(1, 5))
def test_algorithm_1_looks_at_no_later_slot_whatever_it_is_rounded_up_to(
    chance: np.ndarray,
    other: np.ndarray,
    cap: np.ndarray,
    seconds: np.ndarray,
    n: int,
    j: int,
    step: int,
):
    changed = chance.copy()
    changed[n, j + 1 :] = other[n, j + 1 :]
    lengths = []
    for x in (chance, changed):
        wanted = int(worth(x, cap, jnp.asarray(N), seconds))
        lengths.append(admitted(x, cap, -(-wanted // step) * step)[n])
    assert (lengths[0] > j) == (lengths[1] > j)


def test_what_would_pay_past_one_that_does_not_is_left():
    """Appendix A's counterexample: the second slot knows what was drafted in the first."""
    seconds = np.array([1, 1, 1.6, 1.7], np.float32)
    for second in (1.0, 0.0):
        chance = np.array([[0.5, second]], np.float32)
        assert worth(chance, np.array([2]), jnp.asarray(1), seconds) == 0
    assert 2.0 / seconds[3] > 1 / seconds[1]


def test_a_sequence_without_numbers_takes_nothing_from_the_others():
    confidence = np.full((N, G), 0.5, np.float32)
    confidence[1] = np.nan
    lengths = admitted(confidence, np.full(N, G, np.int32), 3 * G)
    assert np.array_equal(lengths[[0, 2, 3]], [G] * 3)


class Packed(NamedTuple):
    """What `pack` returns, by a loop."""

    sequence: list[int]
    offset: list[int]
    position: list[int]
    places: np.ndarray


def by_loop(active: Any, length: Any, verify_length: Any, rows: int) -> Packed:
    packed = Packed([], [], [], np.full((N, WIDTH), BEYOND))
    for n in range(N):
        for j in range(verify_length[n] + 1 if active[n] else 0):
            packed.sequence.append(n)
            packed.offset.append(j)
            packed.position.append(length[n] + j)
            packed.places[n, j] = length[n] + j
    left = rows - len(packed.sequence)
    packed.sequence.extend([N] * left)
    packed.offset.extend([WIDTH] * left)
    packed.position.extend([BEYOND] * left)
    return packed


@settings(deadline=None, max_examples=100)
@given(
    arrays.arrays(bool, N),
    arrays.arrays(np.int32, N, elements=st.integers(0, 900)),
    arrays.arrays(np.int32, N, elements=st.integers(0, G)),
    st.sampled_from([ROWS, N * WIDTH]),
)
def test_every_admitted_row_stands_once_and_the_rest_belong_nowhere(
    active: np.ndarray, length: np.ndarray, verify_length: np.ndarray, rows: int
):
    places, position = lay(active, length, verify_length, (rows, WIDTH), BEYOND)
    wanted = by_loop(active, length, verify_length, rows)
    assert places.sequence.tolist() == wanted.sequence
    assert places.offset.tolist() == wanted.offset
    assert position[:, 0].tolist() == wanted.position
    assert np.array_equal(places.position, wanted.places)


def test_a_round_that_is_exactly_full_has_room_for_all():
    active, length = np.array([True, False, True, True]), np.array([5, 6, 7, 8], np.int32)
    verify_length = np.array([2, 3, 0, 3], np.int32)
    places, position = lay(active, length, verify_length, (8, WIDTH), BEYOND)
    assert places.sequence.tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert places.offset.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert position[:, 0].tolist() == [5, 6, 7, 7, 8, 9, 10, 11]
