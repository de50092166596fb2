"""The real command, the embedded models and real clients: what a user gets from a served pair."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dspark_jax import calibration_file
from dspark_jax.checkpoints.folder import embedded

FLAGS = ("--max-num-seqs", "2", "--max-model-len", "256")
ASKED = 'def read_text(path):\n    """Read a file."""'
OTHERS = tuple(f'def {name}(self):\n    """Return it."""' for name in ("size", "name", "close"))


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "dspark_jax.serve", *flags]


def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
    """(process, address) of a server that is ready."""
    given = command("--port", "0", *FLAGS, *flags)
    process = subprocess.Popen(given, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready: "):
            return process, line.split()[1]
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Drafts are always verified: on a busy machine adaptive verification may find they never pay.

    Tests with servers or terminals of their own run by default, adaptively.
    """
    fixed = ("--speculative-config", '{"enable_adaptive_verification": false}')
    process, where = start("--per-request-spec-decode-metrics", "detailed", *fixed)
    yield where
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, text: str = ASKED, **given: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 60} | given
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny-glm", messages=messages, **given)


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def test_it_is_ready_once_everything_is_compiled(address: str, client: openai.OpenAI):
    assert httpx.get(f"{address}/health").status_code == 200
    compiled = metric(address, "dspark:compilations_total")
    assert compiled > 0
    for i in range(3):
        chat(client, temperature=i / 2, logprobs=True, top_logprobs=i, presence_penalty=i / 4)
    assert metric(address, "dspark:compilations_total") == compiled


def test_drafts_change_no_greedy_answer(address: str, client: openai.OpenAI):
    drafted = chat(client)
    plain = chat(client, extra_body={"speculate": False})
    assert drafted.choices[0].message.content == plain.choices[0].message.content != ""
    told = drafted.model_extra["metrics"]["speculative_decoding"]
    assert sum(told["per_step_accepted"]) == told["num_accepted_draft_tokens"] > 0
    accepted = metric(address, "vllm:spec_decode_num_accepted_tokens_total")
    assert accepted >= told["num_accepted_draft_tokens"]


def test_an_answer_is_the_same_among_others_and_found_in_the_cache(client: openai.OpenAI):
    with ThreadPoolExecutor(6) as pool:
        texts = [ASKED, *OTHERS, ASKED, ASKED]
        made = list(pool.map(lambda text: chat(client, text), texts))
    first, again = made[0], chat(client)
    answers = {made[i].choices[0].message.content for i in (0, 4, 5)}
    assert answers == {again.choices[0].message.content}
    assert again.usage.prompt_tokens_details.cached_tokens == 16
    assert first.usage.prompt_tokens == again.usage.prompt_tokens


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI):
    whole = chat(client)
    pieces = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage
    assert len(pieces) < whole.usage.completion_tokens


def test_a_seed_repeats_an_answer(client: openai.OpenAI):
    warm = {"temperature": 1.0, "seed": 5, "extra_body": {"speculate": False}}
    assert chat(client, **warm).choices == chat(client, **warm).choices


