"""Rows that plain rounds hold back reach the draft as if it had heard of them at once."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dspark_jax.paged_loop import HELD
from dspark_jax.paged_upkeep import Behind
from dspark_jax.paged_words import Told, views
from dspark_jax.serve.batch import Batch
from dspark_jax.serve.messages import Delta, Work
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.programs import Programs, Shape
from dspark_jax.serve.rating import Head
from dspark_jax.serve.sequence import Sequence
from tests.property.server import HELD_BACK, OWNED, PLAIN, PROMPTS, Member, Server
from tests.property.test_engine import DRAFT, GREEDY, LIMIT, PAGE, ROOMY, programs
from tests.property.test_greedy_equals_plain import PROMPTS as PROMPTS_OF

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("counts", [(1, 3), (HELD, 7), (5, HELD)])
def test_rows_told_late_are_those_told_at_once(counts: tuple[int, int]) -> None:
    """Two sequences, told after so many rounds each, time and again; the rows go around."""
    found = []
    for budget in (PLAIN, HELD_BACK):
        server = Server("qwen3", stale_seed=3)
        members = [
            Member(n, slot, 1 + slot * OWNED + np.arange(OWNED), PROMPTS[n])
            for slot, n in enumerate((4, 7))
        ]
        for member in members:
            server.read(member.prompt, member.pages)
        held = [0, 0]
        for _ in range(24):
            server.round(budget, members)
            held = [n + 1 for n in held]
            late = [i for i, n in enumerate(held) if n == counts[i]]
            if budget == HELD_BACK and late:
                server.tell([members[i] for i in late], [held[i] for i in late])
            held = [0 if i in late else n for i, n in enumerate(held)]
        if budget == HELD_BACK:
            server.tell(members, held)
        found.append(server.pages(np.concatenate([m.pages for m in members])))
    for at_once, late in zip(*found, strict=True):
        np.testing.assert_allclose(late, at_once, atol=1e-5)


class Watched(Programs):
    """The engine tests' programs; they know how many rows of every slot its draft has not heard."""

    def __init__(self) -> None:
        programs().reset()
        self.__dict__.update(programs().__dict__)
        self.late, self.most, self.drafted = Counter[int](), 0, 0

    def round(self, shape: Shape, told: Told, edits: Any) -> Any:
        known = views(self.columns(shape.pages), np.asarray(told.words))
        slots, fresh = known["slot"].tolist(), known["fresh"].tolist()
        for slot in (s for s, new in zip(slots, fresh, strict=True) if new):
            self.late[slot] = 0
        for slot in (s for s in slots if s < self.sizes.slots):
            if shape.budget == shape.group:
                self.late[slot] += 1
                self.most = max(self.most, self.late[slot])
            else:
                assert not self.late[slot]
                self.drafted += 1
        return super().round(shape, told, edits)

    def catch_up(self, behind: Behind) -> None:
        slots, rows = np.asarray(behind.slot).tolist(), np.asarray(behind.rows).tolist()
        for slot, count in zip(slots, rows, strict=True):
            assert slot == self.sizes.slots or 0 < count == self.late[slot] <= HELD
            self.late[slot] = 0
        super().catch_up(behind)


class LentOnceTold(Pages):
    """Pages that are lent to others only when the draft has heard of all their rows."""

    def __init__(self, batch: list[Batch]):
        super().__init__(ROOMY, PAGE, caching=True)
        self.batch = batch

    def publish(self, pages: Any, tokens: Any, salt: Any) -> None:
        batch = self.batch[0]
        sequence = next(s for s in batch.running if s.pages == pages)
        assert isinstance(batch.programs, Watched)
        assert not (sequence.entered and batch.programs.late[sequence.slot or 0])
        super().publish(pages, tokens, salt)


class Whims(Policy):
    """Now many plain rounds, now a few that draft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rng, self.left = np.random.default_rng(0), 0

    def budget(self, seconds: Any, chances: Any, caps: Any) -> int:
        if not self.left:
            self.drafting = not self.drafting
            self.left = int(self.rng.integers(1, 4 if self.drafting else 2 * HELD))
        self.left -= 1
        return list(seconds)[-1 if self.drafting and any(caps) else 0]


def test_a_draft_that_is_asked_has_heard_of_everything() -> None:
    watched, mine = Watched(), list[Batch]()
    batch = Batch(
        watched,
        LentOnceTold(mine),
        Whims("fixed", DRAFT.draft_length),
        frozenset(),
        Metrics("test", DRAFT.draft_length),
        {},
        Head(np.ones(DRAFT.draft_length)),
    )
    mine.append(batch)
    heard: list[Delta] = []
    for i in range(12):
        work = Work(str(i), PROMPTS_OF[i % len(PROMPTS_OF)], LIMIT - i, GREEDY)
        batch.add(Sequence(work, heard.append, 0.0))
    while batch.busy:
        batch.turn()
    assert sum(d.finish == "length" for d in heard) == 12
    assert watched.most == HELD and watched.drafted > 20
