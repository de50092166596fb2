"""Batches hold every document once a pass, and their stream goes on anywhere, bit for bit."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.train.conversations import Row
from dspark_jax.train.packing import Packed, best_fit, pack

CONTINUE = """
import json, sys
import numpy as np
from dspark_jax.train.packing import pack
from test_packing import digest, made_rows

batches = pack(made_rows([5, 9, 3, 30, 7, 7, 2]), 16, 2, 3)
batches.set_state(json.loads(sys.argv[1]))
print(json.dumps([digest(next(batches)) for _ in range(9)]))
"""


def made_rows(lengths: list[int]) -> list[Row]:
    rng = np.random.default_rng(len(lengths))
    return [Row(rng.integers(1, 1000, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths]


def digest(packed: Packed) -> list[list[int]]:
    return [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(packed)]


def equal(a: Packed, b: Packed) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def documents(packed: Packed, row: int) -> list[int]:
    """Data set rows in packed row `row`, in order; a document begins where its position is 0."""
    begins = (packed.document[row] >= 0) & (packed.batch.position[row] == 0)
    return packed.document[row][begins].tolist()


many_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(many_lengths, st.integers(1, 3), st.integers(0, 2**40))
def test_the_stream_goes_on_from_every_step_as_if_nothing_had_happened(
    lengths: list[int], batch_rows: int, seed: int
):
    rows = made_rows(lengths)
    batches, states, stream = pack(rows, 20, batch_rows, seed), [], []
    for _ in range(3 * len(rows) // batch_rows + 3):
        states.append(json.dumps(batches.get_state()))
        stream.append(next(batches))
    again = pack(rows, 20, batch_rows, seed)
    for step in reversed(range(len(states))):
        again.set_state(json.loads(states[step]))
        assert all(equal(x, y) for x, y in zip(stream[step:], again, strict=False))
        again.set_state(json.loads(states[step]))
        assert json.dumps(again.get_state()) == states[step]
        assert equal(next(again), stream[step])


def test_a_new_process_goes_on_with_the_same_batches():
    batches = pack(made_rows([5, 9, 3, 30, 7, 7, 2]), 16, 2, 3)
    for _ in range(4):
        next(batches)
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, json.dumps(batches.get_state())],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [digest(next(batches)) for _ in range(9)]


@settings(max_examples=50, deadline=None)
@given(many_lengths, st.integers(1, 3), st.integers(0, 9))
def test_every_document_is_seen_once_in_each_pass(lengths: list[int], batch_rows: int, seed: int):
    rows = made_rows(lengths)
    per_pass = len(best_fit(-np.sort(-np.minimum(lengths, 20)), 20))
    batches = pack(rows, 20, batch_rows, seed)
    needed = -(-3 * per_pass // batch_rows)
    seen = [
        documents(packed, row) for packed in islice(batches, needed) for row in range(batch_rows)
    ]
    for epoch in range(3):
        part = seen[epoch * per_pass : (epoch + 1) * per_pass]
        assert sorted(n for row in part for n in row) == list(range(len(rows)))


@settings(max_examples=50, deadline=None)
@given(many_lengths, st.integers(1, 3), st.sampled_from([None, 0, 5]))
def test_a_packed_document_is_its_row_with_its_own_segment_and_positions(
    lengths: list[int], batch_rows: int, seed: int | None
):
    rows = made_rows(lengths)
    for packed in islice(pack(rows, 20, batch_rows, seed), 5):
        batch = packed.batch
        assert batch.tokens.shape == (batch_rows, 20)
        padding = packed.document < 0
        assert (np.asarray(batch.segment == 0) == padding).all()
        assert not batch.loss_mask[padding].any() and not batch.tokens[padding].any()
        for line in range(batch_rows):
            order = documents(packed, line)
            for segment, number in enumerate(order, 1):
                here = np.asarray(batch.segment[line] == segment)
                assert (packed.document[line][here] == number).all()
                assert np.array_equal(batch.tokens[line][here], rows[number].tokens[:20])
                assert np.array_equal(batch.loss_mask[line][here], rows[number].loss_mask[:20])
                assert np.array_equal(batch.position[line][here], np.arange(here.sum()))


def test_without_a_seed_one_pass_in_order_ends_with_empty_rows():
    batches = list(pack(made_rows([12, 12, 5, 30, 12]), 20, 3, None))
    assert len(batches) == 2
    lines = [documents(packed, line) for packed in batches for line in range(3)]
    assert lines == [[0], [1, 2], [3], [4], [], []]


def test_passes_differ_and_a_seed_names_the_stream():
    rows = made_rows([7] * 12)
    first, again, other = (list(islice(pack(rows, 20, 2, s), 6)) for s in (0, 0, 1))
    assert all(map(equal, first, again)) and not all(map(equal, first, other))
    assert not all(map(equal, first[:3], first[3:]))


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_packed_tightly(seed: int):
    rng = np.random.default_rng(seed)
    batches = pack(made_rows(rng.integers(20, 180, 500).tolist()), 512, 4, seed)
    used = [(packed.document >= 0).mean() for packed in islice(batches, 50)]
    assert np.mean(used) > 0.98


def test_a_long_run_is_resumed_at_once():
    rows = made_rows(np.random.default_rng(0).integers(5, 60, 2000).tolist())
    batches = pack(rows, 128, 4, 0)
    began = time.monotonic()
    batches.set_state({"next_index": 100_000})
    assert next(batches).batch.tokens.shape == (4, 128)
    assert time.monotonic() - began < 2
