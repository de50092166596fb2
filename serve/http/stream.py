"""Replies that watch their client: server-sent events, and answers nobody waits for any more."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark_jax.serve.http.errors import RequestError, failed, to_json

Result = TypeVar("Result")
LOG = logging.getLogger("dspark_jax.serve")
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Whole, or as it comes.", "content": {"text/event-stream": {}}}
}
"""What the OpenAPI description says of answers, beside JSON."""
CLOSED = 499
"""What the log shows of a client that left; nobody receives it."""


class EventStream(Response):
    """Server-sent events, one for each value of `events`; ends in [DONE], after an error too.

    `close` is called once, however it ends: the events are over, the client left, or one event
    could not be sent within `send_timeout_seconds`.
    """

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        close: Callable[[], None],
        send_timeout_seconds: float,
        headers: Mapping[str, str],
    ):
        shown = {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, shown, "text/event-stream")
        # A length of 0 belongs to the empty body above, not to the events.
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._timeout = send_timeout_seconds

    def close(self) -> None:
        """Give up before anything is sent."""
        self._close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until one of the ends."""
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            await _cancelled(leaving)
            await _cancelled(writing)

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await self._send(send, start)
            async for event in _told(self._events):
                body = b"data: " + to_json(event) + b"\n\n"
                await self._send(
                    send, {"type": "http.response.body", "body": body, "more_body": True}
                )
            body = b"data: [DONE]\n\n"
            await self._send(send, {"type": "http.response.body", "body": body, "more_body": False})
        except TimeoutError:
            LOG.warning("an answer was dropped: its client read nothing for %s s", self._timeout)

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._timeout):
            await send(message)


async def _told(events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[Mapping[str, Any]]:
    """The events, and a failure among them as the last."""
    try:
        async for event in events:
            yield event
    except RequestError as error:
        yield error.body()
    except Exception:
        LOG.exception("an answer failed")
        yield failed(500, "The server failed to handle this request.").body()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled() and (error := task.exception()):
        raise error


def _drop(working: "asyncio.Future[Any]") -> None:
    """Close what was made although it was cancelled: nobody will send it."""
    if working.cancelled() or working.exception() is not None:
        return
    if isinstance(made := working.result(), EventStream):
        made.close()


async def unless_left(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled when the client leaves, whose reply nobody reads."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    answered = False
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            answered = True
            return working.result()
        raise RequestError("The client closed the connection.", None, CLOSED, "ClientClosedRequest")
    finally:
        await _cancelled(leaving)
        if not answered:
            working.cancel()
            await asyncio.wait((working,))
            _drop(working)
