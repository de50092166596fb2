"""The small routes: models, tokens, health, version, load, metrics."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from dspark_jax import __version__
from dspark_jax.serve.http import checks
from dspark_jax.serve.http.errors import bad, to_json
from dspark_jax.serve.http.protocol import DetokenizeRequest, TokenizeChat, TokenizePrompt
from dspark_jax.serve.http.serving import Serving


def routes(serving: Serving) -> APIRouter:
    """All of them."""
    router = APIRouter()
    _watching(router, serving)
    _models(router, serving)
    _tokens(router, serving)
    return router


def _watching(router: APIRouter, serving: Serving) -> None:
    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """Empty; 503 while compiling, draining, or after the engine failed."""
        return Response(status_code=200 if serving.healthy else 503)

    @router.get("/ping", response_class=Response)
    @router.post("/ping", response_class=Response)
    async def ping() -> Response:
        """As /health."""
        return Response(status_code=200 if serving.healthy else 503)

    @router.get("/version")
    async def version() -> Response:
        """The version of this package."""
        return JSONResponse({"version": __version__})

    @router.get("/load")
    async def load() -> Response:
        """Requests being answered."""
        return JSONResponse({"server_load": serving.load})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(serving.metrics.registry), 200, None, CONTENT_TYPE_LATEST)


def _models(router: APIRouter, serving: Serving) -> None:
    @router.get("/v1/models")
    async def models() -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [_card(serving)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """The one model, by its name."""
        checks.known_model(name, serving.model)
        return JSONResponse(_card(serving))


def _card(serving: Serving) -> dict[str, Any]:
    model = serving.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dspark-jax",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _tokens(router: APIRouter, serving: Serving) -> None:
    model = serving.model

    @router.post("/tokenize")
    async def tokenize(http: Request, request: TokenizeChat | TokenizePrompt) -> Response:
        """The tokens of a text or of a conversation."""
        checks.known_model(request.model, model)
        if isinstance(request, TokenizePrompt):
            tokens = await serving.prompts.text(request.prompt, request.add_special_tokens)
        else:
            tokens = await serving.prompts.chat(request)
        texts = model.tokenizer.convert_ids_to_tokens(list(tokens))
        found = {"count": len(tokens), "max_model_len": model.max_model_len}
        found |= {"tokens": tokens, "token_strs": texts if request.return_token_strs else None}
        return Response(to_json(found), media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Response:
        """The text of tokens."""
        checks.known_model(request.model, model)
        if len(request.tokens) > model.max_model_len:
            raise bad(f"at most {model.max_model_len} tokens", "tokens", len(request.tokens))
        for token in request.tokens:
            checks.in_vocabulary(token, model, "tokens")
        return Response(
            to_json({"prompt": model.tokenizer.decode(request.tokens)}),
            media_type="application/json",
        )
