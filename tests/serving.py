"""A server for tests: a scripted engine in its own thread behind a real uvicorn on a real port."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.serve.http.app import make_app
from dspark_jax.serve.http.settings import HttpSettings, ServedModel
from dspark_jax.serve.messages import BusyError, Delta, Finish, Sink, TokenLogprob, Work
from dspark_jax.serve.metrics import Metrics

VOCABULARY = 512
LENGTH = 512
DRAFT = 4
FULL = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)

Script = Callable[[Work], Sequence[int]]


def counting(work: Work) -> Sequence[int]:
    """Token t is followed by t + 1, within the vocabulary and never an end token."""
    last = work.prompt[-1]
    return [5 + (last + i - 4) % (VOCABULARY - 5) for i in range(work.max_tokens)]


def saying(text: str, end: bool = True) -> Script:
    """Every answer is `text`, and an end token."""
    tokens = tokenizer()(text)["input_ids"] + ([0] if end else [])
    return lambda work: tokens


@cache
def tokenizer() -> Any:
    """tiny-glm's."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(embedded("tiny-glm")))


def served(**changes: Any) -> ServedModel:
    """tiny-glm under the name `tiny`, with a context of 512 tokens."""
    given = {"name": "tiny", "tokenizer": tokenizer(), "vocab_size": VOCABULARY}
    given |= {"max_model_len": LENGTH, "end_tokens": (0,), "draft_length": DRAFT}
    return ServedModel(**(given | changes))


@dataclass
class Row:
    """An answer in the engine."""

    work: Work
    sink: Sink
    tokens: list[int]
    given: int = 0
    aborted: bool = False


@dataclass
class ScriptedEngine:
    """Says what the script says, a round of accepted drafts and a bonus token at a time.

    It keeps the engine's promises: limits, end and stop tokens, one `abort` per abort, deltas in
    order on its own thread, BusyError when more than `max_queue` answers are there.
    """

    script: Script = counting
    accepted: int = 2
    round_seconds: float = 0.0
    max_queue: int = 16
    fails_with: str | None = None
    """Every answer ends in this error after its first round."""
    ready: bool = True
    works: list[Work] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    _rows: dict[str, Row] = field(default_factory=dict)
    _seen: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._lock = threading.Condition()
        self._stopped = False
        self.running = threading.Event()
        self.running.set()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Answers that are not finished."""
        with self._lock:
            return len(self._rows)

    def submit(self, work: Work, sink: Sink) -> None:
        """As the protocol says."""
        with self._lock:
            if len(self._rows) >= self.max_queue:
                raise BusyError(FULL)
            assert work.prompt and work.request_id not in self._rows
            self.works.append(work)
            self._rows[work.request_id] = Row(work, sink, list(self.script(work)))
            self._lock.notify()

    def abort(self, request_id: str) -> None:
        """As the protocol says."""
        with self._lock:
            self.aborts.append(request_id)
            if row := self._rows.get(request_id):
                row.aborted = True
                self._lock.notify()

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        self.running.set()
        self._thread.join(5)

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._rows or self._stopped)
                if self._stopped:
                    return
                rows = list(self._rows.items())
            self.running.wait()
            for name, row in rows:
                delta = self._round(row)
                if delta.finish:
                    with self._lock:
                        del self._rows[name]
                row.sink(delta)
            time.sleep(self.round_seconds)

    def _round(self, row: Row) -> Delta:
        work = row.work
        if row.aborted:
            return Delta(finish="abort")
        if self.fails_with and row.given:
            return Delta(finish="error", error=self.fails_with)
        first, speculates = row.given == 0, work.speculate and row.given > 0
        tokens, finish, reason = self._cut(row, 1 + self.accepted if speculates else 1)
        row.given += len(tokens)
        return Delta(
            tuple(tokens),
            tuple(self._logprob(token, work.logprobs) for token in tokens)
            if work.logprobs is not None
            else (),
            verified=DRAFT if speculates else None,
            accepted=self.accepted if speculates else 0,
            cached_tokens=self._cached(work) if first else None,
            finish=finish,
            stop_reason=reason,
        )

    def _cut(self, row: Row, count: int) -> tuple[list[int], Finish | None, int | None]:
        work = row.work
        left = work.max_tokens - row.given
        tokens = row.tokens[row.given : row.given + min(count, left)]
        for i, token in enumerate(tokens):
            if row.given + i < work.min_tokens:
                continue
            if token in work.stop_token_ids:
                return tokens[: i + 1], "stop", token
            if token == 0 and not work.ignore_eos:
                return tokens[: i + 1], "stop", None
        done = len(tokens) == left or row.given + len(tokens) >= len(row.tokens)
        return tokens, "length" if done else None, None

    def _logprob(self, token: int, top: int | None) -> TokenLogprob:
        likely = tuple(((token + i) % VOCABULARY, -0.1 * (i + 1)) for i in range(top or 0))
        return TokenLogprob(token, -0.1, 1, likely)

    def _cached(self, work: Work) -> int:
        """A prompt seen before under this salt is cached, but for its last token."""
        found = len(work.prompt) - 1 if (work.cache_salt, work.prompt) in self._seen else 0
        self._seen.add((work.cache_salt, work.prompt))
        return found


@dataclass
class Server:
    """A running server."""

    url: str
    engine: ScriptedEngine
    app: FastAPI
    metrics: Metrics
    uvicorn: uvicorn.Server

    def client(self, **more: Any) -> httpx.Client:
        """A client of its own."""
        return httpx.Client(base_url=self.url, timeout=20, **more)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, 0 when it was never set."""
        labels = {"model_name": "tiny", "engine": "0"} | labels
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serving(
    engine: ScriptedEngine | None = None,
    settings: HttpSettings | None = None,
    model: ServedModel | None = None,
) -> Iterator[Server]:
    """A server until the end of the block."""
    engine = engine or ScriptedEngine()
    model = model or served()
    metrics = Metrics(model.name, model.draft_length)
    app = make_app(engine, model, settings, metrics)
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="http", daemon=True)
    thread.start()
    until(lambda: server.started)
    listening = server.servers[0].sockets[0]
    # Connections inherit it: a client that does not read is noticed after little.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    port = listening.getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", engine, app, metrics, server)
    finally:
        server.should_exit = True
        thread.join(10)
        engine.stop()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition; AssertionError when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)
