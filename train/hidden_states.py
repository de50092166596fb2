"""Where a draft's training gets the target's hidden states: the one replaceable part.

A source is two functions. `fetch(packed)` runs on the host and returns the batch to train on and
arrays for the step; `states(target_params, batch, fetched)` runs inside the compiled step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dspark_jax.hosts import fetch
from dspark_jax.train.conversations import Row
from dspark_jax.train.packing import Packed
from dspark_jax.types import Batch, Target, TargetStates

FAR = 0.1
"""Root mean square of what stored states differ by, relative to theirs, that no rounding explains:
bfloat16 and FP8 stay well below."""


class HiddenStates(NamedTuple):
    """A source of `TargetStates` for packed batches."""

    fetch: Callable[[Packed], tuple[Packed, Any]]
    states: Callable[[Any, Batch, Any], TargetStates]


class Files(NamedTuple):
    """`hs_{i}.safetensors` as speculators writes them, i the row's number in the data.

    A file holds `token_ids [S]` and `hidden_states [S, A + 1, D]`: the aux states, then the state
    after the last layer before its norm.
    """

    folder: Path
    aux_layers: int
    hidden_size: int

    def path(self, number: int) -> Path:
        return self.folder / f"hs_{number}.safetensors"


def in_process(target: Target) -> HiddenStates:
    """The target runs in the same program as the draft; nothing is stored."""

    def states(params: Any, batch: Batch, fetched: None) -> TargetStates:
        return target.forward(params, batch.tokens, batch.segment, batch.position)

    return HiddenStates(lambda packed: (packed, None), states)


class StoredStates:
    """States read from files. Broken ones are skipped and counted, up to a share of all."""

    def __init__(self, files: Files, rows: Sequence[Row], share: float, say: Callable[[str], None]):
        self.files, self.rows, self.share, self.say = files, rows, share, say
        self.broken: dict[int, str] = {}

    def source(self) -> HiddenStates:
        """The two functions that training asks for."""
        return HiddenStates(self.fetch, lambda params, batch, fetched: fetched)

    def check(self, target: Target, params: Any) -> None:
        """Look at every header, and compare the first good file with the target's own states.

        So files of another length or size, of other layers, of another target or with a normed
        last state are found before they are trained on. Raises ValueError.
        """
        for number, row in enumerate(self.rows):
            try:
                check_header(self.files, number, row)
            except ValueError as error:
                self.skip(number, error)
        good = next((n for n in range(len(self.rows)) if self.read(n) is not None), None)
        if good is None:
            raise ValueError(
                f"none of {len(self.rows)} hidden-state files in {self.files.folder} can be used; "
                "make them from this data with this target, or leave --hidden-states out."
            )
        compare(self.files, good, self.rows[good], target, params)

    def fetch(self, packed: Packed) -> tuple[Packed, TargetStates]:
        """States of a batch; documents whose file is broken are not trained on."""
        batch, files = packed.batch, self.files
        tokens, position = np.asarray(batch.tokens), np.asarray(batch.position)
        mask = np.array(batch.loss_mask)
        states = np.zeros((*tokens.shape, files.aux_layers + 1, files.hidden_size), np.float32)
        for number in np.unique(packed.document[packed.document >= 0]):
            here = packed.document == number
            found = self.read(int(number))
            if found is None:
                mask[here] = False
            else:
                states[here] = found[position[here]]
        fetched = TargetStates(states[:, :, :-1].reshape(*tokens.shape, -1), states[:, :, -1])
        return packed._replace(batch=batch._replace(loss_mask=mask)), fetched

    def read(self, number: int) -> np.ndarray | None:
        """The states of one row, or None when its file is broken."""
        if number in self.broken:
            return None
        try:
            return read_states(self.files, number)
        except ValueError as error:
            self.skip(number, error)
            return None

    def skip(self, number: int, error: ValueError) -> None:
        """Count a broken file; raise ValueError when there are too many."""
        self.broken[number] = str(error)
        if len(self.broken) > self.share * len(self.rows):
            raise ValueError(
                f"{error} {len(self.broken)} of {len(self.rows)} files are broken, more than "
                f"bad_states {self.share:.0%} allows."
            )
        self.say(f"skipped: {error} ({len(self.broken)} of {len(self.rows)} so far)")


def check_header(files: Files, number: int, row: Row) -> None:
    """Raise ValueError unless a file is of this row's tokens and of the sizes expected."""
    ids, shape = read_header(files.path(number))
    if not np.array_equal(ids, row.tokens):
        raise ValueError(
            f"{files.path(number)} holds states of {len(ids)} other tokens than row {number} of "
            f"the data ({len(row.tokens)} tokens); write the files from this data with this "
            "tokenizer."
        )
    wanted = (len(ids), files.aux_layers + 1, files.hidden_size)
    if shape != wanted:
        raise ValueError(
            f"hidden states {files.path(number)} have shape {list(shape)} instead of "
            f"{list(wanted)}; the draft's aux layers and the target must be those the files "
            "were made with."
        )


def compare(files: Files, number: int, row: Row, target: Target, params: Any) -> None:
    """Raise ValueError when a file's states are not this target's."""
    tokens = row.tokens[None]
    order = np.arange(tokens.shape[1])[None]
    own = fetch(jax.jit(target.forward)(params, tokens, np.ones_like(tokens), order))
    aux = np.asarray(own.aux_hidden, np.float32)[0].reshape(tokens.shape[1], files.aux_layers, -1)
    last = np.asarray(own.final_hidden, np.float32)[0, :, None]
    wanted = np.concatenate([aux, last], axis=1)
    error = np.square(read_states(files, number) - wanted).mean(axis=(0, 2))
    error = np.sqrt(error / np.square(wanted).mean(axis=(0, 2)))
    if error.max() > FAR:
        raise ValueError(
            f"the states in {files.path(number)} differ from the target's by "
            f"{', '.join(f'{x:.0%}' for x in error)} in aux layers "
            f"{list(target.config.aux_layer_ids)} and after the last layer; make the files with "
            "this target, these layers and no final norm."
        )


def read_header(path: Path) -> tuple[np.ndarray, tuple[int, ...]]:
    """(token ids, shape of the states) without reading the states."""
    try:
        with safe_open(path, framework="numpy") as file:
            shape = tuple(file.get_slice("hidden_states").get_shape())
            return np.asarray(file.get_tensor("token_ids")), shape
    except (OSError, SafetensorError) as error:
        raise ValueError(f"hidden states {path} cannot be read: {error}.") from error


def read_states(files: Files, number: int) -> np.ndarray:
    """[S, A + 1, D] of one conversation, in float32."""
    path = files.path(number)
    try:
        with safe_open(path, framework="flax") as file:
            hidden = np.asarray(file.get_tensor("hidden_states"), np.float32)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"hidden states {path} cannot be read: {error}.") from error
    if not np.isfinite(hidden).all():
        raise ValueError(f"hidden states {path} are not finite; make the file again.")
    return hidden
