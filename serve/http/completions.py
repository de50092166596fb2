"""POST /v1/completions."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dspark_jax.serve.http import checks, works
from dspark_jax.serve.http.answer import Piece
from dspark_jax.serve.http.errors import bad
from dspark_jax.serve.http.protocol import CompletionRequest
from dspark_jax.serve.http.serving import Serving
from dspark_jax.serve.http.stream import ANSWERS, unless_left
from dspark_jax.serve.messages import TokenLogprob

LOWEST = -9999.0
"""JSON has no infinity; vLLM's stand-in for it."""


def routes(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", responses=ANSWERS)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        """Complete one prompt or several."""
        return await unless_left(http, complete(serving, http, request))

    return router


async def complete(serving: Serving, http: Request, request: CompletionRequest) -> Response:
    """Check, tokenise, queue; then a stream, or the whole."""
    checks.check(request, serving.model, serving.settings)
    if request.echo and request.logprobs is not None:
        raise bad("logprobs of an echoed prompt are not served here", "echo")
    checks.sampling(request, serving.model)
    checks.logprobs(request)
    prompts = await serving.prompts.completion(request)
    asked = await works.start(serving, http, request, prompts, "cmpl")
    return await works.sent(serving, http, request, asked, Reply(serving, request, asked))


class Reply:
    """Writes the answers of one request, as events or as a whole."""

    def __init__(self, serving: Serving, request: CompletionRequest, asked: works.Asked):
        self._serving = serving
        self._request = request
        self._asked = asked
        self._begun: set[int] = set()
        self._offsets = [0] * len(asked.run.answers)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk for each delta, and usage at the end if asked."""
        include, continuous = checks.usage_wanted(self._request.stream_options)
        left = len(self._asked.run.answers)
        async for piece in self._asked.run.pieces():
            chunk = self._head() | {"choices": [self._choice(piece)]}
            left -= piece.finish is not None
            if continuous:
                chunk["usage"] = works.usage(self._asked)
            if not left and not include:
                chunk |= works.closing(self._serving, self._asked)
            if self._request.dspark_details:
                chunk["dspark"] = works.details(piece)
            yield chunk
        if include:
            usage = {"choices": [], "usage": works.usage(self._asked)}
            yield self._head() | usage | works.closing(self._serving, self._asked)

    async def whole(self) -> dict[str, Any]:
        """All answers, each a choice."""
        choices: dict[int, dict[str, Any]] = {}
        async for piece in self._asked.run.pieces():
            later = self._choice(piece)
            earlier = choices.get(piece.index)
            choices[piece.index] = _joined(earlier, later) if earlier else later
        ordered = [choices[i] for i in sorted(choices)]
        usage = {"choices": ordered, "service_tier": None, "usage": works.usage(self._asked)}
        return self._head() | usage | works.closing(self._serving, self._asked)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._asked.id,
            "object": "text_completion",
            "created": self._asked.created,
            "model": self._serving.model.name,
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        prompt = piece.index // self._asked.n
        echoed = self._prompt_text(prompt) if first and self._request.echo else ""
        ids = self._request.return_token_ids
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._logprobs(piece.index, piece.logprobs)
        return {
            "index": piece.index,
            "text": echoed + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
            "prompt_token_ids": list(self._asked.prompts[prompt]) if ids and first else None,
            "token_ids": list(piece.tokens) if ids else None,
        }

    def _prompt_text(self, i: int) -> str:
        given = self._request.prompt
        if isinstance(given, str):
            return given
        if isinstance(given, list) and isinstance(given[i], str):
            return str(given[i])
        return self._serving.model.tokenizer.decode(list(self._asked.prompts[i]))

    def _logprobs(self, index: int, found: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """The older API's four lists; a token's offset counts the characters of those before."""
        as_id = self._request.return_tokens_as_token_ids
        tokens, offsets = [], []
        for each in found:
            tokens.append(self._serving.token_text(each.token, as_id))
            offsets.append(self._offsets[index])
            self._offsets[index] += len(tokens[-1])
        return {
            "text_offset": offsets,
            "token_logprobs": [max(each.logprob, LOWEST) for each in found],
            "tokens": tokens,
            "top_logprobs": [self._top(each, as_id) for each in found],
        }

    def _top(self, each: TokenLogprob, as_id: bool) -> dict[str, float]:
        pairs = [(each.token, each.logprob), *each.top]
        told = {token: value for token, value in pairs}
        name = self._serving.token_text
        return {name(t, as_id): max(value, LOWEST) for t, value in told.items()}


def _joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of one choice as one."""
    found = later | {"text": earlier["text"] + later["text"]}
    found["prompt_token_ids"] = earlier["prompt_token_ids"]
    if later["token_ids"] is not None:
        found["token_ids"] = earlier["token_ids"] + later["token_ids"]
    if later["logprobs"] is not None:
        lists = later["logprobs"].items()
        found["logprobs"] = {name: earlier["logprobs"][name] + new for name, new in lists}
    return found
