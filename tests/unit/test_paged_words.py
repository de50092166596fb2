"""What is written into words on one side is what the other side reads, bit by bit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.paged_loop import Result
from dspark_jax.paged_words import (
    Column,
    Told,
    control_of,
    heard_columns,
    result_of,
    told_columns,
    views,
    width,
    words_of,
)

N, DRAFTED, PAGES = 3, 4, 5
ODD = np.array([-0.0, np.inf, np.nan, 1e-45, np.float32(0.1)], np.float32)


def drawn(column: Column, rng: np.random.Generator) -> np.ndarray:
    """Any values of a column, the unusual ones among them."""
    shape = (N,) if column.width is None else (N, column.width)
    if column.dtype is np.float32:
        return rng.choice(ODD, shape)
    if column.dtype is np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    info = np.iinfo(column.dtype)
    return rng.integers(info.min, info.max, shape, column.dtype, endpoint=True)


def same(found: Any, wanted: np.ndarray) -> bool:
    found = np.asarray(found)
    return found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("pages", [1, PAGES])
def test_a_program_reads_what_the_host_wrote(pages: int) -> None:
    columns, rng = told_columns(DRAFTED, pages), np.random.default_rng(pages)
    words: Any = np.zeros((N, width(columns)), np.int32)
    wanted = {c.name: drawn(c, rng) for c in columns}
    for name, part in views(columns, words).items():
        part[:] = wanted[name]
    control = jax.jit(partial(control_of, drafted=DRAFTED))(Told(words))
    read = control._asdict() | control.truncation._asdict()
    assert all(same(read[name], values) for name, values in wanted.items())
    assert len(wanted) == len(control._fields) - 2 + len(control.truncation)


def test_a_round_over_fewer_pages_is_told_the_beginning_of_a_row() -> None:
    few, many = told_columns(DRAFTED, 1), told_columns(DRAFTED, PAGES)
    words = np.arange(N * width(many), dtype=np.int32).reshape(N, -1)
    ours, theirs = views(many, words), views(few, words[:, : width(few)])
    assert all(same(theirs[c.name], ours[c.name]) for c in few[:-1])
    assert same(theirs["pages"], ours["pages"][:, :1])


@pytest.mark.parametrize("drafted", [0, 1, DRAFTED])
def test_the_host_reads_what_a_round_found(drafted: int) -> None:
    rng = np.random.default_rng(drafted)
    wanted = {c.name: drawn(c, rng) for c in heard_columns(drafted)}
    arrays: Any = {name: jnp.asarray(values) for name, values in wanted.items()}
    found = result_of(jax.jit(words_of)(Result(**arrays, logprobs=None)))
    assert found.logprobs is None
    for name, values in wanted.items():
        read = np.asarray(getattr(found, name))
        assert same(read.astype(values.dtype), values)
