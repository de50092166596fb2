"""One answer being written: deltas become text, and a stop string or an end token ends it."""

import time
from dataclasses import dataclass

from dspark_jax.serve.http.mailbox import Arrival
from dspark_jax.serve.http.settings import ServedModel
from dspark_jax.serve.http.text import Detokeniser, StopStrings
from dspark_jax.serve.messages import TokenLogprob, Work
from dspark_jax.serve.metrics import Metrics


@dataclass(frozen=True)
class TextRules:
    """What a request says of its answers' text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class Piece:
    """What one delta added to answer `index`.

    `token_texts` are what each of `tokens` added before stop strings were looked for.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    token_texts: tuple[str, ...]
    rounds: tuple[tuple[int, int], ...]
    finish: str | None = None
    stop_reason: int | str | None = None


class Answer:
    """The state of one answer; `take` turns its deltas into pieces."""

    def __init__(
        self, index: int, work: Work, rules: TextRules, model: ServedModel, metrics: Metrics
    ):
        self.index = index
        self.work = work
        self.token_count = 0
        self.cached_tokens = 0
        self.rounds: list[tuple[int, int]] = []
        self.finished = False
        self._rules = rules
        self._ends = frozenset(model.end_tokens) | work.stop_token_ids
        self._text = Detokeniser(model.tokenizer, rules.skip_special_tokens, work.prompt)
        self._stops = StopStrings(rules.stops, rules.include_stop)
        self._metrics = metrics
        self._asked = time.monotonic()
        self._first: float | None = None
        self._latest: float | None = None

    def take(self, arrival: Arrival) -> Piece:
        """The next piece; its `finish` is set when the answer has ended, by us or by the engine."""
        self._measure(arrival)
        tokens, texts, text = self._read(arrival)
        finish, stop_reason = arrival.finish, arrival.stop_reason
        if finish and self._stops.found is None:
            end = self._text.finish()
            text += self._stops.push(end, self._armed()) if end else ""
            text += self._stops.finish()
        # An unfinished character may have completed one too.
        if self._stops.found is not None:
            finish, stop_reason = "stop", self._stops.found
        piece = Piece(
            self.index,
            text,
            tokens,
            tuple(arrival.logprobs[: len(tokens)]),
            texts,
            tuple(arrival.rounds),
            finish,
            stop_reason,
        )
        if finish:
            self.end(finish)
        return piece

    def end(self, reason: str) -> None:
        """Count the end of the answer, once."""
        if self.finished:
            return
        self.finished = True
        now = time.monotonic()
        decoding = (self._latest or now) - (self._first or now)
        self._metrics.ended(reason, self.token_count, now - self._asked, decoding)

    def _armed(self) -> bool:
        return self.token_count > self.work.min_tokens

    def _read(self, arrival: Arrival) -> tuple[tuple[int, ...], tuple[str, ...], str]:
        """The tokens up to a stop string, what each said, and the text that is certain."""
        texts: list[str] = []
        certain: list[str] = []
        for i, token in enumerate(arrival.tokens):
            self.token_count += 1
            last = arrival.finish == "stop" and i == len(arrival.tokens) - 1
            silent = last and token in self._ends and not self._rules.include_stop
            texts.append("" if silent else self._text.step(token))
            certain.append(self._stops.push(texts[-1], self._armed()))
            if self._stops.found is not None:
                break
        return tuple(arrival.tokens[: len(texts)]), tuple(texts), "".join(certain)

    def _measure(self, arrival: Arrival) -> None:
        metrics = self._metrics
        if arrival.cached_tokens is not None:
            self.cached_tokens = arrival.cached_tokens
        for verified, accepted in arrival.rounds:
            self.rounds.append((verified, accepted))
            metrics.drafted(verified, accepted)
        if not arrival.tokens:
            return
        if self._latest is None:
            self._first = arrival.at
            metrics.prompt(len(self.work.prompt), self.cached_tokens)
            metrics.first_token(arrival.at - self._asked)
        since = None if self._latest is None else arrival.at - self._latest
        metrics.tokens(len(arrival.tokens), since)
        self._latest = arrival.at
