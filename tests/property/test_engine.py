"""The engine answers as plain decoding does, whoever else is served, and nothing it lends is lost.

The models are the small random ones of test_greedy_equals_plain; the engine is the real one.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.loop import prepare_weights
from dspark_jax.serve.batch import Batch
from dspark_jax.serve.engine import QueueLimits, ThreadedEngine
from dspark_jax.serve.grammar import Grammars
from dspark_jax.serve.messages import BusyError, Delta, SamplingParams, Work
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.programs import Programs, Shape, Sizes
from dspark_jax.serve.rating import Head
from dspark_jax.targets.families import make_target
from tests.property.test_greedy_equals_plain import DRAFT, GLM, PROMPTS, V, target_params

SLOTS, PAGE, LONGEST, LIMIT = 2, 4, 16, 40
ROOMY = 1 + SLOTS * LONGEST
GREEDY = SamplingParams(temperature=0.0)


@cache
def programs() -> Programs:
    """Compiled once for all tests; a test that changes the weights puts them back."""
    target, draft = make_target(GLM), dspark_draft(DRAFT)
    params = target_params()
    weights = prepare_weights(
        target, draft, params, init_draft_params(DRAFT, 2), target.frozen(params)
    )
    sizes = Sizes(SLOTS, PAGE, ROOMY, LONGEST, DRAFT.draft_length, V, (8,))
    made = Programs(target, draft, weights, sizes, jnp.float32)
    made.compile(lambda done, total: None)
    return made


class Server:
    """A started engine and what it said, request by request."""

    def __init__(self, pages: int = ROOMY, caching: bool = True, **limits: int):
        programs().reset()
        self.pages = Pages(pages, PAGE, caching)
        self.metrics = Metrics("test", DRAFT.draft_length)
        self.batch = Batch(
            programs(),
            self.pages,
            Policy("fixed", DRAFT.draft_length),
            frozenset(),
            self.metrics,
            {},
            Head(np.ones(DRAFT.draft_length)),
        )
        self.engine = ThreadedEngine(
            self.batch, Grammars(None, V, (0,)), QueueLimits(**limits), self.metrics
        )
        self.heard: dict[str, list[Delta]] = {}
        self.over: dict[str, threading.Event] = {}

    def ask(self, name: str, prompt: tuple[int, ...], **given: Any) -> None:
        self.heard[name], self.over[name] = [], threading.Event()

        def sink(delta: Delta) -> None:
            self.heard[name].append(delta)
            if delta.finish is not None:
                self.over[name].set()

        given = {"max_tokens": LIMIT, "sampling": GREEDY} | given
        self.engine.submit(Work(name, prompt, **given), sink)

    def answer(self, name: str) -> list[int]:
        assert self.over[name].wait(60), f"{name} is not over"
        return [token for delta in self.heard[name] for token in delta.tokens]

    def plain(self, prompt: tuple[int, ...], sampling: SamplingParams = GREEDY) -> list[int]:
        """The answer by plain decoding, with nothing found in the cache."""
        name = f"plain {len(self.heard)}"
        self.ask(name, prompt, sampling=sampling, speculate=False, cache_salt=name)
        found = self.answer(name)
        assert all(delta.verified is None for delta in self.heard[name])
        return found

    def settled(self) -> bool:
        """Whether all pages are back, once the engine has nothing to do."""
        done = threading.Event()
        self.engine._commands.put(done.set)
        return done.wait(10) and self.pages.available == self.pages.count - 1

    def metric(self, name: str) -> float:
        labels = {"model_name": "test", "engine": "0"}
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.engine.start()
    yield made
    made.engine.stop()


def total(server: Server, name: str) -> tuple[int, int]:
    """(accepted, verified) drafts of an answer."""
    deltas = server.heard[name]
    return sum(d.accepted for d in deltas), sum(d.verified or 0 for d in deltas)


def test_answers_are_those_of_plain_decoding_whoever_else_is_served(server: Server):
    for i in range(3):
        for j, prompt in enumerate(PROMPTS):
            server.ask(f"{i}.{j}", prompt, max_tokens=LIMIT - 7 * i)
    for i in range(3):
        for j, prompt in enumerate(PROMPTS):
            assert server.answer(f"{i}.{j}") == server.plain(prompt)[: LIMIT - 7 * i]
            assert server.heard[f"{i}.{j}"][-1].finish == "length"
    assert server.settled()
    verified = sum(total(server, name)[1] for name in server.heard)
    assert verified > 0


def test_requests_share_rounds_and_no_row_is_read_twice(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    read, groups = [], []
    prefill, round_ = programs().prefill, programs().round

    def counted(*given: Any) -> int:
        read.append(prefill(*given))
        return read[-1]

    def watched(shape: Shape, *given: Any) -> Any:
        groups.append(shape.group)
        return round_(shape, *given)

    monkeypatch.setattr(programs(), "prefill", counted)
    monkeypatch.setattr(programs(), "round", watched)
    for name in ("a", "b"):
        server.ask(name, PROMPTS[3], speculate=False, cache_salt=name)
    assert server.answer("a") == server.answer("b")
    assert sum(read) == 2 * (len(PROMPTS[3]) - 1)
    # One begins a turn or two before the other, and one round more is on its way at the end.
    assert len(groups) < LIMIT + 8 and groups.count(2) > LIMIT - 8


def test_a_known_beginning_is_found_with_its_draft(server: Server):
    long = tuple(np.random.default_rng(0).integers(0, V, 21).tolist())
    server.ask("first", long)
    first = server.answer("first")
    for name, prompt in ("again", long), ("longer", (*long, *first[:9])):
        server.ask(name, prompt)
        server.answer(name)
    assert server.heard["first"][0].cached_tokens == 0
    assert server.heard["again"][0].cached_tokens == 20
    assert server.heard["longer"][0].cached_tokens == 28
    assert server.answer("again") == first == server.plain(long)
    assert server.answer("longer")[: LIMIT - 9] == first[9:]
    # A page found without its draft's keys would change what is drafted, and so what is accepted.
    assert total(server, "again") == total(server, "first")
    server.ask("other", long, cache_salt="someone else's")
    server.answer("other")
    assert server.heard["other"][0].cached_tokens == 0


def test_who_gives_way_when_pages_run_out_goes_on_with_the_same_answer():
    tight = Server(pages=1 + LONGEST)
    tight.engine.start()
    for i, prompt in enumerate(PROMPTS):
        tight.ask(str(i), prompt)
    for i, prompt in enumerate(PROMPTS):
        assert tight.answer(str(i)) == tight.plain(prompt)
    assert tight.settled() and tight.metric("vllm:num_preemptions_total") > 0
    tight.engine.stop()


def test_an_abort_is_heard_once_and_gives_everything_back(server: Server):
    server.ask("long", PROMPTS[1])
    server.ask("other", PROMPTS[2])
    server.engine.abort("long")
    server.engine.abort("nobody")
    assert server.answer("other") == server.plain(PROMPTS[2])
    server.answer("long")
    server.engine.abort("long")
    assert server.settled()
    assert [d.finish for d in server.heard["long"] if d.finish] == ["abort"]
    assert server.answer("long") == server.plain(PROMPTS[1])[: len(server.answer("long"))]


def test_a_seed_gives_the_same_text_among_any_neighbours(server: Server):
    warm = SamplingParams(temperature=1.0, seed=11)
    server.ask("alone", PROMPTS[3], sampling=warm)
    alone = server.answer("alone")
    for i in range(4):
        server.ask(f"beside {i}", PROMPTS[i], sampling=replace(warm, seed=None))
    server.ask("among", PROMPTS[3], sampling=warm)
    server.ask("else", PROMPTS[3], sampling=replace(warm, seed=12))
    assert server.answer("among") == alone != server.answer("else")
    assert all(server.answer(f"beside {i}") for i in range(4))


def test_requests_that_cannot_be_drafted_for_ride_along(server: Server):
    banned = server.plain(PROMPTS[0])[0]
    biased = replace(GREEDY, logit_bias=((banned, -1000.0),))
    server.ask("biased", PROMPTS[0], sampling=biased)
    server.ask("penalised", PROMPTS[1], sampling=replace(GREEDY, frequency_penalty=50.0))
    server.ask("free", PROMPTS[2], logprobs=2)
    assert banned not in server.answer("biased")
    assert server.answer("biased") == server.plain(PROMPTS[0], biased)
    assert len(set(server.answer("penalised")[:V])) == V
    assert server.answer("free") == server.plain(PROMPTS[2])
    assert total(server, "biased") == (0, 0) and total(server, "free")[1] > 0
    told = [one for delta in server.heard["free"] for one in delta.logprobs]
    assert [one.token for one in told] == server.answer("free")
    assert all(one.rank == 1 and one.top[0] == (one.token, one.logprob) for one in told)


def test_a_stop_token_ends_an_answer_but_not_before_min_tokens(server: Server):
    tokens = server.plain(PROMPTS[2])
    stop = tokens[5]
    first = tokens.index(stop)
    server.ask("stops", PROMPTS[2], stop_token_ids=frozenset({stop}))
    server.ask("waits", PROMPTS[2], stop_token_ids=frozenset({stop}), min_tokens=first + 3)
    assert server.answer("stops") == tokens[: first + 1]
    last = server.heard["stops"][-1]
    assert (last.finish, last.stop_reason) == ("stop", stop)
    waited = server.answer("waits")
    assert len(waited) >= first + 3 and stop not in waited[: first + 3]


def test_a_full_queue_refuses_and_counts():
    full = Server(requests=2)
    full.ask("one", PROMPTS[0])
    full.ask("two", PROMPTS[1])
    with pytest.raises(BusyError, match="currently busy"):
        full.ask("three", PROMPTS[2])
    labels = {"model_name": "test", "engine": "0", "reason": "max_num_queued_reqs"}
    count = full.metrics.registry.get_sample_value("vllm:admission_rejections_total", labels)
    assert count == 1
    full.engine.start()
    assert full.answer("one") == full.plain(PROMPTS[0])
    assert full.answer("two") == full.plain(PROMPTS[1])
    full.engine.stop()


def test_a_row_that_is_not_a_number_ends_alone(server: Server):
    """The embedding of one token is not a number: whoever reads it ends, everybody else goes on."""
    known = {*PROMPTS[0], *server.plain(PROMPTS[0])}
    spoiled = next(t for t in range(V) if t not in known)
    made = programs()
    good = made.weights
    embed = good.target.embed
    made.weights = good._replace(target=good.target._replace(embed=embed.at[spoiled].set(jnp.nan)))
    try:
        server.ask("spoiled", (1, 2, spoiled, 3))
        server.ask("healthy", PROMPTS[0])
        server.answer("spoiled")
        assert server.answer("healthy") == server.plain(PROMPTS[0])
        last = server.heard["spoiled"][-1]
        assert last.finish == "error" and "not a number" in (last.error or "")
        assert server.metric("vllm:corrupted_requests_total") == 1
    finally:
        made.weights = good
    # Its pages were cleaned: whoever gets them next is not hurt.
    for i in range(6):
        server.ask(f"after {i}", PROMPTS[i % 4])
    for i in range(6):
        assert server.answer(f"after {i}") == server.plain(PROMPTS[i % 4])
    assert server.settled()


def test_a_failed_step_ends_its_answers_and_the_next_ones_are_served(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("out of memory")

    server.ask("before", PROMPTS[0])
    server.answer("before")
    with monkeypatch.context() as broken:
        broken.setattr(programs(), "round", fails)
        server.ask("during", PROMPTS[1])
        server.answer("during")
    assert server.heard["during"][-1].finish == "error" and server.engine.ready
    server.ask("after", PROMPTS[2])
    assert server.answer("after") == server.plain(PROMPTS[2])
    monkeypatch.setattr(programs(), "round", fails)
    server.ask("again", PROMPTS[1])
    server.answer("again")
    server.engine._thread.join(10)
    assert not server.engine.ready
    with pytest.raises(BusyError):
        server.ask("late", PROMPTS[1])


def test_a_fault_on_the_host_ends_one_answer_and_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    """At the worst moment: the answer is complete, and its slot and pages are not given back."""
    publish = server.pages.publish

    def failing(pages: Any, tokens: Any, salt: str) -> None:
        if salt == "doomed" and len(tokens) >= len(PROMPTS[0]):
            raise RuntimeError("planted")
        publish(pages, tokens, salt)

    monkeypatch.setattr(server.pages, "publish", failing)
    server.ask("doomed", PROMPTS[0], cache_salt="doomed")
    server.ask("well", PROMPTS[1])
    assert server.answer("well") == server.plain(PROMPTS[1])
    server.answer("doomed")
    assert server.heard["doomed"][-1].finish == "error"
    assert "RuntimeError" in (server.heard["doomed"][-1].error or "")
    assert server.settled()
