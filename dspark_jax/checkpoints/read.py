"""Part of a stored tensor, reading only the bytes that the part needs."""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Shaped

from dspark_jax.checkpoints.header import Stored

PAGE_BYTES = 4096
"""Disks read at least this much, so shorter runs inside a row save nothing: it is read whole."""
BLOCK_BYTES = 8 << 20
"""Whole rows go through a buffer of this size, or of one row."""
Bounds = Sequence[tuple[int, int]]


def read(
    stored: Stored,
    index: tuple[slice, ...],
    observe: Callable[[int], None] = lambda nbytes: None,
) -> Shaped[np.ndarray, "..."]:
    """The part of a tensor at `index` (a slice of step 1 per axis), in its stored type.

    `observe` is told the bytes of every piece that was read. Raises ValueError when the file cannot
    be read or ends early.
    """
    bounds = _bounds(stored, index)
    if not _reads_rows(stored, bounds):
        return _read_runs(stored, bounds, observe)
    part = np.empty(_lengths(bounds), stored.dtype)
    columns = tuple(itertools.starmap(slice, bounds[1:]))
    for start, stop in _blocks(stored, *bounds[0]):
        rows = _read_runs(stored, [(start, stop), *((0, n) for n in stored.shape[1:])], observe)
        part[start - bounds[0][0] : stop - bounds[0][0]] = rows[(slice(None), *columns)]
    return part


def needed_bytes(stored: Stored, index: tuple[slice, ...]) -> int:
    """How many bytes `read` will read."""
    bounds = _bounds(stored, index)
    lengths = _lengths(bounds)
    if _reads_rows(stored, bounds):
        lengths = (lengths[0], *stored.shape[1:])
    return math.prod(lengths) * stored.dtype.itemsize


def _bounds(stored: Stored, index: tuple[slice, ...]) -> Bounds:
    bounds = [part.indices(size) for part, size in zip(index, stored.shape, strict=True)]
    assert all(step == 1 for _, _, step in bounds), (stored.name, index)
    return [(start, max(start, stop)) for start, stop, _ in bounds]


def _lengths(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _cut_axis(stored: Stored, bounds: Bounds) -> int:
    """The last axis that is cut: from there on a part is one run of bytes."""
    cut = [i for i, size in enumerate(stored.shape) if bounds[i] != (0, size)]
    return cut[-1] if cut else 0


def _reads_rows(stored: Stored, bounds: Bounds) -> bool:
    axis, lengths = _cut_axis(stored, bounds), _lengths(bounds)
    run = math.prod(lengths[axis:]) * stored.dtype.itemsize
    return axis > 0 and run < PAGE_BYTES and math.prod(lengths) > 0


def _blocks(stored: Stored, start: int, stop: int) -> Iterator[tuple[int, int]]:
    row = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    step = max(1, BLOCK_BYTES // row)
    return ((i, min(i + step, stop)) for i in range(start, stop, step))


def _read_runs(
    stored: Stored, bounds: Bounds, observe: Callable[[int], None]
) -> Shaped[np.ndarray, "..."]:
    axis, lengths, item = _cut_axis(stored, bounds), _lengths(bounds), stored.dtype.itemsize
    raw = np.empty(math.prod(lengths) * item, np.uint8)
    run = math.prod(lengths[axis:]) * item
    strides = [math.prod(stored.shape[i + 1 :]) * item for i in range(len(lengths))]
    first = stored.offset + (bounds[axis][0] * strides[axis] if bounds else 0)
    with _opened(stored) as file:
        for i, place in enumerate(itertools.product(*itertools.starmap(range, bounds[:axis]))):
            offset = first + sum(p * s for p, s in zip(place, strides, strict=False))
            _fill(file.fileno(), raw[i * run : (i + 1) * run].data, offset, stored)
            observe(run)
    return raw.view(stored.dtype).reshape(lengths)


def _opened(stored: Stored) -> io.FileIO:
    try:
        return io.FileIO(stored.path)
    except OSError as error:
        raise _unreadable(stored, str(error)) from error


def _fill(file: int, buffer: memoryview, offset: int, stored: Stored) -> None:
    while buffer:
        try:
            count = os.preadv(file, [buffer], offset)
        except OSError as error:
            raise _unreadable(stored, str(error)) from error
        if not count:
            raise _unreadable(stored, f"the file ends at byte {offset}")
        buffer, offset = buffer[count:], offset + count


def _unreadable(stored: Stored, why: str) -> ValueError:
    return ValueError(
        f"tensor {stored.name} of {stored.path} cannot be read: {why}; "
        "check the file, or download it again."
    )
