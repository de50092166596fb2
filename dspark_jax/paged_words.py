"""What the host and a round tell each other, as one array of words each way.

Every array is a transfer of its own and costs the host more than what is in it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dspark_jax.paged_loop import Control, Logprobs, Result
from dspark_jax.truncation import Truncation


class Column(NamedTuple):
    """A named part of every row; a width of None is one word that stands for itself."""

    name: str
    dtype: Any
    width: int | None = None


class Told(NamedTuple):
    """What a round is told: a row of words for every sequence (`told_columns`), and `seconds`."""

    words: Int[Array, "N W"]
    seconds: Any = None


class Heard(NamedTuple):
    """What a round tells: a row of words for every sequence (`heard_columns`), and `logprobs`."""

    words: Int[Array, "N W"]
    logprobs: Logprobs | None


def told_columns(drafted: int, pages: int) -> tuple[Column, ...]:
    """Of a `Control`. The pages come last: a round over fewer is told the beginning of a row."""
    return (
        Column("slot", np.int32),
        Column("fresh", np.bool_),
        Column("anchor", np.int32),
        Column("length", np.int32),
        Column("cap", np.int32),
        Column("key", np.uint32, 2),
        Column("temperature", np.float32),
        Column("draft_temperature", np.float32),
        Column("min_p", np.float32),
        Column("top_k", np.int32),
        Column("top_p", np.float32),
        Column("slope", np.float32, drafted),
        Column("intercept", np.float32, drafted),
        Column("pages", np.int32, pages),
    )


def heard_columns(drafted: int) -> tuple[Column, ...]:
    """Of a `Result`, whose plain rounds drafted none."""
    return (
        Column("tokens", np.int32, drafted + 1),
        Column("accepted", np.int32),
        Column("verified", np.int32),
        Column("confidence", np.float32, drafted),
        Column("chance", np.float32, drafted),
        Column("finite", np.bool_),
    )


def width(columns: tuple[Column, ...]) -> int:
    """Words of a row."""
    return sum(1 if c.width is None else c.width for c in columns)


def views(columns: tuple[Column, ...], words: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of the host's words [N W], to be read and written in place; truths are 0 or 1."""
    return {
        c.name: part.view(np.int32 if c.dtype is np.bool_ else c.dtype)
        for c, part in _parts(columns, words)
    }


def control_of(told: Told, drafted: int) -> Control:
    """What a round is told, as its program takes it."""
    pages = told.words.shape[1] - width(told_columns(drafted, 0))
    parts = _parts(told_columns(drafted, pages), told.words)
    known = {c.name: _typed(part, c.dtype) for c, part in parts}
    truncation = Truncation(*(known.pop(name) for name in Truncation._fields))
    return Control(**known, truncation=truncation, seconds=told.seconds)


def words_of(result: Result) -> Heard:
    """A round's result in its program, to be sent."""
    columns = heard_columns(result.confidence.shape[1])
    parts = [_words(getattr(result, c.name), c) for c in columns]
    return Heard(jnp.concatenate(parts, axis=1), result.logprobs)


def result_of(heard: Heard) -> Result:
    """What was sent, on the host; waits for it."""
    words = np.asarray(heard.words)
    plain, each = (width(heard_columns(drafted)) for drafted in (0, 1))
    drafted = (words.shape[1] - plain) // (each - plain)
    known: Any = views(heard_columns(drafted), words)
    return Result(**known, logprobs=jax.device_get(heard.logprobs))


def _parts(columns: tuple[Column, ...], words: Any) -> Iterator[tuple[Column, Any]]:
    begin = 0
    for column in columns:
        if column.width is None:
            yield column, words[:, begin]
        else:
            yield column, words[:, begin : begin + column.width]
        begin += 1 if column.width is None else column.width


def _typed(part: Int[Array, "..."], dtype: Any) -> Array:
    if dtype is np.bool_:
        return part != 0
    return jax.lax.bitcast_convert_type(part, dtype)


def _words(values: Array, column: Column) -> Int[Array, "N W"]:
    values = values.astype(jnp.int32 if column.dtype is np.bool_ else column.dtype)
    whole = jax.lax.bitcast_convert_type(values, jnp.int32)
    return whole[:, None] if column.width is None else whole
