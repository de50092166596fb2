"""Embedding and head of a target that is kept as Orbax arrays; nothing else of it is read."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dspark_jax.convert.tensors import CODES, Outgoing
from dspark_jax.targets.orbax import ARRAYS, read_record

TABLES = {
    "embed_tokens": ("model.embed_tokens.weight", False),
    "lm_head.kernel": ("lm_head.weight", True),
}
"""An array: the tensor of safetensors that it is, and whether it lies transposed."""
ROWS = 4096


def saved_tables(folder: Path) -> dict[str, Outgoing]:
    """Both tables by their names in safetensors, or the one that is there where they are tied.

    They are read when their pieces are asked for.
    """
    arrays, found = read_record(folder)["arrays"], {}
    for array, (name, transposed) in TABLES.items():
        if array in arrays:
            shape, dtype = arrays[array]
            shape = tuple(reversed(shape) if transposed else shape)
            pieces = partial(table_pieces, folder, array, transposed)
            found[name] = Outgoing(name, CODES[jnp.dtype(dtype)], shape, pieces)
    return found


def table_pieces(folder: Path, array: str, transposed: bool) -> Iterator[np.ndarray]:
    """One array in runs of whole rows; ValueError when it is unreadable or not finite."""
    value = read_array(folder, array)
    value = value.T if transposed else value
    for start in range(0, len(value), ROWS):
        piece = np.ascontiguousarray(value[start : start + ROWS])
        if not np.isfinite(piece.astype(np.float32)).all():
            raise ValueError(
                f"array {array} of {folder / ARRAYS} holds numbers that are NaN or infinite; use "
                "another copy of this target."
            )
        yield piece


def read_array(folder: Path, array: str) -> np.ndarray:
    """One array, whole, in the host's memory; ValueError when it cannot be read."""
    wanted = {array: ocp.RestoreArgs(restore_type=np.ndarray)}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                folder.resolve() / ARRAYS,
                args=ocp.args.PyTreeRestore({array: 0}, restore_args=wanted, partial_restore=True),
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / ARRAYS} cannot be read ({str(error).splitlines()[0]}); make it again with "
            "`convert target`."
        ) from error
    return np.asarray(restored[array])
