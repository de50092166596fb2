"""OpenAI's own client against every endpoint, streaming and not; its types validate the shapes."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from dspark_jax.serve.http.settings import HttpSettings
from tests.serving import DRAFT, ScriptedEngine, Server, counting, saying, serving, tokenizer

MESSAGES: Any = [{"role": "user", "content": "def add(a, b):"}]
TEXT = "    return a + b  # ünïcode 🙂, then more of it\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = HttpSettings(per_request_spec_decode_metrics="detailed")
    with serving(ScriptedEngine(saying(TEXT)), settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="-", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as made:
        yield made


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream; it ends in [DONE]."""
    with http.stream("POST", path, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "dspark-jax"
    assert client.models.retrieve("tiny").to_dict()["max_model_len"] == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="def f", max_tokens=100)
    (choice,) = found.choices
    assert choice.text == TEXT and choice.finish_reason == "stop"
    assert found.usage and found.usage.prompt_tokens == len(tokenizer()("def f")["input_ids"])
    # The end token is written too, though not shown.
    assert found.usage.completion_tokens == len(tokenizer()(TEXT)["input_ids"]) + 1


def test_a_completion_streams_the_same_text(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="def f", max_tokens=100, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=MESSAGES)
    (choice,) = found.choices
    assert choice.message.content == TEXT and choice.message.role == "assistant"
    assert choice.finish_reason == "stop"


def test_a_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options=options
    )
    *chunks, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not usage.choices and usage.usage and usage.usage.completion_tokens > 5


def test_the_conversation_goes_through_the_checkpoints_template(
    client: openai.OpenAI, server: Server
) -> None:
    client.chat.completions.create(model="tiny", messages=MESSAGES)
    text = "<|user|>def add(a, b):<|assistant|>"
    assert server.engine.works[-1].prompt == tuple(tokenizer()(text)["input_ids"])


def test_every_delta_is_an_event(http: httpx.Client, server: Server) -> None:
    body = {"prompt": [9], "max_tokens": 200, "return_token_ids": True}
    found = events(http, "/v1/completions", body)
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in found]
    assert counts[:3] == [1, 3, 3] and set(counts[1:-1]) == {3}
    tokens = [t for chunk in found for t in chunk["choices"][0]["token_ids"]]
    assert tokens == [*tokenizer()(TEXT)["input_ids"], 0]
    assert found[0]["choices"][0]["prompt_token_ids"] == [9]


def test_shapes_are_openais(http: httpx.Client) -> None:
    chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 7}
    ChatCompletion.model_validate(http.post("/v1/chat/completions", json=chat).json(), strict=True)
    for chunk in events(http, "/v1/chat/completions", chat):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    plain = {"prompt": "x", "logprobs": 2, "max_tokens": 7}
    Completion.model_validate(http.post("/v1/completions", json=plain).json(), strict=True)


def test_usage_in_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": [9], "max_tokens": 8, "stream_options": options}
    found = events(http, "/v1/completions", body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-2:] == [8, 8]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] == 9


