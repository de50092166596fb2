"""Every failure's reply: a status and {"error": {"message", "type", "param", "code"}}."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

MAX_ERRORS = 10
"""A reply to a bad body names so many of its faults, or a small body could ask for a huge reply."""
MAX_ERROR_CHARS = 200
"""No fault is told at greater length, nor is a piece of the request given back at greater."""
BUSY = (
    "The engine is currently busy and cannot accept new requests. "
    "Please try again later or on a different instance."
)
DRAINING = "The server is shutting down and takes no new requests; use a different instance."
STATUS_TYPES = {
    400: "Bad Request",
    401: "invalid_request_error",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Entity",
    500: "InternalServerError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    kind: {
        "description": "No answer, and why.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "param", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                            },
                        }
                    },
                }
            }
        },
    }
    for kind in ("4XX", "5XX")
}
"""What the OpenAPI description says of every route's failures."""


class RequestError(Exception):
    """A request that gets no answer: what its client is told, and with which status."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        kind: str = "BadRequestError",
        code: int | str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.kind = kind
        self.code = status if code is None else code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The reply, before it is JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param}
        return {"error": error | {"code": self.code}}

    def response(self) -> Response:
        """The reply as a response of its own."""
        return Response(to_json(self.body()), self.status, self.headers, "application/json")


def bad(message: str, param: str, value: Any = None) -> RequestError:
    """A 400 about one field; a value that is given is told in brackets."""
    told = "" if value is None else f", value={shortened(value)}"
    return RequestError(f"{message} (parameter={param}{told})", param)


def failed(status: int, message: str, **more: Any) -> RequestError:
    """A failure named by its status alone."""
    return RequestError(message, None, status, STATUS_TYPES.get(status, "Error"), **more)


def busy(message: str, retry_after_seconds: int) -> RequestError:
    """503 with the seconds after which to try again."""
    return failed(503, message, headers={"Retry-After": str(retry_after_seconds)})


def valid_unicode(text: str, param: str) -> bytes:
    """A text as UTF-8; 400 for half a surrogate pair, which JSON can spell."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} is not valid Unicode.", param) from None


def shortened(value: Any) -> str:
    """A piece of a request, short enough to be told back."""
    text = str(value)
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"


def to_json(value: Any) -> bytes:
    """Compact UTF-8; what is no valid Unicode is told with question marks."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def install(app: FastAPI) -> None:
    """Answer everything that goes wrong in `app` with the one body."""
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _unexpected)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {shortened(request.url.path)}."
    if error.status_code == 405:
        message = f"{shortened(request.url.path)} does not take {shortened(request.method)}."
    return failed(error.status_code, message, headers=error.headers).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    # What broke is in the log; a stranger is not told our code's insides.
    # Uvicorn closes the connection after an exception; the client should know not to use it again.
    close = {"Connection": "close"}
    return failed(500, "The server failed to handle this request.", headers=close).response()


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _told(list(error.errors())).response()


def _told(errors: list[dict[str, Any]]) -> RequestError:
    """One error for everything pydantic found, bounded."""
    lines = [shortened(_line(each)) for each in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        lines.append(f"and {len(errors) - MAX_ERRORS} more")
    count = f"{len(errors)} validation error{'s' if len(errors) > 1 else ''}:"
    error = failed(400, "\n  ".join([count, *lines]))
    error.param = shortened(_place(errors[0]))
    return error


def _line(error: dict[str, Any]) -> str:
    given = error.get("input")
    shown = f"<{type(given).__name__} of {len(given)}>" if isinstance(given, list | dict) else given
    return f"{shortened(_place(error))}: {error['msg']}, got {shortened(shown)}"


def _place(error: dict[str, Any]) -> str:
    return ".".join(str(part) for part in error["loc"])
