"""Between the engine's thread and the event loop: deltas wait here until the loop takes them."""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass

from dspark_jax.serve.messages import Delta, Finish, Sink, TokenLogprob


@dataclass
class Arrival:
    """One delta of answer `index`, or several joined; `at` is when the last came (monotonic)."""

    index: int
    at: float
    tokens: list[int]
    logprobs: list[TokenLogprob]
    rounds: list[tuple[int, int]]
    """(verified, accepted) of each round that drafted."""
    cached_tokens: int | None
    finish: Finish | None
    stop_reason: int | None
    error: str | None

    def join(self, later: "Arrival") -> None:
        """Take in what came after."""
        self.at = later.at
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.rounds += later.rounds
        if self.cached_tokens is None:
            self.cached_tokens = later.cached_tokens
        self.finish, self.stop_reason = later.finish, later.stop_reason
        self.error = later.error


class Mailbox:
    """Deltas of one request's answers, in order; beyond `limit` they are joined, never lost.

    What waits is thereby bounded by the answers' own lengths. `sink` makes what the engine calls;
    `take` belongs to the loop the mailbox was made in.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: deque[Arrival] = deque()
        self._latest: dict[int, Arrival] = {}
        self._filled = asyncio.Event()
        self._failure: Exception | None = None

    def sink(self, index: int) -> Sink:
        """Where the engine puts the deltas of answer `index`."""
        return lambda delta: self.put(_arrival(index, delta))

    def put(self, arrival: Arrival) -> None:
        """Leave a delta; any thread may, and returns at once."""
        with self._lock:
            first = not self._waiting
            latest = self._latest.get(arrival.index)
            if latest is not None and len(self._waiting) >= self._limit:
                latest.join(arrival)
                return
            self._waiting.append(arrival)
            self._latest[arrival.index] = arrival
        if first:
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._filled.set)
        except RuntimeError:
            # The loop is closed: the server is gone, and with it whoever wanted this.
            return

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
                    oldest = self._waiting.popleft()
                    if self._latest[oldest.index] is oldest:
                        del self._latest[oldest.index]
                    return oldest
                self._filled.clear()
            await self._filled.wait()


def _arrival(index: int, delta: Delta) -> Arrival:
    rounds = [] if delta.verified is None else [(delta.verified, delta.accepted)]
    return Arrival(
        index,
        time.monotonic(),
        list(delta.tokens),
        list(delta.logprobs),
        rounds,
        delta.cached_tokens,
        delta.finish,
        delta.stop_reason,
        delta.error,
    )
