"""A target's parameters as an Orbax checkpoint: as they lie in memory, restored onto any mesh.

Safetensors have to be cut, transposed, joined and stacked; here every parameter is one array in its
final layout, of which each process reads what its devices hold. FP8 stays as it was published.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dspark_jax import sharding
from dspark_jax.checkpoints.checksums import checksums
from dspark_jax.checkpoints.fingerprint import RECORD, read_record
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import TargetConfig
from dspark_jax.fp8 import BlockScaled
from dspark_jax.targets.load import (
    SCALES,
    check_blocks,
    decoded,
    kept_type,
    load_params,
    scale_shape,
)
from dspark_jax.targets.mesh import family
from dspark_jax.targets.weights import shape_of

ARRAYS = "orbax"
"""Folder of the arrays, in a target's own folder."""
CHUNK_BYTES = 64 << 20
"""Largest piece that is read whole, so that a mesh with smaller parts reads little in vain."""

BATCH_BYTES = 4 << 30
"""Read at a time, on all devices together, before it is compared and cast."""
FLOATS = ("bfloat16", "float16", "float32")


def is_saved(folder: Path) -> bool:
    """Whether a target's folder holds its weights as Orbax arrays."""
    return (folder / RECORD).is_file()


def check_weights(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise ValueError when a folder holds no weights that can be read, by their headers."""
    quantisation(described)
    if is_saved(folder):
        read_record(folder)
    else:
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

    Both give the same bits where the arrays hold the stored types, as `convert target` makes them
    unless told otherwise; see `load_params`. Raises ValueError as that does, and when the arrays
    are not those of this config or not what was saved.
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
    record = {**about, "blocks": blocks, "arrays": types, "checksums": _sums(arrays)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def restore_params(config: TargetConfig, folder: Path, mesh: Mesh, dtype: Any = jnp.float32) -> Any:
    """The parameters in `dtype`, spread over a mesh of data x tensor devices.

    Raises ValueError when the arrays are not those of this config, cannot be read, or are not what
    was saved.
    """
    record = read_record(folder)
    shapes = dict(nnx.to_flat_state(nnx.state(shape_of(config), nnx.Param)))
    _check(folder, record, {_name(path): param.shape for path, param in shapes.items()})
    blocks = {name: tuple(block) for name, block in record["blocks"].items()}
    saved, kinds = {}, {}
    for path, param in shapes.items():
        name = _name(path)
        kinds[name] = jnp.dtype(jnp.uint8 if name in blocks else kept_type(path, dtype))
        saved[name] = _array(config, mesh, path, param.shape, record["arrays"][name][1])
        if name in blocks:
            scales = tuple(record["arrays"][name + SCALES][0])
            kinds[name + SCALES] = jnp.dtype(jnp.float32)
            saved[name + SCALES] = _array(config, mesh, (*path, SCALES), scales, jnp.float32)
            _check_blocks(mesh, name, saved, blocks[name])
    arrays = _restored(folder, saved, kinds, record.get("checksums"))
    for name, block in blocks.items():
        values = jax.lax.bitcast_convert_type(arrays[name], jnp.float8_e4m3fn)
        arrays[name] = BlockScaled(values, arrays.pop(name + SCALES), block)
    restored = [(path, param.replace(arrays[_name(path)])) for path, param in shapes.items()]
    return decoded(config, nnx.from_flat_state(restored), mesh, dtype)


def _restored(
    folder: Path,
    saved: Mapping[str, jax.ShapeDtypeStruct],
    kinds: Mapping[str, Any],
    sums: Mapping[str, int] | None,
) -> dict[str, Any]:
    """The arrays in the types `kinds`, compared with `sums` in those that they are saved in.

    A few are read at a time, so that little of the saved types is held beside the wanted ones.
    """
    arrays: dict[str, Any] = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for some in _batches(saved):
            restore_args = ocp.checkpoint_utils.construct_restore_args(some)
            args = ocp.args.PyTreeRestore(some, restore_args=restore_args, partial_restore=True)
            try:
                found = checkpointer.restore(folder.resolve() / ARRAYS, args=args)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # whatever reads a damaged file raises what it likes
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise ValueError(
                    f"{folder / ARRAYS} cannot be read ({reason}); make it again with "
                    "`convert target`."
                ) from error
            if sums is not None:
                _compare(folder, found, sums)
            arrays |= {name: found.pop(name).astype(kinds[name]) for name in some}
    return arrays


def _batches(saved: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, Any]]:
    """All arrays in order, together at most `BATCH_BYTES` or one that is larger."""
    some, held_bytes = {}, 0
    for name, array in saved.items():
        size = math.prod(array.shape) * array.dtype.itemsize
        if some and held_bytes + size > BATCH_BYTES:
            yield some
            some, held_bytes = {}, 0
        some[name] = array
        held_bytes += size
    yield some


def _compare(folder: Path, found: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    for name, one in _sums(found).items():
        if one != sums[name]:
            raise ValueError(
                f"{name} in {folder / ARRAYS} has checksum {one} but {sums[name]} was saved; make "
                "it again with `convert target`."
            )


def _sums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Every array's checksum."""
    names = sorted(arrays)
    return dict(zip(names, checksums([arrays[name] for name in names]), strict=True))


def _check(folder: Path, record: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError on arrays, and on scales and types, that a target of this config has not."""
    expected = {name: (shape, "a float") for name, shape in wanted.items()}
    for name, (rows, columns) in record["blocks"].items():
        if name in wanted and len(wanted[name]) > 1:
            expected[name] = (wanted[name], "uint8")
            scales = scale_shape(wanted[name], (columns, rows))
            expected[name + SCALES] = (scales, "float32")
    found = {
        name: (tuple(shape), "a float" if kind in FLOATS and not name.endswith(SCALES) else kind)
        for name, (shape, kind) in record["arrays"].items()
    }
    names = found.keys() | expected.keys() | record["blocks"].keys()
    other = sorted(n for n in names if n not in expected or found.get(n) != expected[n])
    if other:
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
