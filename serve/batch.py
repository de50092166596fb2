"""The sequences decoded together: who enters, whom a round serves, what it gave to whom."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dspark_jax.paged_loop import HELD, Result
from dspark_jax.paged_words import Heard, Told, result_of
from dspark_jax.serve.editing import fill
from dspark_jax.serve.expected import Expected
from dspark_jax.serve.messages import Delta, Finish, TokenLogprob
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.programs import Shape, Steps
from dspark_jax.serve.rating import Rating
from dspark_jax.serve.sequence import Sequence
from dspark_jax.serve.telling import Telling

LOG = logging.getLogger(__name__)


class Round(NamedTuple):
    """A dispatched round: whom it serves, row by row, and what it will have given."""

    sequences: list[Sequence]
    caps: list[int]
    shape: Shape
    heard: Heard
    begun: float
    undisturbed: bool
    """Nothing but rounds ran on the device since the one before."""


class Batch:
    """Waiting sequences enter in order of arrival as slots and pages allow.

    A sequence holds pages for all rows that the rounds on their way can write. When there are no
    more, the youngest gives its own back and begins again, prompt and answer read as one prompt.
    """

    def __init__(
        self,
        programs: Steps,
        pages: Pages,
        policy: Policy,
        ends: frozenset[int],
        metrics: Metrics,
        seconds: Mapping[Shape, float],
        rating: Rating,
        draft_greedily: bool = False,
    ):
        self.programs, self.pages, self.policy = programs, pages, policy
        self.ends, self._telling = ends, Telling(programs, draft_greedily)
        self.metrics, self.expected, self.rating = metrics, Expected(seconds), rating
        self._heard, self._undisturbed = 0.0, True
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.pending: deque[Round] = deque()
        self._slots = list(range(programs.sizes.slots - 1, -1, -1))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.pending)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def turn(self) -> None:
        """Admit, read a piece of a prompt, dispatch a round, then hear of the one before."""
        self._admit()
        self._read_prompt()
        launched = self._launch()
        if self.pending and (len(self.pending) > 1 or not launched):
            self._collect(self.pending.popleft())
        self.metrics.gauges(len(self.running), len(self.waiting), self.pages.usage)

    def end(self, sequence: Sequence, finish: Finish, error: str | None = None) -> None:
        """Give back what a sequence holds and say so to whom it concerns."""
        sequence.finish = finish
        self._leave(sequence)
        sequence.sink(Delta(finish=finish, error=error))

    def fail(self, error: str) -> None:
        """End everybody with an error."""
        self.pending.clear()
        for sequence in [*self.running, *self.waiting]:
            self.end(sequence, "error", error)

    def rebuild(self) -> None:
        """Empty caches: nothing that was in them is known any more."""
        self.programs.reset()
        self.pages = Pages(self.pages.count, self.pages.size, self.pages.caching)

    def _admit(self) -> None:
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            known = self.pages.find(sequence.tokens[:-1], sequence.work.cache_salt)
            more = self.pages.take(self._pages_for(sequence, 1) - len(known))
            if more is None:
                self.pages.release(known)
                return
            self.waiting.popleft()
            sequence.pages, sequence.rows = known + more, len(known) * self.pages.size
            sequence.cached, sequence.slot = sequence.rows, self._slots.pop()
            sequence.admitted = sequence.admitted or time.monotonic()
            self.running.append(sequence)
            self.metrics.admitted(len(sequence.tokens), sequence.cached)

    def _read_prompt(self) -> None:
        sequence = next((s for s in self.running if not s.prefilled), None)
        if sequence is None:
            return
        rest = np.asarray(sequence.tokens[sequence.rows : -1], np.int32)
        taken = self.programs.prefill(rest, sequence.rows, tuple(sequence.pages))
        sequence.rows += taken
        self._undisturbed = False
        self.metrics.prefilled(taken)
        if sequence.prefilled:
            self._publish(sequence)

    def _launch(self) -> bool:
        """Dispatch a round for everybody who can go on; False when there is nobody or not yet."""
        chosen = [s for s in self.running if s.prefilled and s.remaining > 0]
        if not chosen or (self.pending and any(s.edited for s in chosen)):
            return False
        if not all(self._grow(sequence) for sequence in list(chosen)):
            return False
        for sequence in chosen:
            if sequence.slot is not None and not sequence.entered:
                self._alone(sequence, self._telling.enter)
        chosen = [s for s in chosen if s.slot is not None]
        if not chosen:
            return False
        shape, caps = self._shape(chosen)
        drafting = shape.budget > shape.group
        if drafting or any(s.behind == HELD for s in chosen):
            self._catch_up(chosen)
        heard = self._dispatch(shape, chosen, caps)
        self.pending.append(Round(chosen, caps, shape, heard, time.monotonic(), self._undisturbed))
        self._undisturbed = True
        for sequence in chosen:
            sequence.entered, sequence.rounds = True, sequence.rounds + 1
            sequence.behind += 0 if drafting or not self.programs.sizes.verified else 1
        return True

    def _dispatch(self, shape: Shape, chosen: list[Sequence], caps: list[int]) -> Heard:
        """Tell the device of a round, and have what it tells come when it is there."""
        words: Any = self._telling.round(shape, chosen, caps, self.rating)
        told = Told(words)
        if self.programs.chooses(shape):
            budgets = self.programs.sizes.budgets(shape.group)[1:]
            told = told._replace(seconds=self.expected.curve(shape, budgets))
        edits = self.programs.edits(shape.group) if shape.edited else None
        for row, sequence in enumerate(chosen):
            if edits is not None and sequence.edited:
                self._alone(sequence, lambda s, row=row: fill(edits, row, s, self.ends))
                if sequence.finish is not None:
                    self._telling.leave_out(shape, words, row)
        heard = self.programs.round(shape, told, edits)
        heard.words.copy_to_host_async()
        return heard

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Let the drafts of those that are behind hear of what plain rounds have read."""
        late = [s for s in sequences if s.behind]
        if not late:
            return
        behind = self.programs.behind(next(g for g in self.programs.sizes.groups if g >= len(late)))
        slot, rows, pages = map(np.asarray, behind)
        for row, sequence in enumerate(late):
            slot[row], rows[row] = sequence.slot, sequence.behind
            pages[row, : len(sequence.pages)] = sequence.pages
            sequence.behind = 0
        self.programs.catch_up(behind)
        self._undisturbed = False

    def _shape(self, chosen: list[Sequence]) -> tuple[Shape, list[int]]:
        """The program for these sequences, and how many drafts of each may be verified."""
        sizes = self.programs.sizes
        group = next(g for g in sizes.groups if g >= len(chosen))
        budgets = sizes.budgets(group)
        caps = [min(sizes.verified, s.remaining - 1) if s.drafted_for else 0 for s in chosen]
        edited = any(s.edited or s.work.logprobs is not None for s in chosen)
        choice = (budgets[0], budgets[-1]) if edited and len(budgets) > 1 else budgets
        held = max(len(s.pages) for s in chosen)
        pages = sizes.longest if edited else next(p for p in sizes.contexts if p >= held)
        costs = {b: self.expected.of(Shape(group, b, pages, False)) for b in choice}
        budget = self.policy.budget(costs, [s.chance for s in chosen], caps)
        return self.programs.program(Shape(group, budget, pages, edited)), caps

    def _ran(self, program: Shape, rows: int) -> Shape:
        """The shape of a round that verified so many rows, where its program chose."""
        if not self.programs.chooses(program):
            return program
        budgets = self.programs.sizes.budgets(program.group)[1:]
        return program._replace(budget=next(b for b in budgets if b >= rows))

    def _alone(self, sequence: Sequence, act: Callable[..., None], *given: Any) -> None:
        """Do what concerns one sequence; what goes wrong with it on the host ends it alone."""
        try:
            act(sequence, *given)
        except Exception as error:
            LOG.exception("an answer failed")
            if sequence.finish is None or sequence.slot is not None:
                self.end(sequence, "error", f"the server failed at it ({type(error).__name__})")

    def _grow(self, sequence: Sequence) -> bool:
        """Pages for one more round; False when first the rounds on their way must be heard of."""
        while sequence.slot is not None:
            more = self.pages.take(
                self._pages_for(sequence, sequence.rounds + 1) - len(sequence.pages)
            )
            if more is not None:
                self._telling.lend(sequence, more)
                return True
            if self.pending:
                return False
            youngest = max(self.running, key=lambda s: s.arrived)
            if youngest is sequence and len(self.running) == 1:
                raise MemoryError("one sequence needs more pages than there are")
            self._preempt(youngest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.metrics.preempted()
        sequence.entered, sequence.rows = False, 0
        self.waiting.appendleft(sequence)

    def _pages_for(self, sequence: Sequence, rounds: int) -> int:
        """Pages that its rows can reach after so many more rounds."""
        sizes = self.programs.sizes
        rows = len(sequence.tokens) - 1 + rounds * (sizes.verified + 1)
        return max(min(-(-rows // sizes.page), sizes.longest), len(sequence.pages))

    def _collect(self, round_: Round) -> None:
        """Hear of a round and pass it on, sequence by sequence."""
        since, waits = max(round_.begun, self._heard), time.monotonic()
        result = result_of(round_.heard)
        heard = time.monotonic()
        seconds = heard - since
        served = slice(len(round_.sequences))
        verified, accepted = result.verified[served].sum(), result.accepted[served].sum()
        count = len(round_.sequences)
        shape = self._ran(round_.shape, int(verified) + count)
        self.metrics.round(
            int(accepted) + count,
            int(verified) + count,
            shape.budget,
            {"round": seconds, "host": max(waits - since, 0.0)},
        )
        self._heard = heard
        if round_.undisturbed:
            self.expected.took(shape, seconds)
        for row, sequence in enumerate(round_.sequences):
            sequence.rounds -= 1
            if sequence.finish is None:
                drafted = shape.budget > shape.group and round_.caps[row] > 0
                self._alone(sequence, self._hear, row, result, drafted)

    def _hear(self, sequence: Sequence, row: int, result: Result, drafted: bool) -> None:
        if not result.finite[row]:
            self._spoiled(sequence)
            return
        accepted, verified = int(result.accepted[row]), int(result.verified[row])
        tokens = result.tokens[row, : accepted + 1].tolist()
        sequence.heard = sequence.heard or time.monotonic()
        taken, stop = sequence.take(tokens, self.ends)
        sequence.rows = len(sequence.tokens) - 1
        if drafted:
            sequence.chance = result.chance[row].tolist()
            self.rating.learn(result.confidence[row], accepted, verified)
            self.policy.observe(accepted, verified, sequence.chance)
            hits = [float(j < accepted) for j in range(min(verified, accepted + 1))]
            self.metrics.calibrated(sequence.chance[: len(hits)], hits)
        error = _advance(sequence, [t for t in taken if t not in self.ends])
        if error is not None:
            sequence.finish = "error"
        delta = Delta(
            tokens=tuple(taken),
            logprobs=_logprobs(sequence, row, taken, result),
            verified=verified if drafted else None,
            accepted=min(accepted, len(taken)),
            cached_tokens=sequence.cached if sequence.emitted == len(taken) else None,
            finish=sequence.finish,
            stop_reason=stop,
            error=error,
        )
        if sequence.finish is not None:
            self._publish(sequence)
            self._leave(sequence)
            self._time(sequence)
        sequence.sink(delta)

    def _time(self, sequence: Sequence) -> None:
        now = time.monotonic()
        read = sequence.heard or now
        entered = sequence.admitted or now
        self.metrics.timed(entered - sequence.arrived, read - entered, now - read)

    def _spoiled(self, sequence: Sequence) -> None:
        """The target's logits were not numbers: nobody else may read what is in its pages.

        Pages that others hold too are left to them: they are spoiled as well, or the pages are not.
        """
        self.pages.withdraw(sequence.pages)
        self.programs.clean(tuple(self.pages.alone(sequence.pages)))
        self.metrics.corrupted()
        self.end(sequence, "error", "the model's output is not a number")

    def _publish(self, sequence: Sequence) -> None:
        """Others may begin with its pages, which hold the draft's keys too."""
        self._catch_up([sequence])
        self.pages.publish(sequence.pages, sequence.tokens[:-1], sequence.work.cache_salt)

    def _leave(self, sequence: Sequence) -> None:
        """Give back pages and slot."""
        self.pages.release(sequence.pages)
        sequence.pages, sequence.behind = [], 0
        if sequence.slot is not None:
            self.running.remove(sequence)
            self._slots.append(sequence.slot)
            sequence.slot = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)


def _advance(sequence: Sequence, tokens: list[int]) -> str | None:
    """Take a grammar along; what went wrong, if anything."""
    if sequence.matcher is None:
        return None
    try:
        for token in tokens:
            sequence.matcher.advance(token)
    except ValueError as error:
        return str(error)
    return None


def _logprobs(
    sequence: Sequence, row: int, taken: list[int], result: Result
) -> tuple[TokenLogprob, ...]:
    """As many as the request asked for, of every token it got."""
    asked, known = sequence.work.logprobs, result.logprobs
    if asked is None or known is None:
        return ()
    return tuple(
        TokenLogprob(
            token,
            float(known.logprob[row, i]),
            int(known.rank[row, i]),
            tuple(
                zip(
                    known.top_token[row, i, :asked].tolist(),
                    known.top_logprob[row, i, :asked].tolist(),
                    strict=True,
                )
            ),
        )
        for i, token in enumerate(taken)
    )
