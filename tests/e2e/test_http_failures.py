"""What bad requests get: vLLM's statuses, one body, and nothing of our insides."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from dspark_jax.serve.http.settings import HttpSettings
from dspark_jax.serve.messages import Work
from tests.serving import ScriptedEngine, Server, served, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
P: dict[str, Any] = {"model": "tiny", "prompt": [100], "max_tokens": 2}
C: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 2,
}
BAD, OWN = "Bad Request", "BadRequestError"


class Row(NamedTuple):
    """A request, and the type, param and status of its answer; param "*" is not looked at."""

    name: str
    body: Any
    kind: str
    param: str | None = "*"
    status: int = 400
    path: str = COMPLETIONS
    message: str = ""


def p(**changes: Any) -> dict[str, Any]:
    return P | changes


def c(**changes: Any) -> dict[str, Any]:
    return C | changes


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


TABLE = [
    Row("malformed json", b'{"model": "tiny", ', BAD, "body.18"),
    Row("invalid utf8", b'{"model":"tiny","prompt":"\xff\xfe","max_tokens":2}', BAD),
    Row(
        "lone surrogate",
        b'{"model":"tiny","prompt":"\\ud800 hi","max_tokens":2}',
        OWN,
        "prompt",
        message="prompt is not valid Unicode.",
    ),
    Row(
        "lone surrogate in a conversation",
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        OWN,
        path=CHAT,
        message="not valid Unicode",
    ),
    Row(
        "lone surrogate in a model's name",
        b'{"model":"\\ud800","prompt":"x"}',
        "NotFoundError",
        "model",
        404,
    ),
    Row(
        "lone surrogate in a salt",
        b'{"prompt":"x","cache_salt":"\\ud800"}',
        OWN,
        "cache_salt",
        message="not valid Unicode",
    ),
    Row(
        "lone surrogate in a choice",
        b'{"prompt":"x","guided_choice":["\\ud800"]}',
        OWN,
        "structured_outputs",
        message="not valid Unicode",
    ),
    Row("empty body", b"", BAD, "body"),
    Row("json array", b"[]", BAD, "body"),
    Row("a number", b"3", BAD, "body"),
    Row("a number of 5,000 digits", b'{"max_tokens":' + b"9" * 5000 + b"}", BAD),
    Row("unknown model", p(model="nope"), "NotFoundError", "model", 404),
    Row("path traversal model", p(model="../../etc/passwd"), "NotFoundError", "model", 404),
    Row(
        "prompt too long",
        p(prompt=[100] * 600),
        OWN,
        "input_tokens",
        message="This model's maximum context length is 512 tokens. However, your prompt contains "
        "600 input tokens",
    ),
    Row("prompt as long as the context", p(prompt=[100] * 512), OWN, "input_tokens"),
    Row("text too long to tokenise", p(prompt="a" * 200_000), OWN, "input_tokens"),
    Row("conversation too long", c(messages=[{"role": "user", "content": "a b" * 9000}]), OWN,
        "input_tokens", path=CHAT),
    Row("oov token id", p(prompt=[99999]), OWN, message="Token id 99999 is out of vocabulary"),
    Row("oov token id among prompts", p(prompt=[[1], [512]]), OWN),
    Row("neg token id", p(prompt=[-1]), BAD),
    Row("oov stop token", p(stop_token_ids=[512]), OWN, "stop_token_ids"),
    Row("oov bias", p(logit_bias={"512": 1}), OWN, "logit_bias"),
    Row("bias of a word", p(logit_bias={"a": 1}), OWN, "logit_bias"),
    Row("bias NaN", b'{"model":"tiny","prompt":[9],"logit_bias":{"5":NaN}}', OWN, "logit_bias"),
    Row("empty prompt", p(prompt=""), OWN, "prompt"),
    Row("empty prompts", p(prompt=[]), OWN, "prompt"),
    Row("one empty prompt", p(prompt=["a", ""]), OWN, "prompt"),
    Row("null prompt", p(prompt=None), OWN, "prompt"),
    Row("temp -1", p(temperature=-1), OWN, "temperature",
        message="temperature must be non-negative, got -1.0."),
    Row("temp 3", p(temperature=3), OWN, "temperature"),
    Row("temp NaN", b'{"model":"tiny","prompt":[100],"temperature":NaN}', OWN, "temperature"),
    Row("temp Infinity", b'{"prompt":[100],"temperature":1e999}', OWN, "temperature"),
    Row("temp str", p(temperature="hot"), BAD, "body.temperature"),
    Row("top_p 0", p(top_p=0), OWN, "top_p"),
    Row("top_p 2", p(top_p=2), OWN, "top_p"),
    Row("min_p 2", p(min_p=2), OWN, "min_p"),
    Row("top_k -5", p(top_k=-5), OWN),
    Row("presence -3", p(presence_penalty=-3), OWN, "presence_penalty"),
    Row("frequency 3", p(frequency_penalty=3), OWN, "frequency_penalty"),
    Row("repetition 0", p(repetition_penalty=0), OWN, "repetition_penalty"),
    Row("max_tokens 0", p(max_tokens=0), OWN, "max_tokens"),
    Row("max_tokens huge", p(max_tokens=10**9), OWN, "max_tokens"),
    Row("max_completion_tokens 0", c(max_completion_tokens=0), OWN, "max_tokens", path=CHAT),
    Row("min_tokens -1", p(min_tokens=-1), OWN, "min_tokens"),
    Row("min_tokens above max_tokens", p(min_tokens=3), OWN, "min_tokens"),
    Row("n 0", p(n=0), OWN),
    Row("n 100000", p(n=100_000, temperature=1), OWN),
    Row("n2 greedy", p(n=2, temperature=0), OWN,
        message="n must be 1 when using greedy sampling, got 2."),
    Row("prompts times n", p(prompt=["a"] * 40, n=2, temperature=1), OWN),
    Row("logprobs 99", p(logprobs=99), OWN, "logprobs"),
    Row("logprobs -1", p(logprobs=-1), OWN, "logprobs"),
    Row("top_logprobs 21", c(logprobs=True, top_logprobs=21), OWN, "top_logprobs", path=CHAT),
    Row("seed 2**70", p(seed=2**70), BAD, "body.seed"),
    Row("stop empty", p(stop=""), OWN),
    Row("stop holds an empty one", p(stop=["a", ""]), OWN),
    Row("stop 5", p(stop=["a", "b", "c", "d", "e"]), BAD),
    Row("schema bad", p(response_format=schema({"type": "objekt"})), OWN,
        message="Grammar error: Invalid type: objekt"),
    Row("schema missing", p(response_format={"type": "json_schema"}), OWN),
    Row("rf type bad", p(response_format={"type": "yaml"}), BAD),
    Row("regex bad", p(guided_regex="[a-"), OWN, message="Grammar error:"),
    Row("grammar bad", p(structured_outputs={"grammar": "start: foo"}), OWN,
        message="Grammar error:"),
    Row("grammar huge", p(guided_grammar="start: " + '"a" ' * 30_000), OWN,
        message="Grammar error:"),
    Row("choice empty", p(guided_choice=[]), OWN, message="Grammar error:"),
    Row("json no json", p(guided_json="{"), OWN, message="Grammar error:"),
    Row("two forms", p(guided_regex="a", guided_choice=["a"]), OWN),
    Row("stream_options no stream", p(stream_options={"include_usage": True}), OWN,
        "stream_options"),
    Row("chat empty messages", c(messages=[]), OWN, path=CHAT),
    Row("chat no messages", {"model": "tiny"}, BAD, "body.messages", path=CHAT),
    Row("chat image", c(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), OWN,
        "messages", path=CHAT),
    Row("chat own template", c(chat_template="{{ 1 }}"), OWN, "chat_template", path=CHAT),
    Row("chat tools", c(tools=[{"type": "function"}]), OWN, "tools", path=CHAT),
    Row("chat tool_choice", c(tool_choice="auto"), OWN, "tool_choice", path=CHAT),
    Row("chat kwargs", c(chat_template_kwargs={"tokenize": True}), OWN, "chat_template_kwargs",
        path=CHAT),
    Row("chat goes on and begins", c(continue_final_message=True), OWN, path=CHAT),
    Row("top_logprobs no logprobs", c(top_logprobs=3), OWN, "top_logprobs", path=CHAT),
    Row("suffix", p(suffix="x"), OWN, "suffix"),
    Row("best_of", p(best_of=2), OWN, "best_of"),
    Row("prompt_logprobs 0", p(prompt_logprobs=0), OWN, "prompt_logprobs"),
    Row("prompt_logprobs", p(prompt_logprobs=1), OWN, "prompt_logprobs"),
    Row("echo with logprobs", p(echo=True, logprobs=1), OWN, "echo"),
    Row("cache_salt empty", p(cache_salt=""), OWN, "cache_salt"),
    Row("tokenize nothing", {}, BAD, path="/tokenize"),
    Row("tokenize another model", {"model": "x", "prompt": "a"}, "NotFoundError", "model", 404,
        "/tokenize"),
    Row("detokenize oov", {"tokens": [512]}, OWN, path="/detokenize"),
    Row("detokenize too many", {"tokens": [1] * 600}, OWN, "tokens", path="/detokenize"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(settings=HttpSettings(max_body_bytes=300_000)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def post(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=raw, headers={"content-type": "application/json"})


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The one body's error, its form checked."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    found = reply.json()
    assert list(found) == ["error"] and set(found["error"]) == {"message", "type", "param", "code"}
    assert isinstance(found["error"]["message"], str) and found["error"]["message"]
    return found["error"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_bad_request_is_refused_by_name(client: httpx.Client, row: Row) -> None:
    error = error_of(post(client, row.path, row.body), row.status)
    assert error["type"] == row.kind and error["code"] == row.status
    assert row.param == "*" or error["param"] == row.param
    assert row.message in error["message"]
    assert len(error["message"]) < 3000 and "Traceback" not in error["message"]


def test_nothing_bad_ever_reached_the_engine(server: Server) -> None:
    assert not [w for w in server.engine.works if max(w.prompt) >= 512 or w.max_tokens > 512]
    assert server.engine.load == 0


@pytest.mark.parametrize(
    "body",
    [
        p(prompt=[100] * 500, max_tokens=100),
        p(foo=1),
        p(user="u", priority=3),
        p(best_of=1, suffix=None, use_beam_search=False, bad_words=[]),
        c(messages=[{"role": "alien", "content": "x"}]),
        c(tools=[{"type": "function"}], tool_choice="none"),
        c(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        p(model=None),
        p(top_k=-1, n=2, temperature=1, seed=2**63 - 1),
    ],
)
def test_what_vllm_takes_is_taken(client: httpx.Client, body: dict[str, Any]) -> None:
    path = CHAT if "messages" in body else COMPLETIONS
    assert post(client, path, body).status_code == 200


def test_what_does_not_fit_is_shortened(client: httpx.Client) -> None:
    found = post(client, COMPLETIONS, p(prompt=[100] * 500, max_tokens=100)).json()
    assert found["usage"]["completion_tokens"] == 12
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_bad_body_cannot_ask_for_a_huge_reply(client: httpx.Client) -> None:
    error = error_of(post(client, COMPLETIONS, p(prompt=["x"] * 9000 + [{}] * 9000)), 400)
    assert len(error["message"]) < 3000 and "more" in error["message"]


def test_the_frameworks_own_errors_have_the_one_body(client: httpx.Client) -> None:
    reply = client.get(COMPLETIONS)
    assert error_of(reply, 405)["type"] == "Method Not Allowed" and reply.headers["allow"] == "POST"
    assert error_of(client.get("/v1/nope"), 404)["type"] == "Not Found"
    assert error_of(client.get("/v1/models/nope"), 404)["param"] == "model"


def test_only_json_is_read(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = client.post(COMPLETIONS, content=b'{"a":1}', headers={"content-type": kind})
        assert error_of(reply, 400)["message"].startswith("Unsupported Media Type")


def test_a_body_is_bounded_declared_or_not(client: httpx.Client) -> None:
    assert error_of(post(client, COMPLETIONS, b" " * 300_001), 413)["code"] == 413

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    kind = {"content-type": "application/json"}
    reply = client.post(COMPLETIONS, content=parts(), headers=kind)
    assert error_of(reply, 413)["type"] == "Request Entity Too Large"


def test_json_is_bounded_in_depth(client: httpx.Client) -> None:
    deep = b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert "deep" in error_of(post(client, COMPLETIONS, deep), 400)["message"]
    quoted = p(prompt="[" * 300)
    assert post(client, COMPLETIONS, quoted).status_code == 200


def test_what_breaks_inside_is_not_told() -> None:
    def broken(work: Work) -> list[int]:
        raise RuntimeError("a secret of the engine")

    with serving(ScriptedEngine(broken)) as running, running.client() as asked:
        for body in (P, P | {"stream": True}):
            reply = asked.post(COMPLETIONS, json=body)
            assert error_of(reply, 500)["type"] == "InternalServerError"
            assert "secret" not in reply.text
        assert asked.get("/load").json() == {"server_load": 0}


def test_a_template_that_breaks_is_a_bad_request() -> None:
    for template in ("{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ ''.__class__.mro() }}"):
        model = served(chat_template=template)
        with serving(model=model) as running, running.client() as asked:
            error = error_of(asked.post(CHAT, json=C), 400)
            assert "chat template" in error["message"]
