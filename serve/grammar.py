"""What a grammar allows next, by llguidance."""

from collections import OrderedDict
from functools import cached_property
from typing import Any

import llguidance as guidance
import llguidance.hf
import llguidance.numpy
import numpy as np

from dspark_jax.serve.messages import Grammar

KEPT = 32
"""Grammars that are remembered."""


class Grammars:
    """Makes matchers over one tokenizer, whose table is built at the first grammar."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: tuple[int, ...]):
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, ends
        self._known: OrderedDict[Grammar, Any] = OrderedDict()

    @cached_property
    def _table(self) -> Any:
        return llguidance.hf.from_tokenizer(
            self.tokenizer, n_vocab=self.vocabulary, eos_token=self.ends[0]
        )

    def matcher(self, grammar: Grammar) -> "Matcher":
        """At the beginning of an answer; ValueError when the grammar cannot be read.

        The last ones asked for are kept, so that a schema used over and over is read once.
        """
        if grammar not in self._known:
            self._known[grammar] = self._compiled(grammar)
        self._known.move_to_end(grammar)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return Matcher(self._known[grammar].deep_copy(), self.vocabulary)

    def _compiled(self, grammar: Grammar) -> Any:
        make = {
            "json_schema": guidance.LLMatcher.grammar_from_json_schema,
            "regex": guidance.LLMatcher.grammar_from_regex,
            "lark": guidance.LLMatcher.grammar_from_lark,
        }[grammar.kind]
        matcher = guidance.LLMatcher(self._table, make(grammar.text))
        if matcher.is_error():
            raise ValueError(f"Grammar error: {matcher.get_error()}")
        return matcher


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher = matcher
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocabulary)

    def allowed(self) -> np.ndarray:
        """Bit v % 32 of word v // 32 is set when token v may follow, an end token included."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask, 0)
        return self._mask[0].view(np.uint32)

    def advance(self, token: int) -> None:
        """Go on by an emitted token; ValueError when it was not allowed."""
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not follow in the grammar")
