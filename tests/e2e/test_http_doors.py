"""Who gets in: keys, origins, and bodies that never end."""

import socket
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from dspark_jax.serve.http.settings import HttpSettings
from tests.serving import Server, serving

KEYS = ("first-key", "second-key")
GUARDED = ("/v1/models", "/metrics", "/load", "/version", "/ping", "/openapi.json", "/v1/nope")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = HttpSettings(
        api_keys=KEYS, allowed_origins=("https://friend.example",), body_timeout_seconds=0.5
    )
    with serving(settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", "Basic first-key", "first-key"])
def test_without_a_key_there_is_nothing(client: httpx.Client, path: str, given: str | None) -> None:
    reply = client.get(path, headers={"authorization": given} if given else {})
    assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")


def test_a_body_is_not_read_without_a_key(server: Server, client: httpx.Client) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert client.post(path, json={"prompt": [9]}).status_code == 401
    assert not server.engine.works


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(server: Server, key: str) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=key) as client:
        assert client.completions.create(model="tiny", prompt="x").choices
    with openai.OpenAI(base_url=server.url + "/v1", api_key=key + "x") as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_health_and_the_page_need_no_key(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200
    reply = client.get("/")
    assert reply.status_code == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]


def test_metrics_can_be_opened() -> None:
    with serving(settings=HttpSettings(api_keys=KEYS, open_metrics=True)) as server:
        with server.client() as client:
            assert client.get("/metrics").status_code == 200
            assert client.get("/load").status_code == 401


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    return client.options("/v1/completions", headers=asked)


def test_only_listed_origins_may_ask(client: httpx.Client) -> None:
    friend = preflight(client, "https://friend.example")
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    stranger = preflight(client, "https://stranger.example")
    assert stranger.status_code == 400 and "access-control-allow-origin" not in stranger.headers


def test_without_a_list_no_origin_may_ask() -> None:
    with serving() as server, server.client() as client:
        found = preflight(client, "https://friend.example")
        assert found.status_code == 405 and "access-control-allow-origin" not in found.headers
        body = {"prompt": [9]}
        found = client.post("/v1/completions", json=body, headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in found.headers


def test_a_body_that_does_not_come_is_not_waited_for(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as made:
        head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += "Authorization: Bearer first-key\r\nContent-Length: 100\r\n\r\n{"
        made.sendall(head.encode())
        made.settimeout(5)
        begin = time.monotonic()
        received = made.recv(4096)
        assert received.startswith(b"HTTP/1.1 408") and time.monotonic() - begin < 3


def test_a_header_too_large_harms_nobody(client: httpx.Client) -> None:
    for size in (70_000, 5_000_000):
        try:
            reply = client.get("/health", headers={"x-bomb": "a" * size})
        except httpx.TransportError:
            continue
        assert reply.status_code in (200, 400, 431)
    assert client.get("/health").status_code == 200
