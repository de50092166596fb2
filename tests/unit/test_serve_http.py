"""Parts of the HTTP side by themselves: the mailbox, grammars, depth, names of metrics."""

import asyncio
import itertools
import json
import re
import string
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from dspark_jax import serve
from dspark_jax.serve.http.errors import RequestError, to_json
from dspark_jax.serve.http.grammar import MAX_LARK_CHARACTERS, Grammars
from dspark_jax.serve.http.limits import too_deep
from dspark_jax.serve.http.mailbox import Arrival, Mailbox
from dspark_jax.serve.http.protocol import CompletionRequest
from dspark_jax.serve.http.settings import HttpSettings, read_keys
from dspark_jax.serve.http.speculation import speculation
from dspark_jax.serve.messages import Delta
from dspark_jax.serve.metrics import Metrics
from tests.serving import served


async def drained(mailbox: Mailbox, answers: int) -> list[Arrival]:
    """Everything, until so many answers have ended."""
    found: list[Arrival] = []
    while sum(arrival.finish is not None for arrival in found) < answers:
        found.append(await mailbox.take())
    return found


def test_a_mailbox_loses_nothing_and_keeps_each_answers_order() -> None:
    async def run() -> list[Arrival]:
        mailbox = Mailbox(8)

        def write(index: int) -> None:
            sink = mailbox.sink(index)
            for i in range(500):
                finish = "length" if i == 499 else None
                sink(Delta((i,), verified=4, accepted=i % 4, finish=finish))

        threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        found = await drained(mailbox, 3)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(run())
    for index in range(3):
        mine = [arrival for arrival in found if arrival.index == index]
        assert [t for arrival in mine for t in arrival.tokens] == list(range(500))
        assert [r for a in mine for r in a.rounds] == [(4, i % 4) for i in range(500)]


def test_a_mailbox_that_nobody_empties_is_bounded() -> None:
    async def run() -> list[Arrival]:
        mailbox = Mailbox(4)
        for i in range(100):
            mailbox.sink(i % 2)(Delta((i,), cached_tokens=i if i < 2 else None))
        for index in range(2):
            mailbox.sink(index)(Delta(finish="stop", stop_reason=3))
        return await drained(mailbox, 2)

    found = asyncio.run(run())
    assert len(found) == 4
    assert found[0].cached_tokens == 0 and found[1].cached_tokens == 1
    assert {arrival.stop_reason for arrival in found[2:]} == {3}


def test_an_engine_may_outlive_the_loop() -> None:
    async def run() -> Mailbox:
        return Mailbox(4)

    asyncio.run(run()).sink(0)(Delta((1,)))


def grammar(settings: HttpSettings, **fields: Any) -> Any:
    async def run() -> Any:
        grammars = Grammars(served(), settings)
        try:
            return await grammars.of(CompletionRequest.model_validate(fields))
        finally:
            grammars.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(?=x)"},
        {"guided_json": {"$ref": "#/nowhere"}},
        {"guided_json": {"type": "string", "pattern": "("}},
        {"guided_grammar": "start: start"},
        {"guided_choice": ["a", ""]},
        {"guided_choice": ["a"] * 1001},
        {"structured_outputs": {"choice": []}},
    ],
)
def test_what_does_not_compile_is_a_grammar_error(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="^Grammar error: "):
        grammar(HttpSettings(), **fields)


def test_a_grammar_that_takes_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="still being compiled|too long to compile"):
        grammar(HttpSettings(grammar_timeout_seconds=0.0), guided_regex="a")


def chain(count: int) -> str:
    """Rules of which each leads to the next."""
    names = ["".join(x) for x in itertools.product(string.ascii_lowercase, repeat=3)][:count]
    rules = [f"{name}:{later}" for name, later in itertools.pairwise(names)]
    return "\n".join([f"start: {names[0]}", *rules, f'{names[-1]}:"x"'])


