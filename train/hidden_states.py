"""Where a draft's training gets the target's hidden states: the one replaceable part.

A source is two functions. `fetch(packed)` runs on the host and returns arrays for the step;
`states(target_params, batch, fetched)` runs inside the compiled step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from dspark_jax.train.conversations import Row
from dspark_jax.train.packing import Packed
from dspark_jax.types import Batch, Target, TargetStates

FAR = 0.1
"""Root mean square of what stored states differ by, relative to theirs, that no rounding explains:
bfloat16 and FP8 stay well below."""


class HiddenStates(NamedTuple):
    """A source of `TargetStates` for packed batches."""

    fetch: Callable[[Packed], Any]
    states: Callable[[Any, Batch, Any], TargetStates]


class Files(NamedTuple):
    """`hs_{i}.safetensors` as speculators writes them, i the conversation's number in the data.

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

    return HiddenStates(lambda packed: None, states)


def from_files(files: Files) -> HiddenStates:
    """States read from files that `check_files` has passed."""

    def fetch(packed: Packed) -> TargetStates:
        tokens, position = np.asarray(packed.batch.tokens), np.asarray(packed.batch.position)
        states = np.zeros((*tokens.shape, files.aux_layers + 1, files.hidden_size), np.float32)
        for number in np.unique(packed.document[packed.document >= 0]):
            here = packed.document == number
            states[here] = read_states(files, int(number))[position[here]]
        return TargetStates(states[:, :, :-1].reshape(*tokens.shape, -1), states[:, :, -1])

    return HiddenStates(fetch, lambda params, batch, fetched: fetched)


def check_files(files: Files, rows: Sequence[Row], target: Target, params: Any) -> None:
    """Raise ValueError unless there is a file of these tokens and sizes for every conversation.

    The first one's states are compared with the target's own, so that files of other layers, of
    another target or with a normed last state are found before they are trained on.
    """
    for number, row in enumerate(rows):
        ids, shape = read_header(files.path(number))
        if not np.array_equal(ids, row.tokens):
            raise ValueError(
                f"{files.path(number)} holds states of {len(ids)} other tokens than conversation "
                f"{number} of the data ({len(row.tokens)} tokens); write the files from this data "
                "with this tokenizer."
            )
        wanted = (len(ids), files.aux_layers + 1, files.hidden_size)
        if shape != wanted:
            raise ValueError(
                f"hidden states {files.path(number)} have shape {list(shape)} instead of "
                f"{list(wanted)}; the draft's aux layers and the target must be those the files "
                "were made with."
            )
    tokens = rows[0].tokens[None]
    order = np.arange(tokens.shape[1])[None]
    own = jax.jit(target.forward)(params, tokens, np.ones_like(tokens), order)
    aux = np.asarray(own.aux_hidden)[0].reshape(tokens.shape[1], files.aux_layers, -1)
    wanted = np.concatenate([aux, np.asarray(own.final_hidden)[0, :, None]], axis=1)
    error = np.square(read_states(files, 0) - wanted).mean(axis=(0, 2))
    error = np.sqrt(error / np.square(wanted).mean(axis=(0, 2)))
    if error.max() > FAR:
        raise ValueError(
            f"the states in {files.path(0)} differ from the target's by "
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
