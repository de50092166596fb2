"""Serves an application on a port until a signal, and lets running answers end first."""

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dspark_jax.serve.http.serving import Serving

LOG = logging.getLogger("dspark_jax.serve")
KEEP_ALIVE_SECONDS = 5
MAX_HEADER_BYTES = 65_536
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CLOSING_SECONDS = 5
"""How long a connection may take to receive what was written when its answer ended."""

DEAD_TICKS = 10


class DrainingServer(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT, stops at the second; `run` then returns."""

    def __init__(
        self,
        config: uvicorn.Config,
        serving: Serving,
        drain_seconds: float,
        ready: Callable[[], None],
    ):
        super().__init__(config)
        self._ready = ready
        self._serving = serving
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._dead_ticks = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Follow a signal; uvicorn raises it again in the end, which is no exit code 0."""
        loop = self._serving.loop
        if loop is None:
            self.should_exit = True
        else:
            loop.call_soon_threadsafe(self._leave)

    @property
    def left(self) -> bool:
        """Whether it ended because it was told to."""
        return self._draining is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that it is ready once connections are taken."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: a server whose engine failed for good ends once its clients know."""
        self._dead_ticks = 0 if self._serving.engine.ready else self._dead_ticks + 1
        if self._dead_ticks > DEAD_TICKS:
            self.should_exit = True
        return await super().on_tick(counter)

    def _leave(self) -> None:
        if self._draining is not None:
            self._serving.abort_all()
            self.should_exit = True
            return
        LOG.warning("draining for up to %s s; another signal stops at once", self._drain_seconds)
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        if not await self._serving.drain(self._drain_seconds):
            LOG.warning("answers were cut off after %s s", self._drain_seconds)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, which refuses connections until it is served; ValueError when taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        return bound
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port "
            "or --host."
        ) from error


def listen(
    app: FastAPI,
    bound: socket.socket,
    drain_seconds: float = 30.0,
    ready: Callable[[], None] = lambda: None,
) -> bool:
    """Serve until a signal has been followed (True), or the engine has failed (False).

    `app` is `make_app`'s; `ready` is called once connections are taken; `bound` is closed in the
    end.
    """
    serving: Serving = app.state.serving
    host = bound.getsockname()[0]
    if host not in LOOPBACK and not serving.settings.api_keys:
        LOG.warning("%s is open to everyone who reaches it; give it a key", host)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = DrainingServer(config, serving, drain_seconds, ready)
    with bound:
        server.run([bound])
    return server.left
