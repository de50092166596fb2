"""A target's parameters as an Orbax checkpoint: as they lie in memory, restored onto any mesh.

Safetensors have to be cut, transposed, joined and stacked; here every parameter is one array in its
final layout, of which each process reads what its devices hold. FP8 stays as it was published.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dspark_jax import sharding
from dspark_jax.checkpoints.fingerprint import RECORD
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import TargetConfig
from dspark_jax.fp8 import BlockScaled
from dspark_jax.targets.load import SCALES, check_blocks, decoded, kept_type, load_params
from dspark_jax.targets.mesh import family
from dspark_jax.targets.weights import shape_of

ARRAYS = "orbax"
"""Folder of the arrays, in a target's own folder."""
CHUNK_BYTES = 64 << 20
"""Largest piece that is read whole, so that a mesh with smaller parts reads little in vain."""


def is_saved(folder: Path) -> bool:
    """Whether a target's folder holds its weights as Orbax arrays."""
    return (folder / RECORD).is_file()


def check_weights(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise ValueError when a folder holds no weights that can be read, by their headers."""
    quantisation(described)
    if not is_saved(folder):
        stored_tensors(folder)


def read_params(
    config: TargetConfig,
    folder: Path,
    described: Mapping[str, Any],
    mesh: Mesh,
    dtype: Any = jnp.float32,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Any:
    """The parameters in a target's folder, of Orbax arrays where it holds them, else safetensors.

    Both give the same bits; see `load_params`. Raises ValueError as that does, and when the arrays
    are not those of this config.
    """
    if is_saved(folder):
        return restore_params(config, folder, mesh, dtype)
    block, stored = quantisation(described), stored_tensors(folder)
    return load_params(config, stored, block, mesh, dtype, progress)


def save_params(folder: Path, params: Any, about: Mapping[str, Any]) -> None:
    """Write parameters, and beside them what is said about them; the folder must have neither."""
    arrays, blocks = {}, {}
    for path, param in nnx.to_flat_state(params):
        name, value = _name(path), param[...]
        if isinstance(value, BlockScaled):
            blocks[name] = list(value.block)
            # Which types a store knows is its own affair: FP8 is kept as plain bytes.
            arrays[name] = jax.lax.bitcast_convert_type(value.values, jnp.uint8)
            arrays[name + SCALES] = value.scales
        else:
            arrays[name] = value
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays)
    # Weights hardly compress, and reading them would wait for the decompressor.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(arrays, save_args=options)
        checkpointer.save(folder.resolve() / ARRAYS, args=args)
    types = {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()}
    record = {**about, "blocks": blocks, "arrays": types}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def restore_params(config: TargetConfig, folder: Path, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """The parameters in `dtype`, spread over a mesh of data x tensor devices.

    Raises ValueError when the arrays are not those of this config, or cannot be read.
    """
    record = read_record(folder)
    shapes = dict(nnx.to_flat_state(nnx.state(shape_of(config), nnx.Param)))
    _check(folder, record, {_name(path): param.shape for path, param in shapes.items()})
    blocks = {name: tuple(block) for name, block in record["blocks"].items()}
    wanted = {}
    for path, param in shapes.items():
        name = _name(path)
        kind = jnp.uint8 if name in blocks else kept_type(path, dtype)
        wanted[name] = _array(config, mesh, path, param.shape, kind)
        if name in blocks:
            scales = tuple(record["arrays"][name + SCALES][0])
            wanted[name + SCALES] = _array(config, mesh, (*path, SCALES), scales, jnp.float32)
            _check_blocks(mesh, name, wanted, blocks[name])
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(
                folder.resolve() / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
                ),
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / ARRAYS} cannot be read ({str(error).splitlines()[0]}); make it again with "
            "`convert target`."
        ) from error
    for name, block in blocks.items():
        values = jax.lax.bitcast_convert_type(arrays[name], jnp.float8_e4m3fn)
        arrays[name] = BlockScaled(values, arrays.pop(name + SCALES), block)
    restored = [(path, param.replace(arrays[_name(path)])) for path, param in shapes.items()]
    return decoded(config, nnx.from_flat_state(restored), mesh, dtype)


def read_record(folder: Path) -> dict[str, Any]:
    """What the arrays were made of; ValueError when that cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if isinstance(record["blocks"], dict) and isinstance(record["arrays"], dict):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder / RECORD} is broken; make the folder again with `convert target`.")


def _check(folder: Path, record: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(kind[0]) for name, kind in record["arrays"].items()}
    plain = {name: shape for name, shape in found.items() if not name.endswith(SCALES)}
    if plain != dict(wanted):
        other = sorted(n for n in plain.keys() | wanted.keys() if plain.get(n) != wanted.get(n))
        raise ValueError(
            f"{len(other)} arrays of {folder / ARRAYS} do not fit its config.json: "
            f"{', '.join(other[:8])}; make it again with `convert target`."
        )


def _check_blocks(
    mesh: Mesh, name: str, wanted: Mapping[str, jax.ShapeDtypeStruct], block: tuple[int, int]
) -> None:
    values, scales = wanted[name], wanted[name + SCALES]
    kept = {(name,): (values.shape, values.dtype), (name, SCALES): (scales.shape, scales.dtype)}
    places = {(name,): values.sharding, (name, SCALES): scales.sharding}
    check_blocks(mesh, [(name,)], kept, places, block[::-1])  # pyright: ignore[reportArgumentType]


def _array(
    config: TargetConfig, mesh: Mesh, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any
) -> jax.ShapeDtypeStruct:
    spec = sharding.spec(mesh, [str(part) for part in path], shape, family(config))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
