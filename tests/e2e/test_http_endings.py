"""How answers end: stop strings, clients that leave or do not read, engines that fail, drains."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dspark_jax.serve.http.settings import HttpSettings
from tests.serving import FULL, ScriptedEngine, Server, saying, served, serving, tokenizer, until

TEXT = "one, two, three, four, five, six, seven, eight, nine, ten"
SLOW = 0.02
ROOT = Path(__file__).parents[2]


def streamed(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The events of a completion, but for [DONE], with which it ends."""
    body = {"prompt": [9], "stream": True} | body
    with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.mark.parametrize("stop", ["three", "e, f", ", t", "four, five, six", "o"])
@pytest.mark.parametrize("include", [False, True])
def test_an_answer_is_cut_at_its_stop_string(stop: str, include: bool) -> None:
    end = TEXT.index(stop) + (len(stop) if include else 0)
    with serving(ScriptedEngine(saying(TEXT))) as server, server.client() as client:
        body = {"prompt": [9], "max_tokens": 100, "stop": ["never", stop]}
        body |= {"include_stop_str_in_output": include, "return_token_ids": True}
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert choice["text"] == TEXT[:end]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        chunks = [chunk["choices"][0] for chunk in streamed(client, **body)]
        assert "".join(chunk["text"] for chunk in chunks) == TEXT[:end]
        assert chunks[-1]["stop_reason"] == stop
        # Tokens end with the one that completed the stop string, and the engine hears of it.
        tokens = [t for chunk in chunks for t in chunk["token_ids"]]
        assert tokens == choice["token_ids"] == tokenizer()(TEXT)["input_ids"][: len(tokens)]
        assert stop in tokenizer().decode(tokens)
        assert stop not in tokenizer().decode(tokens[:-1])
        until(lambda: server.engine.load == 0)


def test_no_stop_string_ends_before_min_tokens() -> None:
    text = "a" * 8 + "b" + "a" * 8
    with serving(ScriptedEngine(saying(text))) as server, server.client() as client:
        before = len(tokenizer()("a" * 8 + "b")["input_ids"])
        body = {"prompt": [9], "max_tokens": 100, "stop": "a", "min_tokens": before}
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert choice["text"].startswith("aaaaaaaab") and choice["finish_reason"] == "stop"
        assert choice["text"] == "aaaaaaaab"


def test_a_stop_token_is_the_reason_and_an_end_token_is_none() -> None:
    tokens = tokenizer()(TEXT)["input_ids"]
    with serving(ScriptedEngine(saying(TEXT))) as server, server.client() as client:
        body = {"prompt": [9], "max_tokens": 100}
        asked = body | {"stop_token_ids": [tokens[4]]}
        (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
        first = tokens.index(tokens[4])
        assert choice["text"] == tokenizer().decode(tokens[:first])
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[4])
        (choice,) = client.post("/v1/completions", json=body).json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert choice["text"] == TEXT


def test_a_client_that_leaves_a_stream_is_forgotten() -> None:
    with serving(ScriptedEngine(round_seconds=SLOW)) as server, server.client() as client:
        body = {"prompt": [9], "max_tokens": 500, "stream": True, "n": 2}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
            assert server.engine.load == 2
        until(lambda: server.engine.load == 0, 5)
        assert len(server.engine.aborts) == 2
        until(lambda: client.get("/load").json() == {"server_load": 0})
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 2


