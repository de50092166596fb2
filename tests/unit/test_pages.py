"""Pages are held, found, evicted and forgotten as a naive model of them says; none is lost."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from dspark_jax.serve.pages import Pages

SIZE, COUNT = 2, 8
SALTS = st.sampled_from(["", "a", "b"])
# Few tokens, so that texts share beginnings.
TEXTS = st.lists(st.integers(0, 1), max_size=9).map(tuple)
Text = tuple[int, ...]
Known = tuple[str, Text]
"""A salt and everything up to the end of a page."""


class Naive:
    """The same by plain lists: who holds what, what is known, since when nobody holds it."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self.known: dict[Known, int] = {}
        self.idle: list[int] = []
        """Known pages that nobody holds, the longest unused first."""

    def beginnings(self, tokens: Text, salt: str) -> list[Known]:
        return [(salt, tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]

    def find(self, tokens: Text, salt: str) -> list[int]:
        found = []
        for beginning in self.beginnings(tokens, salt):
            if beginning not in self.known:
                break
            found.append(self.known[beginning])
        self.hold(found)
        return found

    def hold(self, pages: list[int]) -> None:
        self.held.update(pages)
        self.idle = [page for page in self.idle if page not in pages]

    def free(self) -> int:
        return COUNT - 1 - len(self.held) - len(self.idle)

    def evicted(self, count: int) -> list[int]:
        """Known pages that must be given up for so many new ones."""
        return self.idle[: max(0, count - self.free())]

    def publish(self, pages: list[int], tokens: Text, salt: str) -> None:
        for page, beginning in zip(pages, self.beginnings(tokens, salt), strict=False):
            if beginning not in self.known and page not in self.known.values():
                self.known[beginning] = page

    def forget(self, pages: list[int]) -> None:
        self.known = {k: page for k, page in self.known.items() if page not in pages}
        self.idle = [page for page in self.idle if page not in pages]

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.held -= Counter([page])
            if page not in self.held and page in self.known.values():
                self.idle.append(page)


class Machine(RuleBasedStateMachine):
    """Sequences of pages in any order of calls; every answer is compared with the naive one."""

    holders = Bundle("holders")

    @initialize()
    def begin(self) -> None:
        self.pages, self.naive = Pages(COUNT, SIZE), Naive()

    @rule(target=holders, tokens=TEXTS, salt=SALTS)
    def find(self, tokens: Text, salt: str):  # pyright: ignore[reportIncompatibleMethodOverride]
        found = self.pages.find(tokens, salt)
        assert found == self.naive.find(tokens, salt)
        return found if found else multiple()

    @rule(target=holders, count=st.integers(0, COUNT))
    def take(self, count: int):
        evicted, had = self.naive.evicted(count), self.naive.free() + len(self.naive.idle)
        taken = self.pages.take(count)
        if count > had:
            assert taken is None
            return multiple()
        assert taken is not None and len(set(taken)) == len(taken) == count
        assert not set(taken) & set(self.naive.held) and 0 not in taken
        # What is known is given up last, and of that the longest unused first.
        assert set(taken) & set(self.naive.idle) == set(evicted)
        self.naive.forget(evicted)
        self.naive.hold(taken)
        return taken if taken else multiple()

    @rule(pages=holders, tokens=TEXTS, salt=SALTS)
    def publish(self, pages: list[int], tokens: Text, salt: str) -> None:
        self.pages.publish(pages, tokens, salt)
        self.naive.publish(pages, tokens, salt)

    @rule(pages=consumes(holders))
    def release(self, pages: list[int]) -> None:
        self.pages.release(pages)
        self.naive.release(pages)

    @rule(pages=holders)
    def withdraw(self, pages: list[int]) -> None:
        self.pages.withdraw(pages)
        self.naive.forget(pages)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "pages"):
            return
        assert self.pages.available + len(self.naive.held) == COUNT - 1
        assert self.pages.usage == len(self.naive.held) / (COUNT - 1)


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_any_calls = Machine.TestCase


def test_a_text_is_found_as_far_as_whole_pages_know_it():
    pages = Pages(COUNT, SIZE)
    held = pages.take(3)
    assert held is not None
    pages.publish(held, (1, 2, 3, 4, 5), "")
    assert pages.find((1, 2, 3, 4, 5, 6), "") == held[:2]
    assert pages.find((1, 2, 3, 9), "") == held[:1]
    assert pages.find((1,), "") == pages.find((9, 2, 3, 4), "") == []


def test_a_page_is_known_by_all_that_stands_before_it():
    pages = Pages(COUNT, SIZE)
    held = pages.take(2)
    assert held is not None
    pages.publish(held, (1, 2, 3, 4), "")
    assert pages.find((3, 4), "") == pages.find((3, 4, 3, 4), "") == []


def test_salts_are_worlds_apart():
    pages = Pages(COUNT, SIZE)
    mine, theirs = pages.take(1), pages.take(1)
    assert mine is not None and theirs is not None
    pages.publish(mine, (1, 2), "mine")
    assert pages.find((1, 2), "theirs") == pages.find((1, 2), "") == []
    pages.publish(theirs, (1, 2), "theirs")
    assert pages.find((1, 2), "mine") == mine and pages.find((1, 2), "theirs") == theirs


def test_the_end_of_a_text_is_forgotten_before_its_beginning():
    pages = Pages(4, SIZE)
    held = pages.take(3)
    assert held is not None
    pages.publish(held, (1, 2, 3, 4, 5, 6), "")
    pages.release(held)
    for left in (2, 1, 0):
        assert pages.take(1) is not None
        found = pages.find((1, 2, 3, 4, 5, 6), "")
        assert found == held[:left]
        pages.release(found)


def test_what_was_found_lately_is_kept_longer():
    pages = Pages(3, SIZE)
    for token in (1, 2):
        held = pages.take(1)
        assert held is not None
        pages.publish(held, (token, token), "")
        pages.release(held)
    pages.release(pages.find((1, 1), ""))
    assert pages.take(1) is not None
    assert pages.find((2, 2), "") == [] and len(pages.find((1, 1), "")) == 1


def test_withdrawn_pages_are_free_once_let_go():
    pages = Pages(COUNT, SIZE)
    held = pages.take(COUNT - 1)
    assert held is not None and pages.take(1) is None
    pages.publish(held, tuple(range(SIZE * COUNT)), "")
    pages.withdraw(held)
    assert pages.find(tuple(range(SIZE * COUNT)), "") == []
    pages.release(held)
    assert pages.available == COUNT - 1 and pages.usage == 0


def test_without_caching_nothing_is_ever_found():
    pages = Pages(COUNT, SIZE, caching=False)
    held = pages.take(1)
    assert held is not None
    pages.publish(held, (1, 2), "")
    assert pages.find((1, 2), "") == []
    pages.release(held)
    assert pages.available == COUNT - 1


@given(TEXTS, SALTS)
def test_pages_that_two_hold_are_free_when_both_let_go(tokens: Text, salt: str):
    pages = Pages(COUNT, SIZE)
    held = pages.take(len(tokens) // SIZE)
    assert held is not None
    pages.publish(held, tokens, salt)
    again = pages.find(tokens, salt)
    assert again == held
    pages.release(held)
    assert pages.available == COUNT - 1 - len(held)
    pages.release(again)
    assert pages.available == COUNT - 1


def test_letting_go_of_what_nobody_holds_is_an_error():
    with pytest.raises(KeyError):
        Pages(COUNT, SIZE).release([1])
