"""The form an answer must have: what a request asks for, as a grammar that llguidance accepts."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer

from dspark_jax.serve.http.errors import RequestError, bad, busy, shortened, valid_unicode
from dspark_jax.serve.http.protocol import Generation
from dspark_jax.serve.http.settings import HttpSettings, ServedModel
from dspark_jax.serve.messages import Grammar

ANY_OBJECT = '{"type": "object"}'
MAX_CHOICES = 1000
MAX_LARK_CHARACTERS = 8192
"""Rules that lead to one another are followed on the stack, which some thousands of them overflow:
that would end the process, not the request."""
BUSY_COMPILING = "Another request's grammar is still being compiled. Please try again later."


class Grammars:
    """Compiles grammars away from the event loop, one at a time, within limits."""

    def __init__(self, model: ServedModel, settings: HttpSettings):
        self._settings = settings
        self._tokens = from_tokenizer(model.tokenizer, n_vocab=model.vocab_size)
        # A thread cannot be killed, so a hostile grammar holds this one and no other.
        self._pool = ThreadPoolExecutor(1, "grammar")

    async def of(self, request: Generation) -> Grammar | None:
        """The grammar of a request, None for free text; 400 for one that does not compile."""
        asked = asked_form(request)
        if asked is None:
            return None
        if len(valid_unicode(asked.text, "structured_outputs")) > self._settings.max_grammar_bytes:
            raise _error(f"it is larger than {self._settings.max_grammar_bytes} bytes")
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._pool, _timed, loop, begun, asked, self._tokens)
        seconds = self._settings.grammar_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await begun.wait()
        except TimeoutError:
            work.cancel()
            raise busy(BUSY_COMPILING, self._settings.retry_after_seconds) from None
        try:
            async with asyncio.timeout(seconds):
                found = await work
        except TimeoutError:
            raise _error("it takes too long to compile") from None
        if found:
            raise _error(found)
        return asked

    def close(self) -> None:
        """Let the thread go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _timed(
    loop: asyncio.AbstractEventLoop, begun: asyncio.Event, grammar: Grammar, tokens: LLTokenizer
) -> str:
    """`fault`, once its turn has come; the clock starts then."""
    loop.call_soon_threadsafe(begun.set)
    return fault(grammar, tokens)


def fault(grammar: Grammar, tokens: LLTokenizer) -> str:
    """What is wrong with a grammar, "" when its first tokens could be masked."""
    try:
        text = grammar_from(grammar.kind, grammar.text)
    except ValueError as error:
        return str(error)
    limits = LLParserLimits()
    matcher = LLMatcher(tokens, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def asked_form(request: Generation) -> Grammar | None:
    """The one form a request asks for; 400 when it asks for several."""
    found = [
        *_response_format(request),
        *_structured(request),
        *_forms("guided_", request.guided_json, request.guided_regex, request.guided_grammar),
        *([_choice(request.guided_choice)] if request.guided_choice is not None else []),
    ]
    if len(found) > 1:
        raise bad("only one form of an answer can be asked for", "structured_outputs")
    return found[0] if found else None


def _response_format(request: Generation) -> list[Grammar]:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [Grammar("json_schema", ANY_OBJECT)]
    schema = (asked.json_schema or {}).get("schema")
    if not isinstance(schema, dict | bool):
        raise bad("json_schema must hold a `schema`", "response_format")
    return [_schema(schema)]


def _structured(request: Generation) -> list[Grammar]:
    asked = request.structured_outputs
    if asked is None:
        return []
    found = _forms("structured_outputs.", asked.json_, asked.regex, asked.grammar)
    if asked.choice is not None:
        found.append(_choice(asked.choice))
    if asked.json_object:
        found.append(Grammar("json_schema", ANY_OBJECT))
    return found


def _forms(
    prefix: str, schema: dict[str, Any] | str | None, regex: str | None, grammar: str | None
) -> list[Grammar]:
    found = []
    if schema is not None:
        found.append(_schema(schema if isinstance(schema, dict) else _parsed(schema, prefix)))
    if regex is not None:
        found.append(Grammar("regex", regex))
    if grammar is not None:
        if len(grammar) > MAX_LARK_CHARACTERS:
            raise _error(f"a grammar of rules has at most {MAX_LARK_CHARACTERS} characters")
        found.append(Grammar("lark", grammar))
    return found


def _schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))


def _parsed(text: str, prefix: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(f"{prefix}json is not JSON: {error}") from None


def _choice(options: list[str]) -> Grammar:
    if not options or len(options) > MAX_CHOICES or not all(options):
        raise _error(f"a choice is between 1 and {MAX_CHOICES} texts that are not empty")
    quoted = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
    return Grammar("lark", f"start: {quoted}")


def _error(message: str) -> RequestError:
    return RequestError(f"Grammar error: {shortened(message)}", "structured_outputs")
