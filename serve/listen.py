"""The socket and the event loop: serving until a signal, then finishing what was begun."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from dspark_jax.serve.messages import Engine
from dspark_jax.serve.settings import ServeSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLL_SECONDS = 0.1


class Server(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow is done; ValueError when the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another --port "
            "or --host."
        ) from error
    return listening


def serve_until_stopped(
    app: FastAPI,
    engine: Engine,
    listening: socket.socket,
    settings: ServeSettings,
    console: Console,
) -> int:
    """0 after SIGTERM or Ctrl-C, 1 when the engine failed."""
    host, port = listening.getsockname()[:2]
    if settings.host not in LOOPBACK and not app.state.serving.settings.api_keys:
        console.print("[yellow]anyone who reaches this port may use it: set DSPARK_API_KEY")
    address = f"[{host}]" if ":" in host else host
    console.print(f"ready: http://{address}:{port}  (chat in a browser, or the API under /v1)")
    return asyncio.run(_serve(app, engine, listening, settings))


async def _serve(
    app: FastAPI, engine: Engine, listening: socket.socket, settings: ServeSettings
) -> int:
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=75)
    server = Server(config)
    draining: list[asyncio.Task[None]] = []

    def stop() -> None:
        if draining:  # the second signal does not wait
            server.should_exit = server.force_exit = True
            return
        draining.append(asyncio.create_task(_drain(app, server, settings.shutdown_timeout)))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    watching = asyncio.create_task(_watch(engine, server))
    await server.serve(sockets=[listening])
    watching.cancel()
    return 0 if draining else 1


async def _drain(app: FastAPI, server: uvicorn.Server, seconds: float) -> None:
    """Take no new work, let the old finish, end what has not by then."""
    serving = app.state.serving
    serving.draining = True
    deadline = asyncio.get_running_loop().time() + seconds
    while serving.load and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    serving.abort_all()
    server.should_exit = True


async def _watch(engine: Engine, server: uvicorn.Server) -> None:
    """A server whose engine has failed for good ends, so that a supervisor starts another."""
    while engine.ready:
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.sleep(1)  # the last answers hear why
    server.should_exit = True
