"""What a request must pass before its body is read as JSON: keys, sizes, time, depth."""

import asyncio
import hashlib
import re
from hmac import compare_digest

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_jax.serve.http.errors import RequestError, failed
from dspark_jax.serve.http.settings import HttpSettings

WITHOUT_BODY = frozenset(("GET", "HEAD", "OPTIONS"))
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
BRACKET = re.compile(rb"[][{}]")
MAX_BRACKETS = 200_000
"""More lists and objects than any honest request holds, and few enough to be counted at once."""


class KeyGuard:
    """Lets in who sends one of the keys as `Authorization: Bearer`; `open_paths` need none."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, open_paths: frozenset[str]):
        self._app = app
        self._digests = settings.key_digests()
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or 401."""
        if scope["type"] != "http" or scope["path"] in self._open or self._known(scope):
            return await self._app(scope, receive, send)
        await _refuse(_no_key(), scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, in constant time each: how long it takes says nothing of the keys.
        return sum([compare_digest(digest, each) for each in self._digests]) > 0


def _no_key() -> RequestError:
    return failed(
        401,
        "Give this server's key as `Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


class BodyLimits:
    """Reads a body whole before anything else sees it, within limits of size, time and depth."""

    def __init__(self, app: ASGIApp, settings: HttpSettings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the body on in one message, or refuse it."""
        if scope["type"] != "http" or scope["method"] in WITHOUT_BODY:
            return await self._app(scope, receive, send)
        try:
            body = await self._body(scope, receive)
            if body is None:
                return
            self._check(scope, body)
        except RequestError as error:
            return await _refuse(error, scope, receive, send)
        await self._app(scope, _replayed(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client left before its end."""
        declared = _header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._settings.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._settings.body_timeout_seconds):
                return await self._read(receive)
        except TimeoutError:
            seconds = self._settings.body_timeout_seconds
            raise failed(
                408, f"The body did not arrive within {seconds} seconds.", headers=CLOSE
            ) from None

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._settings.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> RequestError:
        limit = self._settings.max_body_bytes
        return failed(413, f"The body is larger than {limit} bytes.", headers=CLOSE)

    def _check(self, scope: Scope, body: bytes) -> None:
        kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
        if body and kind != b"application/json":
            raise failed(400, "Unsupported Media Type: Only 'application/json' is allowed")
        if too_deep(body, self._settings.max_json_depth):
            limit = self._settings.max_json_depth
            raise failed(400, f"The body holds too many lists and objects, or over {limit} deep.")


CLOSE = {"Connection": "close"}


def too_deep(body: bytes, limit: int) -> bool:
    """Whether JSON is nested deeper than `limit`, or holds more brackets than can be counted."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for i, match in enumerate(BRACKET.finditer(STRING.sub(b"", body))):
        depth += 1 if match[0] in b"[{" else -1
        if depth > limit or i >= MAX_BRACKETS:
            return True
    return False


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what the connection says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    await error.response()(scope, receive, send)
