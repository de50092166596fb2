"""An answer on its way: its tokens, pages and slot, and when it is over."""

import secrets
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from dspark_jax.serve.grammar import Matcher
from dspark_jax.serve.messages import Finish, Sink, Work


@dataclass(eq=False)
class Sequence:
    """One Work and what the engine knows of it.

    `tokens` are the prompt and what was emitted and heard of; the last one is the next anchor.
    `rows` of them are in the cache or on their way there. `rounds` are dispatched and not heard of.
    """

    work: Work
    sink: Sink
    arrived: float
    matcher: Matcher | None = None
    """Of its grammar; made when it is admitted."""
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    rows: int = 0
    cached: int = 0
    slot: int | None = None
    entered: bool = False
    """Its slot on the device holds it."""
    rounds: int = 0
    behind: int = 0
    """Rows that its draft has not heard of: those of plain rounds (`paged_upkeep.catch_up`)."""
    admitted: float | None = None
    heard: float | None = None
    """When the first round was heard of, in monotonic seconds as `arrived` and `admitted`."""
    finish: Finish | None = None
    chance: Tokens[float] = ()
    """Of every draft of the last block heard of, to be accepted if those before it are."""

    def __post_init__(self) -> None:
        self.tokens = list(self.work.prompt)
        asked = self.work.sampling.seed
        self.seed = secrets.randbits(64) if asked is None else asked % (1 << 64)

    @property
    def emitted(self) -> int:
        return len(self.tokens) - len(self.work.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted, if every round on its way emits only one."""
        return self.work.max_tokens - self.emitted - self.rounds

    @property
    def prefilled(self) -> bool:
        return self.rows >= len(self.tokens) - 1

    @property
    def edited(self) -> bool:
        """Whether its logits are changed by what it has emitted: it cannot be drafted for."""
        work, sampling = self.work, self.work.sampling
        return (
            work.grammar is not None
            or self.emitted < work.min_tokens
            or bool(sampling.logit_bias)
            or sampling.repetition_penalty != 1
            or bool(sampling.presence_penalty or sampling.frequency_penalty)
        )

    @property
    def drafted_for(self) -> bool:
        """Whether its rounds may verify drafts."""
        return self.work.speculate and not self.edited

    def take(self, tokens: Tokens[int], ends: frozenset[int]) -> tuple[list[int], int | None]:
        """Append emitted tokens up to the one that ends the answer: (those, the stop token)."""
        taken, work = [], self.work
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if self.emitted < work.min_tokens:
                continue
            if token in work.stop_token_ids:
                self.finish = "stop"
                return taken, token
            if token in ends and not work.ignore_eos:
                self.finish = "stop"
                break
            if self.emitted >= work.max_tokens:
                self.finish = "length"
                break
        return taken, None
