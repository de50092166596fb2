"""An answer's text as its tokens come: whole characters only, cut at the first stop string."""

from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 8
UNFINISHED = "\ufffd"


class Detokeniser:
    """Turns tokens into text one at a time; bytes that are no character yet wait."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool, prompt: tuple[int, ...] = ()):
        self._backend = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._special = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._waiting: list[int] = []
        # Some decoders drop the space before the first word they see: let that be the prompt's.
        context = list(prompt[-CONTEXT_TOKENS:])
        while context and self._shown(context).endswith(UNFINISHED):
            context.pop()
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        """The text that `token` completes, often none."""
        if token in self._special:
            return ""
        self._waiting.append(token)
        try:
            text = self._stream.step(self._backend, token)
        except Exception as error:  # the tokenizers library raises bare Exception
            if "Invalid prefix" not in str(error):
                raise
            return self._afresh()
        if text is None:
            return ""
        self._waiting.clear()
        return text

    def finish(self) -> str:
        """What still waits: an unfinished character as the tokenizer shows it."""
        return self._afresh() if self._waiting else ""

    def _shown(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=self._skip)

    def _afresh(self) -> str:
        """Broken bytes cannot be undone by later ones: show them and begin a new stream."""
        text = self._shown(self._waiting)
        self._waiting.clear()
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        return text


@dataclass
class StopStrings:
    """Passes text on, but for the end of it that may be the beginning of a stop string."""

    stops: tuple[str, ...]
    keep: bool = False
    """The stop string itself belongs to the answer."""
    found: str | None = None
    _held: str = field(default="", repr=False)

    def push(self, text: str, armed: bool = True) -> str:
        """The text that is certain now; `found` is set once a stop string ended in `text`.

        While not `armed`, no stop string may end: what is pushed can only begin one.
        """
        if not self.stops:
            return text
        whole = self._held + text
        if armed and (match := self._first(whole, len(self._held))):
            begin, self.found = match
            self._held = ""
            return whole[: begin + len(self.found) if self.keep else begin]
        wait = self._wait(whole)
        self._held = whole[len(whole) - wait :]
        return whole[: len(whole) - wait]

    def finish(self) -> str:
        """The end of the answer came before a stop string did: what was held is text."""
        held, self._held = self._held, ""
        return held

    def _first(self, whole: str, fresh: int) -> tuple[int, str] | None:
        """Where the first stop string begins that ends in the text after `fresh` characters."""
        found = [
            (begin, stop)
            for stop in self.stops
            if (begin := whole.find(stop, max(0, fresh + 1 - len(stop)))) >= 0
        ]
        return min(found, key=lambda match: match[0], default=None)

    def _wait(self, whole: str) -> int:
        """How many characters at the end may begin a stop string."""
        longest = min(len(whole), max(map(len, self.stops)) - 1)
        for count in range(longest, 0, -1):
            end = whole[-count:]
            if any(stop.startswith(end) and len(stop) > count for stop in self.stops):
                return count
        return 0
