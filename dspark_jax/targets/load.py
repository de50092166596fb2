"""A target's checkpoint, streamed into device arrays.

FP8 blocks stay as they are stored; of a target small enough to be laid out anew for decoding they
are multiplied out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dspark_jax import sharding
from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.quantisation import STORED_FP8
from dspark_jax.checkpoints.rounds import ParamPath, Placement
from dspark_jax.checkpoints.stream import stream
from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.fp8 import BlockScaled, dequantise
from dspark_jax.sharding import DATA, TENSOR
from dspark_jax.targets.decoder import is_compact
from dspark_jax.targets.mesh import family
from dspark_jax.targets.weights import Entry, check_tensors, entries, shape_of

SCALES = "_scale_inv"
FP8 = jnp.dtype(jnp.float8_e4m3fn)


def load_params(
    config: TargetConfig,
    stored: Mapping[str, Stored],
    block: tuple[int, int] | None,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    as_stored: bool = False,
) -> Any:
    """The parameters of a target in `dtype`, spread over a mesh of data x tensor devices.

    FP8 ones stay `BlockScaled`, unless the target is small.

    Args:
        stored: What the checkpoint holds, from `stored_tensors`.
        block: Rows and columns [out, in] of a weight that share a scale, from `quantisation`.
        dtype: None for the type that each parameter is stored in; only with `as_stored`.
        as_stored: Whether FP8 stays even where the target is small.

    Raises ValueError, before any data is read, that lists every tensor which is missing, extra,
    of another shape or of an unfitting type; then when scales are not finite or a file is cut off.
    """
    table = list(entries(config))
    check_fp8(table, stored)
    quantised = {e.path for e in table if e.name in stored and stored[e.name].dtype == FP8}
    scales = [scale_of(e, block) for e in table if e.path in quantised] if block else []
    wanted = {e.name: e.shape for e in (*table, *scales)}
    check_tensors(config, wanted, {name: tensor.shape for name, tensor in stored.items()})
    check_types(table, scales, stored, quantised, block)
    shapes = dict(nnx.to_flat_state(nnx.state(shape_of(config), nnx.Param)))
    own = stored_types(table, stored)
    types = {path: kept_type(path, own[path] if dtype is None else dtype) for path in shapes}
    kept = {path: (param.shape, types[path]) for path, param in shapes.items()}
    kept |= {path: (shapes[path].shape, FP8) for path in quantised}
    if block:
        cut = {path: scale_shape(shapes[path].shape, block) for path in quantised}
        kept |= {(*path, SCALES): (shape, jnp.float32) for path, shape in cut.items()}
    places = {path: _place(config, mesh, path, shape) for path, (shape, _) in kept.items()}
    if block:
        check_blocks(mesh, quantised, kept, places, block)
    targets = {p: jax.ShapeDtypeStruct(*kept[p], sharding=places[p]) for p in kept}
    arrays: dict[ParamPath, Any] = stream(
        [placement(e, stored) for e in (*table, *scales)], targets, progress
    )
    for path in quantised:
        assert block is not None
        values, scales = arrays.pop(path), arrays.pop((*path, SCALES))
        arrays[path] = BlockScaled(values, scales, (block[1], block[0]))
    params = nnx.from_flat_state(
        [(path, param.replace(arrays[path])) for path, param in shapes.items()]
    )
    return params if as_stored else decoded(config, params, mesh, dtype)


def decoded(config: TargetConfig, params: Any, mesh: Mesh, dtype: Any) -> Any:
    """FP8 multiplied out where the target is small; else the parameters as they are."""
    if not is_multiplied_out(config, mesh):
        return params

    def plain(path: ParamPath, value: Any) -> Any:
        if not isinstance(value, BlockScaled):
            return value
        return _multiply_out(value, kept_type(path, dtype), value.values.sharding)

    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state(
        [(path, param.replace(plain(path, param[...]))) for path, param in flat]
    )


def is_multiplied_out(config: TargetConfig, mesh: Mesh) -> bool:
    """Whether a target is small enough to be kept without FP8."""
    return isinstance(config, GlmConfig) and is_compact(config, mesh)


def params_shapes(config: TargetConfig, block: tuple[int, int] | None, dtype: Any) -> Any:
    """Shapes of a target's parameters as they are loaded: FP8 where published files have FP8."""
    stored = {e.path for e in entries(config) if block and STORED_FP8.search(e.name)}

    def kept(path: Any, param: Any) -> Any:
        if block is None or path not in stored:
            return jax.ShapeDtypeStruct(param.shape, kept_type(path, dtype))
        scales = jax.ShapeDtypeStruct(scale_shape(param.shape, block), jnp.float32)
        return BlockScaled(jax.ShapeDtypeStruct(param.shape, FP8), scales, (block[1], block[0]))

    flat = nnx.to_flat_state(nnx.state(shape_of(config), nnx.Param))
    return nnx.from_flat_state([(path, param.replace(kept(path, param))) for path, param in flat])


