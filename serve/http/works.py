"""From a checked request to the works of its answers, and what every reply says of them."""

import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from dspark_jax import __version__
from dspark_jax.serve.http import checks
from dspark_jax.serve.http.answer import Piece, TextRules
from dspark_jax.serve.http.errors import to_json
from dspark_jax.serve.http.protocol import ChatRequest, CompletionRequest
from dspark_jax.serve.http.serving import Run, Serving
from dspark_jax.serve.http.speculation import speculation
from dspark_jax.serve.http.stream import EventStream
from dspark_jax.serve.messages import SamplingParams, Work

FINGERPRINT = f"dspark-jax-{__version__}"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
INT64 = 2**63


@dataclass(frozen=True)
class Asked:
    """One request on its way to be answered: answer `i` belongs to prompt `i // n`."""

    id: str
    created: int
    run: Run
    n: int
    prompts: list[tuple[int, ...]]


class Writer(Protocol):
    """Writes the answers of one request, as events or as a whole."""

    def events(self) -> AsyncIterator[Mapping[str, Any]]: ...

    async def whole(self) -> Any: ...


async def sent(
    serving: Serving,
    http: Request,
    request: CompletionRequest | ChatRequest,
    asked: Asked,
    writer: Writer,
) -> Response:
    """The reply: a stream, or the whole; the run is closed however it ends."""
    if request.stream:
        timeout = serving.settings.slow_client_timeout_seconds
        return EventStream(writer.events(), asked.run.close, timeout, headers(http))
    try:
        body = await writer.whole()
    finally:
        asked.run.close()
    return Response(to_json(body), 200, headers(http), "application/json")


async def start(
    serving: Serving,
    http: Request,
    request: CompletionRequest | ChatRequest,
    prompts: Sequence[tuple[int, ...]],
    prefix: str,
) -> Asked:
    """Queue all answers of a request that passed `checks.check`."""
    sampling = checks.sampling(request, serving.model)
    asked_id = f"{prefix}-{request_id(http, request)}"
    template = Work(
        asked_id,
        (0,),
        1,
        sampling,
        min_tokens=request.min_tokens,
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        logprobs=checks.logprobs(request),
        grammar=await serving.grammars.of(request),
        cache_salt=request.cache_salt or "",
        speculate=request.speculate,
    )
    longest = checks.max_tokens(request)
    works = []
    for prompt in prompts:
        room = serving.model.max_model_len - len(prompt)
        limit = min(room, default_tokens(request, room) if longest is None else longest)
        first = replace(template, prompt=prompt, max_tokens=limit)
        first = replace(first, min_tokens=min(first.min_tokens, limit))
        serving.metrics.asked(request.n, limit)
        works += [replace(first, sampling=_seeded(sampling, i)) for i in range(request.n)]
    rules = TextRules(
        checks.stops(request), request.include_stop_str_in_output, request.skip_special_tokens
    )
    run = serving.run(works, rules)
    return Asked(asked_id, int(time.time()), run, request.n, list(prompts))


def _seeded(sampling: SamplingParams, i: int) -> SamplingParams:
    """The parameters of answer `i`: each of several answers has a seed of its own."""
    if sampling.seed is None or i == 0:
        return sampling
    seed = sampling.seed + i
    return replace(sampling, seed=seed if seed < INT64 else seed - 2 * INT64)


def default_tokens(request: CompletionRequest | ChatRequest, room: int) -> int:
    """How long an answer may be when the request does not say: OpenAI's 16, or all there is."""
    return 16 if isinstance(request, CompletionRequest) else room


def request_id(http: Request, request: CompletionRequest | ChatRequest) -> str:
    """The client's own name for a request where it is printable, else a fresh one."""
    for given in (http.headers.get("x-request-id"), request.request_id):
        if given and REQUEST_ID.fullmatch(given):
            return given
    return uuid.uuid4().hex[:16]


def headers(http: Request) -> dict[str, str]:
    """The client's X-Request-Id, given back."""
    given = http.headers.get("x-request-id", "")
    return {"x-request-id": given} if REQUEST_ID.fullmatch(given) else {}


def usage(asked: Asked) -> dict[str, Any]:
    """Tokens read and written so far, over all answers; a prompt counts once."""
    answers = asked.run.answers
    prompt = sum(map(len, asked.prompts))
    written = sum(answer.token_count for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers[:: asked.n])
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + written,
        "completion_tokens": written,
        "prompt_tokens_details": {"cached_tokens": cached} if cached else None,
    }


def closing(serving: Serving, asked: Asked) -> dict[str, Any]:
    """What ends a reply: the fingerprint, and how speculation went if the server tells."""
    found: dict[str, Any] = {"system_fingerprint": FINGERPRINT}
    level = serving.settings.per_request_spec_decode_metrics
    if level != "none":
        rounds = [each for answer in asked.run.answers for each in answer.rounds]
        told = speculation(rounds, serving.model.draft_length, level == "detailed")
        found["metrics"] = {"speculative_decoding": told}
    return found


def details(piece: Piece) -> dict[str, Any]:
    """Ours, for who asks with `dspark_details`: which tokens a chunk holds, and how it came.

    The first `accepted` tokens of a round were drafted, its last is the bonus token. Both numbers
    are None where nothing was drafted; a slow reader gets several `rounds` in one chunk.
    """
    return {
        "accepted": sum(kept for _, kept in piece.rounds) if piece.rounds else None,
        "verified": sum(verified for verified, _ in piece.rounds) if piece.rounds else None,
        "rounds": [list(each) for each in piece.rounds],
        "tokens": [list(each) for each in zip(piece.tokens, piece.token_texts, strict=True)],
    }
