"""The server's state between requests: the engine, who is being answered, and whether it drains."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from dspark_jax.serve.http.answer import Answer, Piece, TextRules
from dspark_jax.serve.http.errors import BUSY, DRAINING, RequestError, busy, failed
from dspark_jax.serve.http.grammar import Grammars
from dspark_jax.serve.http.mailbox import Arrival, Mailbox
from dspark_jax.serve.http.prompts import Prompts
from dspark_jax.serve.http.settings import HttpSettings, ServedModel
from dspark_jax.serve.messages import BusyError, Engine, Work
from dspark_jax.serve.metrics import Metrics

DRAIN_POLL_SECONDS = 0.05


class Serving:
    """What every route works with; `draining` turns new work away while the old is finished."""

    def __init__(
        self, engine: Engine, model: ServedModel, settings: HttpSettings, metrics: Metrics
    ):
        self.engine = engine
        self.model = model
        self.settings = settings
        self.metrics = metrics
        self.prompts = Prompts(model, settings)
        self.grammars = Grammars(model, settings)
        self.draining = False
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop everything runs on, from the start of the application."""
        self._runs: set[Run] = set()
        self._texts: dict[int, str] = {}

    @property
    def load(self) -> int:
        """Requests being answered."""
        return len(self._runs)

    @property
    def healthy(self) -> bool:
        """The engine is ready, and new work is welcome."""
        return self.engine.ready and not self.draining

    def token_text(self, token: int, as_id: bool = False) -> str:
        """A token as logprobs show it: by itself, or as `token_id:5`."""
        if as_id:
            return f"token_id:{token}"
        if token not in self._texts:
            self._texts[token] = self.model.tokenizer.decode([token])
        return self._texts[token]

    def abort_all(self, message: str = DRAINING) -> None:
        """End every request with an error; from any thread."""
        assert self.loop is not None, "the application has not started"
        self.loop.call_soon_threadsafe(self._abort_all, message)

    def _abort_all(self, message: str) -> None:
        for run in list(self._runs):
            run.fail(failed(503, message))

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs end; after `seconds` end it with an error.

        False when something had to be ended.
        """
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                while self._runs:
                    await asyncio.sleep(DRAIN_POLL_SECONDS)
        except TimeoutError:
            self._abort_all(DRAINING)
            return False
        return True

    def run(self, works: Sequence[Work], rules: TextRules) -> "Run":
        """Queue the answers of one request; 503 when the queue or the server takes none.

        Whoever gets the run closes it: what is unfinished then is aborted at the engine.
        """
        if self.draining:
            raise busy(DRAINING, self.settings.retry_after_seconds)
        if not self.engine.ready:
            raise busy("The engine is not ready.", self.settings.retry_after_seconds)
        run = Run(self, works, rules)
        self._runs.add(run)
        try:
            run.start()
        except BaseException:
            run.close()
            raise
        return run

    def forget(self, run: "Run") -> None:
        """A request has ended."""
        self._runs.discard(run)

    def close(self) -> None:
        """Let the threads go."""
        self.prompts.close()
        self.grammars.close()


class Run:
    """The answers of one request on their way."""

    def __init__(self, serving: Serving, works: Sequence[Work], rules: TextRules):
        # Clients may name two requests alike; the engine must tell them apart.
        unique = uuid.uuid4().hex[:8]
        self._serving = serving
        self._mailbox = Mailbox(serving.settings.max_pending_deltas)
        self._submitted: list[Answer] = []
        timeout = serving.settings.request_timeout_seconds
        self._deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        self.answers = [
            Answer(
                i,
                replace(work, request_id=f"{work.request_id}-{unique}-{i}"),
                rules,
                serving.model,
                serving.metrics,
            )
            for i, work in enumerate(works)
        ]

    def start(self) -> None:
        """Give the answers to the engine; 503 when it has no room for all of them."""
        for answer in self.answers:
            try:
                self._serving.engine.submit(answer.work, self._mailbox.sink(answer.index))
            except BusyError as error:
                message = str(error) or BUSY
                raise busy(message, self._serving.settings.retry_after_seconds) from None
            self._submitted.append(answer)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the engine says, as it says it; RequestError when an answer fails."""
        left = len(self.answers)
        while left:
            arrival = await self._next()
            answer = self.answers[arrival.index]
            if answer.finished:
                continue
            if arrival.finish == "error":
                answer.end("error")
                raise failed(500, arrival.error or "The engine failed at this answer.")
            if arrival.finish == "abort":
                answer.end("abort")
                raise failed(503, arrival.error or "The server gave this answer up.")
            piece = answer.take(arrival)
            if piece.finish:
                left -= 1
            if piece.finish and arrival.finish is None:
                self._serving.engine.abort(answer.work.request_id)
            if piece.tokens or piece.finish:
                yield piece

    async def _next(self) -> Arrival:
        loop = asyncio.get_running_loop()
        # A timeout alone never comes while there is always something to take.
        if self._deadline is not None and loop.time() > self._deadline:
            raise self._too_late()
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._mailbox.take()
        except TimeoutError:
            raise self._too_late() from None

    def _too_late(self) -> RequestError:
        seconds = self._serving.settings.request_timeout_seconds
        return failed(504, f"The answer was not ready within {seconds} seconds.")

    def fail(self, failure: RequestError) -> None:
        """End the request with an error, whatever it waits for; on the event loop."""
        self._mailbox.fail(failure)

    def close(self) -> None:
        """Abort what is unfinished; harmless when all is done."""
        self._serving.forget(self)
        for answer in self._submitted:
            if not answer.finished:
                answer.end("abort")
                self._serving.engine.abort(answer.work.request_id)
        self._submitted.clear()