def connected(server: Server, body: dict[str, Any]) -> socket.socket:
    """A client that asks and then reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    made.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
    return made


def test_a_client_that_leaves_before_its_answer_is_forgotten() -> None:
    with serving(ScriptedEngine(round_seconds=SLOW)) as server:
        with connected(server, {"prompt": [9], "max_tokens": 500}):
            until(lambda: server.engine.load == 1)
        until(lambda: server.engine.load == 0, 5)
        assert len(server.engine.aborts) == 1


def test_a_client_that_does_not_read_is_dropped_and_hinders_nobody() -> None:
    settings = HttpSettings(slow_client_timeout_seconds=0.5, max_pending_deltas=8)
    long = served(max_model_len=200_000)
    engine = ScriptedEngine(round_seconds=0.0002)
    with serving(engine, settings, long) as server, server.client() as client:
        body = {"prompt": [9], "max_tokens": 199_000, "stream": True}
        with connected(server, body):
            until(lambda: engine.load == 1)
            reply = client.post("/v1/completions", json={"prompt": [9], "max_tokens": 8})
            assert reply.status_code == 200
            until(lambda: bool(engine.aborts), 20)
            until(lambda: engine.load == 0)
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 1


def test_a_slow_reader_gets_everything_in_fewer_events() -> None:
    settings = HttpSettings(max_pending_deltas=4)
    long = served(max_model_len=20_000)
    with serving(ScriptedEngine(), settings, long) as server:
        body = {"prompt": [9], "max_tokens": 9000, "stream": True, "return_token_ids": True}
        with connected(server, body) as reader:
            until(lambda: server.engine.load == 0 and bool(server.engine.works), 30)
            reader.settimeout(10)
            received = b""
            while b"[DONE]" not in received[-100:]:
                received += reader.recv(1 << 16)
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: {")]
    choices = [json.loads(line[6:])["choices"][0] for line in lines]
    assert sum(len(choice["token_ids"]) for choice in choices) == 9000
    assert len(choices) < 3000 and choices[-1]["finish_reason"] == "length"


def test_an_answer_that_fails_ends_its_stream_with_an_error() -> None:
    engine = ScriptedEngine(fails_with="The logits are not finite.")
    with serving(engine) as server, server.client() as client:
        *chunks, last = streamed(client, max_tokens=50)
        assert chunks[0]["choices"][0]["text"]
        expected = {"message": "The logits are not finite.", "type": "InternalServerError"}
        assert last == {"error": expected | {"param": None, "code": 500}}
        reply = client.post("/v1/completions", json={"prompt": [9]})
        assert reply.status_code == 500 and reply.json() == last
        assert server.metric("vllm:request_success_total", finished_reason="error") == 2


def test_the_answers_beside_one_that_failed_are_given_up() -> None:
    engine = ScriptedEngine(fails_with="no", round_seconds=SLOW)
    with serving(engine) as server, server.client() as client:
        assert "error" in streamed(client, max_tokens=50, n=3)[-1]
        until(lambda: engine.load == 0)


def test_a_full_queue_says_so_and_takes_nothing_half() -> None:
    engine = ScriptedEngine(max_queue=2, round_seconds=SLOW)
    with serving(engine) as server, server.client() as client:
        engine.running.clear()
        reply = client.post("/v1/completions", json={"prompt": [9], "n": 3, "stream": True})
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        expected = {"message": FULL, "type": "ServiceUnavailable", "param": None, "code": 503}
        assert reply.json() == {"error": expected}
        assert len(engine.aborts) == 2
        engine.running.set()
        until(lambda: engine.load == 0)
        key = {"api_key": "-", "max_retries": 0}
        with openai.OpenAI(base_url=server.url + "/v1", **key) as asked:
            engine.max_queue = 0
            with pytest.raises(openai.InternalServerError, match="currently busy"):
                asked.completions.create(model="tiny", prompt="x")


def test_draining_finishes_the_old_and_refuses_the_new() -> None:
    with serving(ScriptedEngine(round_seconds=SLOW)) as server, server.client() as client:
        with client.stream(
            "POST", "/v1/completions", json={"prompt": [9], "max_tokens": 60, "stream": True}
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.app.state.serving.draining = True
            with server.client() as other:
                assert other.get("/health").status_code == 503
                refused = other.post("/v1/completions", json={"prompt": [9]})
                assert refused.status_code == 503 and "retry-after" in refused.headers
            assert [line for line in lines if line][-1] == "data: [DONE]"
    assert not server.engine.aborts


def test_what_a_drain_cannot_wait_for_ends_with_an_error() -> None:
    with serving(ScriptedEngine(round_seconds=SLOW)) as server, server.client() as client:
        with client.stream(
            "POST", "/v1/completions", json={"prompt": [9], "max_tokens": 500, "stream": True}
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.app.state.serving.abort_all("The server is shutting down.")
            *_, error, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(error[6:])["error"]["message"] == "The server is shutting down."
        until(lambda: server.engine.load == 0)


def test_an_engine_that_is_not_ready_is_not_healthy() -> None:
    with serving(ScriptedEngine(ready=False)) as server, server.client() as client:
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": [9]}).status_code == 503


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    settings = HttpSettings(request_timeout_seconds=0.3)
    with serving(ScriptedEngine(round_seconds=0.1), settings) as server:
        with server.client() as client:
            begin = time.monotonic()
            reply = client.post("/v1/completions", json={"prompt": [9], "max_tokens": 400})
            assert reply.status_code == 504 and time.monotonic() - begin < 2
            assert streamed(client, max_tokens=400)[-1]["error"]["code"] == 504
            until(lambda: server.engine.load == 0)


def test_sixty_clients_at_once_are_all_answered() -> None:
    with serving(ScriptedEngine(max_queue=60)) as server:
        limits = httpx.Limits(max_connections=60)
        with server.client(limits=limits) as client, ThreadPoolExecutor(60) as pool:
            body = {"prompt": "def f(a):" * 20, "max_tokens": 20, "stream": True}
            asked = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(60)]
            assert all(b"[DONE]" in each.result().content for each in asked)


PROGRAM = """
import sys
from tests.serving import ScriptedEngine, served
from dspark_jax.serve.http.app import make_app
from dspark_jax.serve.http.listen import bind, listen
app = make_app(ScriptedEngine(round_seconds=0.05), served())
listen(app, bind("127.0.0.1", int(sys.argv[1])), 20.0)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as made:
        return made.getsockname()[1]


@contextmanager
def listening() -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """The server as a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port)], cwd=ROOT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            until(lambda: healthy(client), 60)
            yield process, client
    finally:
        process.kill()
        process.wait()


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_drains_and_a_second_one_stops(signals: int) -> None:
    with listening() as (process, client):
        body = {"prompt": [9], "max_tokens": 100, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            received = [line for line in lines if line]
        assert received[-1] == "data: [DONE]"
        last = json.loads(received[-2][6:])
        if signals == 1:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert "shutting down" in last["error"]["message"]
        assert process.wait(10) == 0
