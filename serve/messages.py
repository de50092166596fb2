"""What the HTTP side and the engine say to one another: frozen requests in, deltas out.

Nothing here knows JAX, sockets or text; an engine in another process could speak the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

Finish = Literal["stop", "length", "error", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn; the processing order is vLLM's.

    Bias and penalties, then temperature (0 is the argmax), min-p, top-k (0: all) and top-p.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    """None: drawn by the engine."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Grammar:
    """What the answer must match: a llguidance grammar of one kind."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class Work:
    """One answer to make. The HTTP side has validated everything against the model's limits."""

    request_id: str
    prompt: tuple[int, ...]
    """At least one token id; all are in the vocabulary."""
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    min_tokens: int = 0
    """No end token before so many tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Beside the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many most likely tokens to report beside each emitted one; 0 reports that one alone."""
    grammar: Grammar | None = None
    cache_salt: str = ""
    """Requests share cached prefixes only within one salt."""
    speculate: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of an emitted token under the target's raw logits, and the likeliest ones."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What a round gave one answer; the last one has `finish`.

    `accepted` of `verified` drafted tokens were kept in this round; `tokens` are the accepted ones
    and the bonus token, cut where the answer ends. `verified` is None in a round that drafted
    nothing for this answer. `stop_reason` is the stop token that ended it, None for an end token.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    verified: int | None = None
    accepted: int = 0
    cached_tokens: int | None = None
    """Prompt tokens found in the cache; in the first delta."""
    finish: Finish | None = None
    stop_reason: int | None = None
    error: str | None = None


Sink = Callable[[Delta], None]
"""Called on the engine's thread, in order; it must return at once."""


class BusyError(Exception):
    """The queue is full; the message is for the client, which may try again later."""


@runtime_checkable
class Engine(Protocol):
    """What the HTTP side needs; every method may be called from any thread."""

    def submit(self, work: Work, sink: Sink) -> None:
        """Queue an answer; raises BusyError. The sink gets deltas until one with `finish`."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget an answer: its pages are free within a round. Its sink hears `abort` once."""
        ...

    @property
    def ready(self) -> bool:
        """Everything is compiled and the last step did not fail."""
        ...
