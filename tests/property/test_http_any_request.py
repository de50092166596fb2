"""Whatever a request holds, it is answered or refused in the one way, and the engine lives."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_jax.serve.http.protocol import ChatRequest, CompletionRequest
from tests.serving import LENGTH, VOCABULARY, ScriptedEngine, Server, serving

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "b c", "none", "json", "tiny", "\ud800", "🙂", "{", "[a-"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "json", "5"]), inner)
    ),
    max_leaves=6,
)
GOOD = {
    "/v1/completions": {"prompt": [9], "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
}
FIELDS = {
    "/v1/completions": sorted(CompletionRequest.model_fields),
    "/v1/chat/completions": sorted(ChatRequest.model_fields),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ScriptedEngine(max_queue=200)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def whole(reply: httpx.Response) -> None:
    """An answer, a stream that ends well, or the one error."""
    if reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n") and '{"error"' not in reply.text
    elif reply.status_code == 200:
        assert reply.json()["choices"]
    else:
        assert reply.status_code in (400, 404, 413), reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert len(reply.content) < 5000


@pytest.mark.parametrize("path", sorted(GOOD))
@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_fields_are_answered_or_refused(
    client: httpx.Client, server: Server, path: str, data: st.DataObject
) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), ANYTHING, max_size=3))
    body = json.dumps(GOOD[path] | changes)
    whole(client.post(path, content=body, headers={"content-type": "application/json"}))
    for work in server.engine.works:
        assert 0 < work.max_tokens <= LENGTH - len(work.prompt)
        assert all(0 <= token < VOCABULARY for token in work.prompt)
        assert 0 <= work.min_tokens <= work.max_tokens
    server.engine.works.clear()


@given(data=st.binary(max_size=60))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_refused(client: httpx.Client, data: bytes) -> None:
    kind = {"content-type": "application/json"}
    whole(client.post("/v1/completions", content=data, headers=kind))
    whole(client.post("/v1/completions", content=b'{"prompt":' + data, headers=kind))