def test_a_grammar_cannot_end_the_process() -> None:
    """As deep as one may be compiles; a deeper one is refused before it is looked at."""
    deep = chain((MAX_LARK_CHARACTERS - 20) // 8)
    assert len(deep) <= MAX_LARK_CHARACTERS and grammar(HttpSettings(), guided_grammar=deep)
    with pytest.raises(RequestError, match="at most 8192 characters"):
        grammar(HttpSettings(), guided_grammar=chain(8000))


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b"[" * 65 + b"]" * 65, True),
        (b"[" * 64 + b"]" * 64, False),
        (b'{"a":' * 65 + b"1" + b"}" * 65, True),
        (b"[" + b"[]," * 1000 + b"[]]", False),
        (b'"' + b"[" * 1000 + b'"', False),
        (b'"\\"' + b"[" * 1000 + b'"', False),
        (b'"\\\\"' + b"[" * 1000, True),
        (b'"' + b"[" * 1000, False),
        (b"[" + b"[]," * 200_000 + b"[]]", True),
    ],
)
def test_depth_is_counted_outside_strings(body: bytes, deep: bool) -> None:
    assert too_deep(body, 64) is deep


def test_no_text_breaks_a_reply() -> None:
    assert json.loads(to_json({"a": "\ud800ü"})) == {"a": "?ü"}


def test_speculation_of_nothing_is_none() -> None:
    assert speculation([], 4, True) is None
    told = speculation([(0, 0), (4, 4)], 4, False)
    assert told and told["mean_acceptance_length"] == 3 and "per_step_accepted" not in told


def test_metrics_have_vllms_names() -> None:
    metrics = Metrics("tiny", 3)
    metrics.gauges(2, 1, 0.5)
    metrics.cache_config({"block_size": 16, "num_gpu_blocks": 9})
    metrics.round(5, 10, 16, {"step": 0.01, "draft": 0.002})
    metrics.prefilled(64)
    metrics.admitted(100, 32)
    metrics.timed(0.1, 0.2, 0.3)
    metrics.preempted()
    metrics.compiled(3)
    metrics.corrupted()
    metrics.rejected("max_num_queued_reqs")
    metrics.calibrated([0.5, 0.25], [1, 0])
    text = generate_latest(metrics.registry).decode()
    labels = 'engine="0",model_name="tiny"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 2.0",
        f"vllm:num_requests_waiting{{{labels}}} 1.0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.5",
        f'vllm:cache_config_info{{block_size="16",{labels},num_gpu_blocks="9"}} 1.0',
        f"vllm:prefix_cache_queries_total{{{labels}}} 100.0",
        f"vllm:prefix_cache_hits_total{{{labels}}} 32.0",
        f"vllm:num_preemptions_total{{{labels}}} 1.0",
        f"vllm:corrupted_requests_total{{{labels}}} 1.0",
        f'vllm:admission_rejections_total{{{labels},reason="max_num_queued_reqs"}} 1.0',
        f"vllm:iteration_tokens_total_count{{{labels}}} 2.0",
        f"vllm:request_inference_time_seconds_sum{{{labels}}} 0.5",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="2"}} 0.0',
        f"dspark:verify_tokens_total{{{labels}}} 10.0",
        f'dspark:verify_bucket_tokens_total{{bucket="16",{labels}}} 1.0',
        f"dspark:padding_tokens_total{{{labels}}} 6.0",
        f"dspark:compilations_total{{{labels}}} 3.0",
        f'dspark:step_seconds_count{{{labels},phase="draft"}} 1.0',
        f'dspark:confidence_calibration_sum_total{{{labels},position="1"}} 0.25',
        f'dspark:confidence_calibration_hit_total{{{labels},position="0"}} 1.0',
    ):
        assert line in text.splitlines()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    metrics = Metrics("tiny", 2)
    names = {sample for family in metrics.registry.collect() for sample in suffixed(family.name)}
    dashboard = json.loads((Path(serve.__file__).parent / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|dspark):\w+", target["expr"])
    }
    assert len(dashboard["panels"]) > 10 and asked and not asked - names


def suffixed(name: str) -> set[str]:
    """What a family's samples may be called."""
    return {name + end for end in ("", "_total", "_bucket", "_sum", "_count")}


def test_keys_come_from_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    monkeypatch.delenv("DSPARK_API_KEY", raising=False)
    assert read_keys(None) == ()
    file.write_text("one\n\n two \n")
    monkeypatch.setenv("DSPARK_API_KEY", "zero")
    assert read_keys(file) == ("zero", "one", "two")
    for text in ("", "\n", "a b", "schlüssel"):
        file.write_text(text)
        with pytest.raises(ValueError, match="key"):
            read_keys(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_keys(tmp_path / "none")
