"""The engine: one thread that owns the device and turns queued work into deltas.

Every turn reads at most one chunk of a prompt and dispatches one decode round, and only then reads
what the round before it emitted, so that the device never waits for the host.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dspark_jax.serve.batch import Batch
from dspark_jax.serve.grammar import Grammars
from dspark_jax.serve.messages import BusyError, Grammar, Sink, Work
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.sequence import Sequence

LOG = logging.getLogger(__name__)
IDLE_SECONDS = 0.05


@dataclass(frozen=True)
class QueueLimits:
    """How much may wait before new work is refused."""

    requests: int = 1024
    tokens: int = 1 << 20


class ThreadedEngine:
    """`messages.Engine` over a `Batch`; start it once, stop it once.

    When a step fails, all answers on their way end with an error and the caches are built anew;
    when that happens again within `patience` seconds the engine is unhealthy for good.
    """

    def __init__(
        self,
        batch: Batch,
        grammars: Grammars,
        limits: QueueLimits,
        metrics: Metrics,
        patience: float = 300.0,
    ):
        self.batch, self.limits, self.metrics, self.patience = batch, limits, metrics, patience
        self.grammars = grammars
        self._compiling = ThreadPoolExecutor(1, "grammars")
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued: dict[str, int] = {}
        self._sequences: dict[str, Sequence] = {}
        self._stopping = threading.Event()
        self._failed_at: float | None = None
        self._healthy = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def ready(self) -> bool:
        return self._healthy and self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End all answers on their way and let go of the device."""
        self._stopping.set()
        self._thread.join()
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def submit(self, work: Work, sink: Sink) -> None:
        with self._lock:
            full = self._full(len(work.prompt))
            if full is not None:
                self.metrics.rejected(full)
                raise BusyError(
                    "The engine is currently busy and cannot accept new requests. Please try again "
                    "later or on a different instance."
                )
            if not self._healthy:
                raise BusyError("The engine has failed and accepts no requests.")
            self._queued[work.request_id] = len(work.prompt)
        sequence = Sequence(work, sink, time.monotonic())
        self._commands.put(lambda: self._know(sequence))
        if work.grammar is None:
            self._commands.put(lambda: self._accept(sequence))
        else:
            self._compiling.submit(self._compile, sequence, work.grammar)

    def abort(self, request_id: str) -> None:
        self._commands.put(lambda: self._abort(request_id))

    def _full(self, tokens: int) -> str | None:
        """Which limit of the queue leaves no room for so many more prompt tokens."""
        if len(self._queued) >= self.limits.requests:
            return "max_num_queued_reqs"
        waiting = sum(self._queued.values())  # an empty queue takes any prompt
        over = waiting and waiting + tokens > self.limits.tokens
        return "max_num_queued_tokens" if over else None

    def _compile(self, sequence: Sequence, grammar: Grammar) -> None:
        """Read a grammar while the engine goes on."""
        try:
            sequence.matcher = self.grammars.matcher(grammar)
        except Exception as error:  # whatever is wrong with it, its request alone is concerned
            said = str(error) or type(error).__name__
            self._commands.put(lambda: self._refuse(sequence, said))
            return
        self._commands.put(lambda: self._accept(sequence))

    def _know(self, sequence: Sequence) -> None:
        self._sequences[sequence.work.request_id] = sequence

    def _accept(self, sequence: Sequence) -> None:
        if sequence.finish is None:  # or it was given up while its grammar was read
            self.batch.add(sequence)

    def _refuse(self, sequence: Sequence, error: str) -> None:
        if sequence.finish is None:
            self.batch.end(sequence, "error", error)

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.finish is None:
            self.batch.end(sequence, "abort")

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._obey(wait=not self.batch.busy)
            try:
                self.batch.turn()
            except Exception as error:  # whatever the device raises, the caches are gone
                self._recover(error)
            self._forget_ended()
        self.batch.fail("the server is shutting down")
        for sequence in self._sequences.values():
            self._refuse(sequence, "the server is shutting down")
        self._forget_ended()

    def _obey(self, wait: bool) -> None:
        """Carry out what was asked for from other threads."""
        try:
            self._commands.get(timeout=IDLE_SECONDS if wait else 0)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _recover(self, error: Exception) -> None:
        LOG.exception("a step failed; all answers on their way end with an error")
        self.batch.fail(f"a step of the engine failed ({type(error).__name__})")
        now = time.monotonic()
        again = self._failed_at is not None and now - self._failed_at < self.patience
        self._failed_at = now
        if again:
            self._healthy = False
            self._stopping.set()
            return
        self.batch.rebuild()

    def _forget_ended(self) -> None:
        started = [s for s in self._sequences.values() if s.finish or s.slot is not None]
        with self._lock:
            for sequence in started:
                self._queued.pop(sequence.work.request_id, None)
        for sequence in started:
            if sequence.finish:
                self._sequences.pop(sequence.work.request_id, None)
