"""What the HTTP side is told at its start: the model it speaks for, and its limits."""

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dspark_jax.serve.messages import SamplingParams

KEY_VARIABLE = "DSPARK_API_KEY"


@dataclass(frozen=True)
class ServedModel:
    """The model behind the server.

    `tokenizer` is transformers' fast one; `chat_template` None means the tokenizer's own.
    """

    name: str
    """What requests call it in `model`; it is only ever compared."""
    tokenizer: Any
    vocab_size: int
    """Rows of the embedding: every token id of a prompt lies below."""
    max_model_len: int
    """Prompt and answer together, in tokens."""
    end_tokens: tuple[int, ...]
    draft_length: int
    """Tokens drafted in a round at most; 0 without a draft."""
    chat_template: str | None = None
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    """What a request that leaves fields out gets; generation_config.json's, say."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds, as /v1/models says it."""


@dataclass(frozen=True)
class HttpSettings:
    """Limits and doors of the HTTP side."""

    api_keys: tuple[str, ...] = ()
    """Any of them opens the server; none leaves it open to everyone who reaches the port."""
    open_metrics: bool = False
    """/metrics needs no key."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins that browsers may call from; none sends no CORS header."""
    max_body_bytes: int = 8_000_000
    max_json_depth: int = 64
    body_timeout_seconds: float = 30.0
    """How long a body may take to arrive, from the first byte to the last."""
    max_answers: int = 64
    """Prompts times `n` of one request, at most."""
    request_timeout_seconds: float | None = None
    """Queue and run; then 504, or an error event in a stream."""
    slow_client_timeout_seconds: float = 30.0
    """How long one event may wait for a client that does not read before its answer is dropped."""
    max_pending_deltas: int = 64
    """Deltas kept apart for a slow reader; later ones are joined."""
    retry_after_seconds: int = 1
    tokenise_threads: int = 2
    max_grammar_bytes: int = 65_536
    grammar_timeout_seconds: float = 5.0
    per_request_spec_decode_metrics: Literal["none", "summary", "detailed"] = "none"
    """What an answer says about its own speculation, in `metrics.speculative_decoding`."""

    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of every key: what requests are compared against."""
        return tuple(hashlib.sha256(key.encode()).digest() for key in self.api_keys)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in the environment's DSPARK_API_KEY and in a file, one a line.

    Neither shows in a list of processes, as an argument would. ValueError when the file cannot be
    read, holds no key, or holds one that is not printable ASCII: no header could carry it.
    """
    found = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"the keys in {path} cannot be read: {error}.") from error
        found += [line for line in lines if line]
        if not any(lines):
            raise ValueError(f"{path} holds no key; write one a line, or leave the file out.")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
        raise ValueError("a key holds other characters than printable ASCII; choose another.")
    return tuple(found)