def test_structured_output_is_what_was_asked_for(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "size": {"type": "integer", "maximum": 9}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # Seeded, as a model of Python may also go on with white space, which a schema allows.
    made = chat(client, temperature=1, seed=1, response_format=named, max_tokens=120)
    found = json.loads(made.choices[0].message.content)
    assert made.choices[0].finish_reason == "stop"
    assert found["name"] in ("a", "b") and found["size"] <= 9


def test_a_client_that_leaves_frees_its_pages(address: str):
    body = {"prompt": [5, 6, 7], "max_tokens": 250, "stream": True, "ignore_eos": True}
    body |= {"speculate": False}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=20) as reply:
        next(reply.iter_lines())
    deadline = time.monotonic() + 5
    while metric(address, "vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert metric(address, "vllm:kv_cache_usage_perc") == 0


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium, where it is installed with its driver."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def test_the_page_shows_who_said_each_token(address: str, client: openai.OpenAI, browser: Any):
    def find(name: str) -> Any:
        return browser.find_element("id", name)

    def ask() -> list[str]:
        """The answer's spans, once the page has written its note below them."""
        browser.execute_script("arguments[0].value = arguments[1]", find("text"), ASKED)
        find("send").click()
        deadline = time.monotonic() + 30
        while not (found := browser.find_elements("css selector", ".assistant .note")):
            assert time.monotonic() < deadline and not found
            time.sleep(0.1)
        spans = browser.find_elements("css selector", ".assistant span")
        return [f"{s.get_attribute('className')}:{s.get_attribute('textContent')}" for s in spans]

    browser.get(address)
    told = ask()
    text = chat(client, max_tokens=256).choices[0].message.content
    assert "".join(t.split(":", 1)[1] for t in told) == text
    drafted = sum(t.startswith("drafted:") for t in told)
    assert drafted > 0 and any(t.startswith("bonus:") for t in told)
    assert float(find("length").text) > 1 and find("model").text == "tiny-glm"
    find("clear").click()
    find("speculate").click()
    assert not any(t.startswith(("drafted:", "bonus:")) for t in ask())
    assert not browser.get_log("browser")


def test_sigterm_lets_an_answer_end():
    process, where = start()
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{where}/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert process.wait(40) == 0


def test_a_prompt_is_answered_in_the_terminal():
    given = command("--prompt", ASKED, "--max-num-seqs", "1", "--max-model-len", "256")
    done = subprocess.run(given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "path" in done.stdout and "tokens a round" in done.stderr


@pytest.mark.slow
def test_ways_to_draft_and_verify_change_no_greedy_answer_and_are_timed_once(tmp_path: Path):
    """Rounds are timed for each way on its own: their programs differ."""
    answers, notes = [], []
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    stopping = {"verification_schedule": "algorithm-1"}
    for way in ({}, stopping, stopping, {"dspark_draft_topk": 16}, {"num_speculative_tokens": 4}):
        chosen = json.dumps(way)
        given = command("--prompt", ASKED, "--max-model-len", "256", "--speculative-config", chosen)
        done = subprocess.run(given, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
        notes.append(next(x for x in done.stderr.splitlines() if x.startswith("costs of rounds")))
    assert len(set(answers)) == 1 and answers[0].strip()
    assert ["those kept" in note for note in notes] == [False, False, True, False, False]


@pytest.mark.slow
def test_a_draft_is_calibrated_on_prompts_and_served_so(tmp_path: Path):
    draft, data = tmp_path / "draft", tmp_path / "prompts.jsonl"
    shutil.copytree(embedded("tiny-glm-dspark"), draft)
    (draft / calibration_file.NAME).unlink()
    turns = ({"messages": [{"role": "user", "content": text}]} for text in (ASKED, *OTHERS))
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    flags = ("--checkpoint", str(draft), *FLAGS)
    calibrating = ("--calibrate", "--data", str(data), "--max-tokens", "40")
    done = subprocess.run(command(*flags, *calibrating), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {draft / calibration_file.NAME}" in done.stdout and "mean" in done.stdout
    assert calibration_file.read(draft, 8) is not None
    (draft / calibration_file.NAME).write_text("{}")
    done = subprocess.run(command(*flags), capture_output=True, text=True)
    assert done.returncode == 2 and "does not give 8 positive temperatures" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--target", "/nowhere"), "neither a folder nor a hub id"),
        (("--checkpoint", "/nowhere"), "neither a folder nor a hub id"),
        (("--speculative-config", "{"), "is no JSON"),
        (("--speculative-config", '{"method": "eagle3"}'), "'eagle3' is not served"),
        (("--speculative-config", '{"tokens": 3}'), "has tokens, which means nothing here"),
        (("--speculative-config", '{"num_speculative_tokens": 99}'), "more than the 8"),
        (("--speculative-config", '{"dspark_draft_topk": 0}'), "dspark_draft_topk 0 is no number"),
        (("--speculative-config", '{"dspark_draft_topk": 9999}'), "9999 must be from 1 to the"),
        (
            ("--speculative-config", '{"dspark_draft_topk": 4, "num_speculative_tokens": 0}'),
            "never drafts; leave one of them out",
        ),
        (("--max-model-len", "100000"), "more than the 4096 positions"),
        (("--num-gpu-blocks-override", "3"), "do not hold one sequence"),
        (("--max-num-seqs", "0"), "must be 1 or more"),
        (("--tensor-parallel-size", "16"), "needs 16 devices but there are 8"),
        (("--port", "70000"), "must be from 0 to 65535"),
        (("--speculative-config", '{"verification_schedule": "late"}'), "neither asynchronous nor"),
        (("--prompt", "x", "--calibrate"), "are two things to do"),
        (("--data", "x"), "is for --calibrate only"),
        (("--calibrate",), "no run's report.json with prompts beside it"),
        (("--calibrate", "--data", "/nowhere"), "data /nowhere cannot be read"),
        (("--calibrate", "--data", "pyproject.toml"), "pyproject.toml line 1 asks nothing"),
    ],
)
def test_flags_that_cannot_work_are_one_sentence(flags: tuple[str, ...], said: str):
    done = subprocess.run(command(*flags), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert said in line and "Traceback" not in done.stderr
