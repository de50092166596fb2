"""Tensors on their way from one file to another, a piece at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.header import DTYPES, Stored
from dspark_jax.checkpoints.read import read

PIECE_BYTES = 16 << 20
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = ("BF16", "F16", "F32")


class Outgoing(NamedTuple):
    """A tensor to be written: its bytes come in C order when they are asked for."""

    name: str
    code: str
    """Type as safetensors calls it."""
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.code].itemsize


def copied(stored: Stored) -> Outgoing:
    """A stored tensor as it is, bit for bit."""
    return Outgoing(stored.name, CODES[stored.dtype], stored.shape, lambda: finite_pieces(stored))


def made(name: str, value: np.ndarray) -> Outgoing:
    """A tensor in memory."""
    return Outgoing(name, CODES[value.dtype], value.shape, lambda: [np.ascontiguousarray(value)])


def converted(tensor: Outgoing, name: str, dtype: np.dtype) -> Outgoing:
    """A tensor under another name and in another type."""
    return Outgoing(
        name,
        CODES[dtype],
        tensor.shape,
        lambda: (piece.astype(dtype) for piece in tensor.pieces()),
    )


def chosen_rows(tensor: Outgoing, name: str, rows: Sequence[int], dtype: np.dtype) -> Outgoing:
    """The rows of a matrix at these ascending places."""
    wanted = np.asarray(rows)

    def pieces() -> Iterator[np.ndarray]:
        start = 0
        for piece in tensor.pieces():
            inside = wanted[(wanted >= start) & (wanted < start + len(piece))]
            yield piece[inside - start].astype(dtype)
            start += len(piece)

    return Outgoing(name, CODES[dtype], (len(wanted), *tensor.shape[1:]), pieces)


def finite_pieces(stored: Stored) -> Iterator[np.ndarray]:
    """A stored tensor in runs of whole rows; ValueError when a number in it is not finite."""
    for piece in _pieces(stored):
        if CODES[stored.dtype] in FLOATS and not np.isfinite(piece.astype(jnp.float32)).all():
            raise ValueError(
                f"tensor {stored.name} of {stored.path} holds numbers that are NaN or infinite; "
                "use another checkpoint of this draft."
            )
        yield piece


def _pieces(stored: Stored) -> Iterator[np.ndarray]:
    if not stored.shape:
        yield read(stored, ())
        return
    rest = tuple(slice(None) for _ in stored.shape[1:])
    row_bytes = max(1, stored.nbytes // max(1, stored.shape[0]))
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, stored.shape[0], step):
        yield read(stored, (slice(start, start + step), *rest))