def kept_type(path: ParamPath, dtype: Any) -> Any:
    """The type a parameter is kept in: the bias that chooses experts is always float32."""
    return jnp.float32 if path[-1] == "e_score_correction_bias" else dtype


def stored_types(
    table: Iterable[Entry], stored: Mapping[str, Stored]
) -> dict[ParamPath, jnp.dtype]:
    """The type of every parameter that holds all numbers of its tensors."""
    types: dict[ParamPath, jnp.dtype] = {}
    for entry in table:
        kind = stored[entry.name].dtype
        types[entry.path] = jnp.promote_types(kind, types.get(entry.path, kind))
    return types


def is_narrowed(config: TargetConfig, stored: Mapping[str, Stored], dtype: Any) -> bool:
    """Whether parameters kept in `dtype` lose bits of what is stored; FP8 stays as it is."""
    own = {p: t for p, t in stored_types(entries(config), stored).items() if t != FP8}
    kept = {path: jnp.dtype(kept_type(path, dtype)) for path in own}
    return any(jnp.promote_types(own[path], kept[path]) != kept[path] for path in own)


def blocks(shape: Iterable[int], block: Iterable[int]) -> tuple[int, ...]:
    """How many blocks cover a matrix; the last of an axis may be ragged."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def scale_shape(kernel: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The scales of a kernel [… in, out] in blocks [out, in]."""
    return (*kernel[:-2], *blocks(kernel[-2:], block[::-1]))


def scale_of(entry: Entry, block: tuple[int, int]) -> Entry:
    """The table's row of a quantised weight's scales."""
    path, shape = (*entry.path, SCALES), blocks(entry.shape, block)
    return entry._replace(name=entry.name + SCALES, shape=shape, path=path)


def placement(entry: Entry, stored: Mapping[str, Stored]) -> Placement:
    """Where a tensor of the table goes."""
    transposed = entry.layout == "transposed"
    return Placement(stored[entry.name], entry.path, entry.place, transposed)


def check_fp8(table: Iterable[Entry], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError that names the FP8 tensors which no product here takes as FP8."""
    fp8 = (e.name for e in table if e.name in stored and stored[e.name].dtype == FP8)
    if unfit := [name for name in fp8 if not STORED_FP8.search(name)]:
        raise ValueError(
            f"{len(unfit)} tensors are FP8 but only projections may be: {'; '.join(unfit)}; use a "
            "checkpoint that keeps them in bfloat16."
        )


def check_types(
    table: Iterable[Entry],
    scales: Iterable[Entry],
    stored: Mapping[str, Stored],
    quantised: set[ParamPath],
    block: tuple[int, int] | None,
) -> None:
    """Raise ValueError on weights whose type and scales do not go together."""
    if quantised and block is None:
        name = next(e.name for e in table if e.path in quantised)
        raise ValueError(
            f"{name} is FP8 but config.json has no quantization_config; use the model's own file."
        )
    problems = list(_mixed(table, stored, quantised))
    problems += [
        f"{e.name} is {stored[e.name].dtype}, no floating-point type"
        for e in scales
        if not jnp.issubdtype(stored[e.name].dtype, jnp.floating)
    ]
    if problems:
        raise ValueError(f"{len(problems)} tensors have an unfitting type: {'; '.join(problems)}.")


def _mixed(
    table: Iterable[Entry], stored: Mapping[str, Stored], quantised: set[ParamPath]
) -> Iterator[str]:
    """Weights that stand among FP8 ones without being FP8, and types that are no weights."""
    for entry in table:
        kind = stored[entry.name].dtype
        if entry.path in quantised and kind != FP8:
            yield f"{entry.name} is {kind} while others of its kind are FP8"
        elif not jnp.issubdtype(kind, jnp.floating):
            yield f"{entry.name} is {kind}, no floating-point type"


def check_blocks(
    mesh: Mesh | AbstractMesh,
    quantised: Iterable[ParamPath],
    kept: Mapping[ParamPath, tuple[tuple[int, ...], Any]],
    places: Mapping[ParamPath, NamedSharding],
    block: tuple[int, int],
) -> None:
    """Raise ValueError when a device's part of a kernel would end within a block."""
    for path in quantised:
        local = places[path].shard_shape(kept[path][0])
        scales = places[*path, SCALES].shard_shape(kept[*path, SCALES][0])
        if scales != scale_shape(local, block):
            raise ValueError(
                f"a mesh of {mesh.shape[DATA]} x {mesh.shape[TENSOR]} (data x tensor) devices "
                f"cuts blocks of {block[0]} x {block[1]} of {'.'.join(map(str, path))}, of which a "
                f"device would hold {list(local)}; use a smaller tensor_parallel."
            )


def _place(
    config: TargetConfig, mesh: Mesh, path: ParamPath, shape: tuple[int, ...]
) -> NamedSharding:
    names = [str(part) for part in path]
    return NamedSharding(mesh, sharding.spec(mesh, names, shape, family(config)))


def _multiply_out(scaled: BlockScaled, dtype: Any, place: NamedSharding) -> jax.Array:
    return jax.jit(dequantise, static_argnums=1, out_shardings=place)(scaled, dtype)
