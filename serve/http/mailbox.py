"""Between the engine's thread and the event loop: deltas wait here until the loop takes them."""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from dspark_jax.serve.messages import Delta, Finish, Sink, TokenLogprob


@dataclass(frozen=True)
class Arrival:
    """One delta of answer `index`, or several joined; `at` is when the last came (monotonic)."""

    index: int
    at: float
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    rounds: tuple[tuple[int, int], ...]
    """(verified, accepted) of each round that drafted."""
    cached_tokens: int | None
    finish: Finish | None
    stop_reason: int | None
    error: str | None

    def joined(self, later: "Arrival") -> "Arrival":
        """Both as one."""
        cached = self.cached_tokens
        return replace(
            later,
            tokens=self.tokens + later.tokens,
            logprobs=self.logprobs + later.logprobs,
            rounds=self.rounds + later.rounds,
            cached_tokens=later.cached_tokens if cached is None else cached,
        )


class Mailbox:
    """Deltas of one request's answers, in order; more than `limit` are joined, never lost.

    Its size is thereby bounded by the answers' own lengths. `sink` makes what the engine calls;
    `take` belongs to the loop the mailbox was made in.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: deque[Arrival] = deque()
        self._filled = asyncio.Event()
        self._failure: Exception | None = None

    def sink(self, index: int) -> Sink:
        """Where the engine puts the deltas of answer `index`."""
        return lambda delta: self.put(_arrival(index, delta))

    def put(self, arrival: Arrival) -> None:
        """Leave a delta; any thread may, and returns at once."""
        with self._lock:
            first = not self._waiting
            self._waiting.append(arrival)
            if len(self._waiting) > self._limit:
                self._join()
        if first:
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:
            # The loop is closed: the server is gone, and with it whoever wanted this.
            return

    def _join(self) -> None:
        """One delta per answer: everything of one answer joined, in the order of their firsts."""
        joined: dict[int, Arrival] = {}
        for arrival in self._waiting:
            earlier = joined.get(arrival.index)
            joined[arrival.index] = earlier.joined(arrival) if earlier else arrival
        self._waiting = deque(joined.values())

    def fail(self, failure: Exception) -> None:
        """Give up: whoever takes gets `failure`; on the loop."""
        self._failure = failure
        self._filled.set()

    async def take(self) -> Arrival:
        """The oldest delta; waits for one. Raises what `fail` was given."""
        while True:
            if self._failure is not None:
                raise self._failure
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()
                self._filled.clear()
            await self._filled.wait()


def _arrival(index: int, delta: Delta) -> Arrival:
    rounds = () if delta.verified is None else ((delta.verified, delta.accepted),)
    return Arrival(
        index,
        time.monotonic(),
        delta.tokens,
        delta.logprobs,
        rounds,
        delta.cached_tokens,
        delta.finish,
        delta.stop_reason,
        delta.error,
    )
