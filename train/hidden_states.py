"""Where a draft's training gets the target's hidden states: the one replaceable part.

A source is two functions. `fetch(packed)` runs on the host and returns arrays for the step;
`states(target_params, batch, fetched)` runs inside the compiled step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dspark_jax.train.packing import Packed
from dspark_jax.types import Batch, Target, TargetStates


class HiddenStates(NamedTuple):
    """A source of `TargetStates` for packed batches."""

    fetch: Callable[[Packed], Any]
    states: Callable[[Any, Batch, Any], TargetStates]


def in_process(target: Target) -> HiddenStates:
    """The target runs in the same program as the draft; nothing is stored."""

    def states(params: Any, batch: Batch, fetched: None) -> TargetStates:
        return target.forward(params, batch.tokens, batch.segment, batch.position)

    return HiddenStates(lambda packed: None, states)


def from_files(folder: Path, aux_layers: int, hidden_size: int) -> HiddenStates:
    """`hs_{i}.safetensors` as speculators writes them, i the conversation's number in the data.

    A file holds `token_ids [S]` and `hidden_states [S, A + 1, D]`: the aux states, then the state
    after the last layer before its norm. Raises ValueError on a file that is not of this data.
    """

    def fetch(packed: Packed) -> TargetStates:
        tokens, position = np.asarray(packed.batch.tokens), np.asarray(packed.batch.position)
        states = np.zeros((*tokens.shape, aux_layers + 1, hidden_size), np.float32)
        for number in np.unique(packed.document[packed.document >= 0]):
            here = packed.document == number
            ids, hidden = _read(folder / f"hs_{number}.safetensors", aux_layers, hidden_size)
            place = position[here]
            if place.max() >= len(ids) or (ids[place] != tokens[here]).any():
                raise ValueError(
                    f"{folder / f'hs_{number}.safetensors'} holds states of {len(ids)} other "
                    f"tokens than conversation {number} of the data ({place.max() + 1} tokens); "
                    "write the files from this data with this tokenizer."
                )
            states[here] = hidden[place]
        return TargetStates(states[:, :, :-1].reshape(*tokens.shape, -1), states[:, :, -1])

    return HiddenStates(fetch, lambda params, batch, fetched: fetched)


def _read(path: Path, aux_layers: int, hidden_size: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with safe_open(path, framework="flax") as file:
            ids = np.asarray(file.get_tensor("token_ids"))
            hidden = np.asarray(file.get_tensor("hidden_states"), np.float32)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"hidden states {path} cannot be read: {error}.") from error
    wanted = (len(ids), aux_layers + 1, hidden_size)
    if hidden.shape != wanted:
        raise ValueError(
            f"hidden states {path} have shape {list(hidden.shape)} instead of {list(wanted)}; "
            "the draft's aux layers and the target must be those the files were made with."
        )
    if not np.isfinite(hidden).all():
        raise ValueError(f"hidden states {path} are not finite; make the file again.")
    return ids, hidden
