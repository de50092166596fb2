"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from dspark_jax.serve.http import checks, works
from dspark_jax.serve.http.answer import Piece
from dspark_jax.serve.http.completions import LOWEST
from dspark_jax.serve.http.errors import bad
from dspark_jax.serve.http.protocol import ChatRequest
from dspark_jax.serve.http.serving import Serving
from dspark_jax.serve.http.stream import ANSWERS, unless_left
from dspark_jax.serve.messages import TokenLogprob


def routes(serving: Serving) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(http: Request, request: ChatRequest) -> Response:
        """Answer a conversation."""
        return await unless_left(http, answer(serving, http, request))

    return router


async def answer(serving: Serving, http: Request, request: ChatRequest) -> Response:
    """Check, render, tokenise, queue; then a stream, or the whole."""
    checks.check(request, serving.model, serving.settings)
    _no_tools(request)
    checks.sampling(request, serving.model)
    checks.logprobs(request)
    prompt = await serving.prompts.chat(request)
    asked = await works.start(serving, http, request, [prompt], "chatcmpl")
    return await works.sent(serving, http, request, asked, Reply(serving, request, asked))


def _no_tools(request: ChatRequest) -> None:
    if request.tool_choice == "none":
        return
    if request.tools:
        raise bad("tools are not served here; send tool_choice 'none' to go without", "tools")
    if request.tool_choice is not None:
        raise bad("When using `tool_choice`, `tools` must be set.", "tool_choice")


class Reply:
    """Writes the answers of one request, as events or as a whole."""

    def __init__(self, serving: Serving, request: ChatRequest, asked: works.Asked):
        self._serving = serving
        self._request = request
        self._asked = asked
        self._begun: set[int] = set()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """A chunk with the role, one for each delta, and usage at the end if asked."""
        include, continuous = checks.usage_wanted(self._request.stream_options)
        left = len(self._asked.run.answers)
        async for piece in self._asked.run.pieces():
            left -= piece.finish is not None
            for chunk in self._chunks(piece):
                if continuous:
                    chunk["usage"] = works.usage(self._asked)
                if not left and not include and chunk["choices"][0]["finish_reason"]:
                    chunk |= works.closing(self._serving, self._asked)
                yield chunk
        if include:
            usage = {"choices": [], "usage": works.usage(self._asked)}
            yield self._head() | usage | works.closing(self._serving, self._asked)

    def _chunks(self, piece: Piece) -> list[dict[str, Any]]:
        found = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            delta = {"role": "assistant", "content": self._echoed()}
            role = {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
            ids = list(self._asked.prompts[0]) if self._request.return_token_ids else None
            found.append(self._head() | {"choices": [role], "prompt_token_ids": ids})
        choice = {"index": piece.index, "delta": {"content": piece.text}} | self._ending(piece)
        found.append(self._head() | {"choices": [choice]})
        if self._request.dspark_details:
            found[-1]["dspark"] = works.details(piece)
        return found

    async def whole(self) -> dict[str, Any]:
        """All answers, each a choice."""
        pieces: dict[int, list[Piece]] = {}
        async for piece in self._asked.run.pieces():
            pieces.setdefault(piece.index, []).append(piece)
        found = self._head("chat.completion") | {
            "choices": [self._choice(pieces[i]) for i in sorted(pieces)],
            "service_tier": None,
            "usage": works.usage(self._asked),
            "prompt_token_ids": None,
        }
        if self._request.return_token_ids:
            found["prompt_token_ids"] = list(self._asked.prompts[0])
        return found | works.closing(self._serving, self._asked)

    def _choice(self, pieces: list[Piece]) -> dict[str, Any]:
        last = pieces[-1]
        whole = Piece(
            last.index,
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            tuple(each for piece in pieces for each in piece.logprobs),
            (),
            (),
            last.finish,
            last.stop_reason,
        )
        content = self._echoed() + whole.text
        message = {"role": "assistant", "content": content, "refusal": None}
        return {"index": whole.index, "message": message} | self._ending(whole)

    def _ending(self, piece: Piece) -> dict[str, Any]:
        """What a choice says beside its text."""
        logprobs = None
        if self._request.logprobs:
            logprobs = {"content": [self._logprob(each) for each in piece.logprobs]}
        return {
            "logprobs": logprobs,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
            "token_ids": list(piece.tokens) if self._request.return_token_ids else None,
        }

    def _head(self, kind: str = "chat.completion.chunk") -> dict[str, Any]:
        return {
            "id": self._asked.id,
            "object": kind,
            "created": self._asked.created,
            "model": self._serving.model.name,
        }

    def _echoed(self) -> str:
        """The turn that the answer goes on with, when its echo was asked for."""
        last = self._request.messages[-1]
        if not self._request.echo or last.role != "assistant":
            return ""
        return last.content if isinstance(last.content, str) else ""

    def _logprob(self, found: TokenLogprob) -> dict[str, Any]:
        top = [self._shown(token, value) for token, value in found.top]
        return self._shown(found.token, found.logprob) | {"top_logprobs": top}

    def _shown(self, token: int, value: float) -> dict[str, Any]:
        text = self._serving.token_text(token, self._request.return_tokens_as_token_ids)
        return {"token": text, "logprob": max(value, LOWEST), "bytes": list(text.encode())}
