"""The application: every route behind keys and limits, every failure with the one body."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, Response

from dspark_jax import __version__
from dspark_jax.serve.http import chat, completions, errors, plain
from dspark_jax.serve.http.limits import BodyLimits, KeyGuard
from dspark_jax.serve.http.serving import Serving
from dspark_jax.serve.http.settings import HttpSettings, ServedModel
from dspark_jax.serve.messages import Engine
from dspark_jax.serve.metrics import Metrics

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
CONTENT = "default-src 'self'; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"


def make_app(
    engine: Engine,
    model: ServedModel,
    settings: HttpSettings | None = None,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The ASGI application; `app.state.serving` is its `Serving`, for draining and aborting.

    `metrics` are those the engine writes to; without, the application makes its own.
    """
    settings = settings or HttpSettings()
    metrics = metrics or Metrics(model.name, model.draft_length)
    serving = Serving(engine, model, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.loop = asyncio.get_running_loop()
        yield
        serving.close()

    app = FastAPI(
        title="dspark-jax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=errors.REFUSALS,
    )
    app.state.serving = serving
    errors.install(app)
    for routes in (plain.routes, completions.routes, chat.routes):
        app.include_router(routes(serving))
    for path, name in PAGE_FILES.items():
        app.add_api_route(path, _file(PAGE / name), include_in_schema=False)
    app.add_api_route("/favicon.ico", _nothing, include_in_schema=False)
    _guard(app, settings)
    return app


async def _nothing() -> Response:
    return Response(status_code=204)


def _file(path: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        headers = {"content-security-policy": CONTENT, "x-content-type-options": "nosniff"}
        return FileResponse(path, headers=headers)

    return send


def _guard(app: FastAPI, settings: HttpSettings) -> None:
    """The last added is asked first: browsers' questions, then keys, then bodies."""
    app.add_middleware(BodyLimits, settings=settings)
    if settings.api_keys:
        # The page holds nothing secret; it asks for the key that its requests then carry.
        paths = {
            "/health",
            "/favicon.ico",
            *PAGE_FILES,
            *(["/metrics"] if settings.open_metrics else []),
        }
        app.add_middleware(KeyGuard, settings=settings, open_paths=frozenset(paths))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        )
