"""Rows packed into batches: several documents per row, positions that restart.

A batch is a pure function of its number, so a stream goes on anywhere at once: its whole state is
the number of the next batch.
"""

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import grain
import numpy as np

from dspark_jax.train.conversations import Row
from dspark_jax.types import Batch

AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
"""Batches made ahead in a thread; the state counts only those handed out."""

Bins = Callable[[int], Sequence[int]]
"""The data set's row numbers that share packed row n of the stream."""


class Packed(NamedTuple):
    """A batch and where it came from: `document` is the data set's row, -1 on padding."""

    batch: Batch
    document: np.ndarray


def pack(
    rows: Sequence[Row], length: int, batch_rows: int, seed: int | None, first_row: int = 0
) -> grain.DatasetIterator[Packed]:
    """Batches of `batch_rows` packed rows of `length` tokens; longer rows are cut.

    With a seed: endless, every pass in a new order, each document once a pass. Without: one pass
    in order, the last batch filled up with empty rows, so that every document is seen once.
    Documents are numbered from `first_row`.
    `get_state` is JSON-serialisable and holds in any process that packs the same rows in the same
    way.
    """
    lengths = np.array([min(len(row.tokens), length) for row in rows], np.int64)
    if seed is None:
        count, bins = in_order(lengths, length)
        batches = -(-count // batch_rows)
    else:
        bins, batches = shuffled(lengths, length, seed), sys.maxsize

    def batch(number: int) -> Packed:
        first = number * batch_rows
        packed = assemble(rows, [bins(n) for n in range(first, first + batch_rows)], length)
        document = packed.document
        return packed._replace(document=np.where(document >= 0, document + first_row, -1))

    return iter(grain.MapDataset.range(batches).map(batch).to_iter_dataset(AHEAD))


def in_order(lengths: np.ndarray, length: int) -> tuple[int, Bins]:
    """How many packed rows one pass takes, and their documents; beyond them, none."""
    packed = best_fit(lengths, length)
    return len(packed), lambda n: packed[n] if n < len(packed) else ()


def shuffled(lengths: np.ndarray, length: int, seed: int) -> Bins:
    """Documents of an endless stream of passes.

    The lengths are the same in every pass, so they are packed once, the longest first, which fills
    best. A pass draws which of the documents of one length goes where, and the order of the rows.
    """
    packed = best_fit(-np.sort(-lengths), length)

    @lru_cache(maxsize=2)
    def draw(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((seed, epoch))
        return np.lexsort((rng.permutation(len(lengths)), -lengths)), rng.permutation(len(packed))

    def bins(n: int) -> Sequence[int]:
        epoch, place = divmod(n, len(packed))
        document, order = draw(epoch)
        return document[packed[order[place]]].tolist()

    return bins


def best_fit(lengths: np.ndarray, length: int) -> list[list[int]]:
    """Places of `lengths` grouped so that no group exceeds `length`.

    Each goes, in order, to the group it leaves the least room in. `open_groups[room]` are the
    groups with that room; bit `room` of `rooms` says whether there are any.
    """
    groups: list[list[int]] = []
    open_groups: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0
    for place, size in enumerate(lengths.tolist()):
        large_enough = rooms >> size
        if large_enough:
            room = size + (large_enough & -large_enough).bit_length() - 1
            group = open_groups[room].pop()
            if not open_groups[room]:
                rooms ^= 1 << room
        else:
            room, group = length, len(groups)
            groups.append([])
        groups[group].append(place)
        open_groups[room - size].append(group)
        rooms |= 1 << (room - size)
    return groups


def assemble(rows: Sequence[Row], bins: Sequence[Sequence[int]], length: int) -> Packed:
    """The arrays of a batch, one packed row for each list of documents."""
    shape = (len(bins), length)
    arrays: list[Any] = [np.zeros(shape, dtype) for dtype in (np.int32, bool, np.int32, np.int32)]
    tokens, loss_mask, segment, position = arrays
    document = np.full(shape, -1, np.int32)
    for line, numbers in enumerate(bins):
        begin = 0
        for order, number in enumerate(numbers, 1):
            row = rows[number]
            size = min(len(row.tokens), length)
            here = line, slice(begin, begin + size)
            tokens[here], loss_mask[here] = row.tokens[:size], row.loss_mask[:size]
            segment[here], position[here] = order, np.arange(size)
            document[here] = number
            begin += size
    return Packed(Batch(tokens, loss_mask, segment, position), document)
