"""What the values of a request may be, and the parameters and limits they become."""

import math
from dataclasses import replace
from typing import Any

from dspark_jax.serve.http.errors import RequestError, bad, shortened, valid_unicode
from dspark_jax.serve.http.protocol import ChatRequest, CompletionRequest, Generation, StreamOptions
from dspark_jax.serve.http.settings import HttpSettings, ServedModel
from dspark_jax.serve.messages import SamplingParams

MAX_LOGPROBS = 20
LOWEST_TEMPERATURE = 0.01
"""Logits divided by less overflow; vLLM raises it to the same."""
MAX_STOP_CHARS = 1024
MAX_NAME_CHARS = 256
NOT_SERVED = (
    "best_of",
    "use_beam_search",
    "prompt_logprobs",
    "prompt_embeds",
    "truncate_prompt_tokens",
    "bad_words",
    "allowed_token_ids",
    "logits_processors",
    "suffix",
    "functions",
    "function_call",
    "documents",
    "chat_template",
)
"""Fields that would change the answer: taking them in silence would be a lie."""


def known_model(name: str | None, model: ServedModel) -> None:
    """404 for a model that is not the served one; the name is compared, nothing is opened."""
    if name is not None and name != model.name:
        raise RequestError(
            f"The model `{shortened(name)}` does not exist. Valid aliases: {model.name}.",
            "model",
            404,
            "NotFoundError",
        )


def check(request: Generation, model: ServedModel, settings: HttpSettings) -> None:
    """Refuse what cannot be answered: everything but the prompt, the sampling and the grammar."""
    known_model(request.model, model)
    for name in NOT_SERVED:
        if _matters(request, name):
            raise bad(f"{name} is not served here", name)
    _counts(request, model, settings)
    _stops(request, model)
    _stream_options(request)
    for name in ("cache_salt", "request_id"):
        value = getattr(request, name)
        if value is not None and not 0 < len(value) <= MAX_NAME_CHARS:
            raise bad(f"{name} must have 1 to {MAX_NAME_CHARS} characters", name)
        valid_unicode(value or "", name)


def _matters(request: Generation, name: str) -> bool:
    """Whether a field asks for something; some clients send every field they know, empty."""
    value: Any = getattr(request, name, None)
    if name == "best_of":
        return value not in (None, request.n)
    return not (value is None or value is False or value in ("", []))


def _counts(request: Generation, model: ServedModel, settings: HttpSettings) -> None:
    asked = max_tokens(request)
    if asked is not None and asked < 1:
        raise bad(f"max_tokens must be at least 1, got {asked}.", "max_tokens", asked)
    if asked is not None and asked > model.max_model_len:
        raise bad(
            f"max_tokens={asked} cannot be greater than max_model_len={model.max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
            asked,
        )
    if request.min_tokens < 0:
        raise bad(f"min_tokens must be non-negative, got {request.min_tokens}.", "min_tokens")
    if asked is not None and request.min_tokens > asked:
        raise bad(
            f"min_tokens must be at most max_tokens={asked}, got {request.min_tokens}.",
            "min_tokens",
            request.min_tokens,
        )
    if request.n < 1:
        raise bad(f"n must be at least 1, got {request.n}.", "n")
    if request.n > settings.max_answers:
        raise bad(f"n must be at most {settings.max_answers}, got {request.n}.", "n")


def max_tokens(request: Generation) -> int | None:
    """The asked length of an answer in tokens; chat's newer name for it wins."""
    newer = getattr(request, "max_completion_tokens", None)
    return request.max_tokens if newer is None else newer