@pytest.mark.parametrize("stream", [False, True])
def test_speculation_is_told_in_vllms_shape(http: httpx.Client, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": [9], "max_tokens": 10, "stream_options": None}
    if stream:
        found = events(http, "/v1/completions", body)[-1]
    else:
        found = http.post("/v1/completions", json=body).json()
    assert found["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.5,
        "acceptance_histogram": [0, 0, 3, 0, 0],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 3 * DRAFT,
        "num_spec_tokens": DRAFT,
        "per_step_accepted": [2, 2, 2],
        "per_step_drafted": [4, 4, 4],
    }


def test_plain_decoding_is_a_field(http: httpx.Client, server: Server) -> None:
    body = {"prompt": [9], "max_tokens": 5, "speculate": False}
    found = http.post("/v1/completions", json=body).json()
    assert found["metrics"]["speculative_decoding"] is None
    assert not server.engine.works[-1].speculate


def test_details_say_which_tokens_were_drafted(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 7, "dspark_details": True}
    found = [e["dspark"] for e in events(http, "/v1/chat/completions", body) if "dspark" in e]
    assert [(d["accepted"], d["verified"]) for d in found] == [(None, None), (2, 4), (2, 4)]
    tokens = [pair for d in found for pair in d["tokens"]]
    assert [token for token, _ in tokens] == tokenizer()(TEXT)["input_ids"][:7]
    assert TEXT.startswith("".join(text for _, text in tokens))


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI, server: Server) -> None:
    before = len(server.engine.works)
    found = client.completions.create(model="tiny", prompt=["a", "b c"], n=2, seed=7, max_tokens=4)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    works = server.engine.works[before:]
    assert [work.sampling.seed for work in works] == [7, 8, 7, 8]
    prompts = [tuple(tokenizer()(text)["input_ids"]) for text in ("a", "b c")]
    assert [work.prompt for work in works] == [p for p in prompts for _ in range(2)]
    # A prompt counts once, however many answers it gets.
    assert found.usage and found.usage.prompt_tokens == sum(map(len, prompts))
    assert found.usage.completion_tokens == 16


def test_several_answers_stream_side_by_side(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "n": 3, "max_tokens": 7}
    found = events(http, "/v1/chat/completions", body)
    texts: dict[int, str] = {}
    for chunk in found:
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"]["content"]
    whole = tokenizer().decode(tokenizer()(TEXT)["input_ids"][:7])
    assert texts == {0: whole, 1: whole, 2: whole}
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in found) == 3
    assert [("metrics" in chunk) for chunk in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("prompt", ["def f", [9, 10, 11]])
def test_an_echo_begins_with_the_prompt(http: httpx.Client, prompt: Any) -> None:
    body = {"prompt": prompt, "max_tokens": 100, "echo": True}
    begin = prompt if isinstance(prompt, str) else tokenizer().decode(prompt)
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == begin + TEXT
    chunks = events(http, "/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == begin + TEXT


def test_a_turn_can_be_gone_on_with(http: httpx.Client, server: Server) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "    ret"}]
    body = {"messages": turns, "add_generation_prompt": False, "continue_final_message": True}
    found = http.post("/v1/chat/completions", json=body | {"echo": True}).json()
    assert found["choices"][0]["message"]["content"] == "    ret" + TEXT
    text = "<|user|>def add(a, b):<|assistant|>    ret"
    assert server.engine.works[-1].prompt == tuple(tokenizer()(text)["input_ids"])


def test_logprobs_of_both_apis(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    first = chat.choices[0].logprobs.content[0]
    assert first.token == tokenizer().decode([tokenizer()(TEXT)["input_ids"][0]])
    assert first.logprob == -0.1 and len(first.top_logprobs) == 2
    found = client.completions.create(model="tiny", prompt="x", max_tokens=4, logprobs=0)
    told = found.choices[0].logprobs
    assert told and told.tokens and told.token_logprobs and told.text_offset and told.top_logprobs
    assert "".join(told.tokens) == found.choices[0].text
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(4)]
    assert [list(top) for top in told.top_logprobs] == [[token] for token in told.tokens]


def test_cached_tokens_and_salts(http: httpx.Client) -> None:
    def cached(**more: Any) -> Any:
        body = {"prompt": list(range(20, 40)), "max_tokens": 2} | more
        return http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]

    assert cached() is None
    assert cached() == {"cached_tokens": 19}
    assert cached(cache_salt="mine") is None


