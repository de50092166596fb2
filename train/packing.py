"""Rows packed into batches: several documents per row, positions that restart."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from dspark_jax.train.conversations import Row
from dspark_jax.types import Batch


class Packed(NamedTuple):
    """A batch and where it came from: `document` is the data set's row, -1 on padding."""

    batch: Batch
    document: np.ndarray


def pack(rows: Sequence[Row], length: int, batch_rows: int, seed: int | None) -> Iterator[Packed]:
    """Batches of `batch_rows` packed rows of `length` tokens.

    With a seed: endless, every pass in a new order. Without: one pass in order, the last batch
    filled up with empty rows, so that every document is seen exactly once.
    """
    features = [_features(i, row, length) for i, row in enumerate(rows)]
    data = grain.MapDataset.source(features)
    if seed is not None:
        data = data.seed(seed).shuffle().repeat()
    packed = FirstFitPackIterDataset(
        data.to_iter_dataset(),
        length_struct={name: length for name in ("tokens", "loss_mask", "document")},
        num_packing_bins=batch_rows,
        shuffle_bins=False,
    )
    group: list[dict[str, np.ndarray]] = []
    for row in packed:
        group.append(row)
        if len(group) == batch_rows:
            yield _batch(group)
            group = []
    if group:
        empty = {name: np.zeros_like(value) for name, value in group[0].items()}
        yield _batch(group + [empty] * (batch_rows - len(group)))


def _features(number: int, row: Row, length: int) -> dict[str, np.ndarray]:
    tokens = row.tokens[:length]
    return {
        "tokens": tokens,
        "loss_mask": row.loss_mask[:length].astype(np.int32),
        "document": np.full(len(tokens), number, np.int32),
    }


def _batch(group: list[dict[str, np.ndarray]]) -> Packed:
    def stack(name: str) -> np.ndarray:
        return np.stack([row[name] for row in group]).astype(np.int32)

    segment = stack("tokens_segment_ids")
    batch = Batch(
        tokens=stack("tokens"),
        loss_mask=stack("loss_mask").astype(bool) & (segment > 0),
        segment=segment,
        position=stack("tokens_positions"),
    )
    return Packed(batch, np.where(segment > 0, stack("document"), -1))