def stops(request: Generation) -> tuple[str, ...]:
    """The stop strings."""
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def _stops(request: Generation, model: ServedModel) -> None:
    if any(not stop for stop in stops(request)):
        raise bad("stop cannot contain an empty string.", "stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops(request)):
        raise bad(f"a stop string has at most {MAX_STOP_CHARS} characters", "stop")
    for token in request.stop_token_ids or ():
        in_vocabulary(token, model, "stop_token_ids")


def in_vocabulary(token: int, model: ServedModel, param: str) -> None:
    """400 for a token that the model does not have: its embedding would be garbage."""
    if not 0 <= token < model.vocab_size:
        raise RequestError(f"Token id {shortened(token)} is out of vocabulary", param)


def _stream_options(request: Generation) -> None:
    if request.stream_options is not None and not request.stream:
        raise bad("Stream options can only be defined when `stream=True`.", "stream_options")


def usage_wanted(options: StreamOptions | None) -> tuple[bool, bool]:
    """Whether a stream ends in usage, and whether each of its chunks carries it."""
    if options is None or not options.include_usage:
        return False, False
    return True, bool(options.continuous_usage_stats)


def logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    """How many likely tokens to report; None reports nothing."""
    if isinstance(request, CompletionRequest):
        return _in_range(request.logprobs, "logprobs")
    if request.top_logprobs and not request.logprobs:
        raise bad("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    top = _in_range(request.top_logprobs or 0, "top_logprobs")
    return top if request.logprobs else None


def _in_range(count: int | None, param: str) -> int | None:
    if count is not None and count < 0:
        raise bad(f"{param} must be non-negative, got {count}.", param, count)
    if count is not None and count > MAX_LOGPROBS:
        raise bad(
            f"Requested sample logprobs of {count}, which is greater than max allowed: "
            f"{MAX_LOGPROBS}",
            param,
            count,
        )
    return count


def sampling(request: Generation, model: ServedModel) -> SamplingParams:
    """The parameters of a request over the model's own defaults, every one in its range."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty")
    names += ("presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    for name, value in given.items():
        if not math.isfinite(value):
            raise bad(f"{name} must be a finite number, got {value}.", name, value)
    if request.top_k is not None:
        if request.top_k < -1:
            raise bad(f"top_k must be 0 (disable), or at least 1, got {request.top_k}.", "top_k")
        given["top_k"] = min(max(request.top_k, 0), model.vocab_size)
    found = replace(
        model.default_sampling, seed=request.seed, logit_bias=_bias(request, model), **given
    )
    _ranges(found)
    if 0 < found.temperature < LOWEST_TEMPERATURE:
        found = replace(found, temperature=LOWEST_TEMPERATURE)
    if request.n > 1 and found.temperature == 0:
        raise bad(f"n must be 1 when using greedy sampling, got {request.n}.", "n")
    return found


def _ranges(found: SamplingParams) -> None:
    if found.temperature < 0:
        raise bad(
            f"temperature must be non-negative, got {found.temperature}.",
            "temperature",
            found.temperature,
        )
    for name, fits, said in (
        ("temperature", found.temperature <= 2, "[0, 2]"),
        ("top_p", 0 < found.top_p <= 1, "(0, 1]"),
        ("min_p", 0 <= found.min_p <= 1, "[0, 1]"),
        ("presence_penalty", -2 <= found.presence_penalty <= 2, "[-2, 2]"),
        ("frequency_penalty", -2 <= found.frequency_penalty <= 2, "[-2, 2]"),
        ("repetition_penalty", 0 < found.repetition_penalty <= 2, "(0, 2]"),
    ):
        if not fits:
            value = getattr(found, name)
            raise bad(f"{name} must be in {said}, got {value}.", name, value)


def _bias(request: Generation, model: ServedModel) -> tuple[tuple[int, float], ...]:
    found = {}
    for key, value in (request.logit_bias or {}).items():
        try:
            token = int(key)
        except ValueError:
            raise bad("logit_bias maps token ids to numbers", "logit_bias", key) from None
        in_vocabulary(token, model, "logit_bias")
        if not math.isfinite(value):
            raise bad(f"logit_bias must be finite, got {value}.", "logit_bias", value)
        found[token] = min(100.0, max(-100.0, value))
    return tuple(found.items())