def test_tokens_there_and_back(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"prompt": "añb 🙂", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer()("añb 🙂")["input_ids"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    back = http.post("/detokenize", json={"model": "tiny", "tokens": found["tokens"]}).json()
    assert back == {"prompt": "añb 🙂"}
    chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["tokens"] == tokenizer()("<|user|>def add(a, b):<|assistant|>")["input_ids"]
    assert http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0


def test_forms_become_grammars(http: httpx.Client, server: Server) -> None:
    def grammar(**more: Any) -> Any:
        assert http.post("/v1/completions", json={"prompt": [9], **more}).status_code == 200
        found = server.engine.works[-1].grammar
        return found and (found.kind, found.text)

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert grammar() is None
    assert grammar(response_format={"type": "text"}) is None
    assert grammar(response_format={"type": "json_object"}) == ("json_schema", '{"type": "object"}')
    assert grammar(response_format=asked) == ("json_schema", json.dumps(schema))
    assert grammar(guided_json=json.dumps(schema)) == ("json_schema", json.dumps(schema))
    assert grammar(guided_regex="[ab]+") == ("regex", "[ab]+")
    assert grammar(structured_outputs={"regex": "[ab]+"}) == ("regex", "[ab]+")
    assert grammar(structured_outputs={"json": schema}) == ("json_schema", json.dumps(schema))
    assert grammar(guided_grammar='start: "a"') == ("lark", 'start: "a"')
    assert grammar(guided_choice=["ja", 'n"ö']) == ("lark", 'start: "ja" | "n\\"ö"')


def test_every_parameter_reaches_the_engine(http: httpx.Client, server: Server) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -3}
    sampling |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.5}
    body = sampling | {"prompt": [9], "max_tokens": 9, "min_tokens": 2, "ignore_eos": True}
    body |= {"stop_token_ids": [44], "logit_bias": {"7": 200, "8": -3.5}, "logprobs": 4}
    assert http.post("/v1/completions", json=body).status_code == 200
    work = server.engine.works[-1]
    assert {name: getattr(work.sampling, name) for name in sampling} == sampling
    assert work.sampling.logit_bias == ((7, 100.0), (8, -3.5))
    assert (work.max_tokens, work.min_tokens, work.ignore_eos, work.logprobs) == (9, 2, True, 4)
    assert work.stop_token_ids == {44}


def test_lengths_left_out_are_openais(http: httpx.Client, server: Server) -> None:
    http.post("/v1/completions", json={"prompt": [9] * 10})
    assert server.engine.works[-1].max_tokens == 16
    http.post("/v1/chat/completions", json={"messages": MESSAGES})
    work = server.engine.works[-1]
    assert work.max_tokens == 512 - len(work.prompt)


def test_the_small_routes(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200 and http.get("/health").text == ""
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/load").json() == {"server_load": 0}
    assert "/v1/completions" in http.get("/openapi.json").json()["paths"]


def test_a_request_keeps_its_name(http: httpx.Client, server: Server) -> None:
    name = {"x-request-id": "mine-1"}
    reply = http.post("/v1/completions", json={"prompt": [9]}, headers=name)
    assert reply.headers["x-request-id"] == "mine-1" and reply.json()["id"] == "cmpl-mine-1"
    assert server.engine.works[-1].request_id.startswith("cmpl-mine-1-")
    # Twice the same name at once is two requests to the engine.
    http.post("/v1/completions", json={"prompt": [9]}, headers=name)
    assert len({work.request_id for work in server.engine.works}) == len(server.engine.works)


def test_metrics_add_up() -> None:
    with serving(ScriptedEngine(counting)) as server, server.client() as http:
        body = {"prompt": [9, 10], "max_tokens": 10, "n": 2}
        http.post("/v1/completions", json=body)
        text = http.get("/metrics").text
        assert 'vllm:spec_decode_num_drafts_total{engine="0",model_name="tiny"} 6.0' in text
        metric = server.metric
        assert metric("vllm:spec_decode_num_draft_tokens_total") == 24
        assert metric("vllm:spec_decode_num_accepted_tokens_total") == 12
        per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        assert [metric(per_position, position=str(i)) for i in range(4)] == [6, 6, 0, 0]
        assert metric("vllm:prompt_tokens_total") == 4
        assert metric("vllm:prompt_tokens_cached_total") == 1
        assert metric("vllm:generation_tokens_total") == 20
        assert metric("vllm:request_success_total", finished_reason="length") == 2
        assert metric("vllm:time_to_first_token_seconds_count") == 2
        assert metric("vllm:inter_token_latency_seconds_count") == 6
        assert metric("vllm:e2e_request_latency_seconds_count") == 2
        assert metric("vllm:request_generation_tokens_sum") == 20
