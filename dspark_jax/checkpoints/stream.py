"""A checkpoint straight into sharded device arrays, a few tensors at a time."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Shaped

from dspark_jax.checkpoints.read import read
from dspark_jax.checkpoints.rounds import (
    Parameters,
    ParamPath,
    Part,
    Placement,
    Round,
    parts,
    plan_rounds,
)

SCALES = "weight_scale_inv"
READERS = 4
READ_AHEAD_BYTES = 64 << 20
"""Host memory for data on its way to the devices, where no single tensor needs more."""


class _Reading(NamedTuple):
    """A part on its way from the disk."""

    part: Part
    data: Future[np.ndarray]


def stream(
    placements: Iterable[Placement],
    params: Parameters,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> dict[ParamPath, Shaped[Array, "..."]]:
    """Every parameter, filled from its tensors, in its own type and sharding.

    Each process reads only what its devices hold and tells `progress` of those bytes. Placements
    must fill every parameter exactly. Raises ValueError when a file cannot be read and, before
    anything is allocated, when a `weight_scale_inv` is not finite and positive.
    """
    rounds = plan_rounds(placements, params)
    wanted = [part for round_ in rounds for part in parts(round_)]
    done_bytes, total_bytes = 0, sum(part.nbytes for part in wanted)
    program = functools.cache(writer)
    with ThreadPoolExecutor(READERS) as pool:
        _check_scales(wanted, pool)
        arrays = _zeros(params)
        on_devices = _put_all(wanted, pool)
        for round_ in rounds:
            pieces: list[jax.Array] = []
            for part in parts(round_):
                pieces += next(on_devices)
                done_bytes += part.nbytes
                progress(done_bytes, total_bytes)
            write = program(
                params[round_.path].sharding, round_.sharding, round_.axes, round_.transpose
            )
            arrays[round_.path] = _write(write, arrays.pop(round_.path), round_, pieces)
    return {path: arrays[path] for path in params}


def _check_scales(wanted: Sequence[Part], pool: Executor) -> None:
    """Refuse scales that no quantiser writes."""
    scales = [part for part in wanted if part.stored.name.endswith(SCALES)]
    for part, wrong in zip(scales, pool.map(_wrong_scale, scales), strict=True):
        if wrong is not None:
            raise ValueError(
                f"tensor {part.stored.name} of {part.stored.path} holds {wrong} where scales are "
                "finite and positive; download the file again, or ask whoever quantised the model."
            )


def _wrong_scale(part: Part) -> float | None:
    """The first scale that is not finite and positive."""
    scales = read(part.stored, part.box).astype(np.float32)
    wrong = scales[~(np.isfinite(scales) & (scales > 0))]
    return float(wrong[0]) if wrong.size else None


def _zeros(params: Parameters) -> dict[ParamPath, jax.Array]:
    made = jax.jit(
        lambda: [jnp.zeros(param.shape, param.dtype) for param in params.values()],
        out_shardings=[param.sharding for param in params.values()],
    )()
    return dict(zip(params, made, strict=True))


def _put_all(wanted: Iterable[Part], pool: Executor) -> Iterator[list[jax.Array]]:
    """Each part's cuts on their devices, in order; later ones are read meanwhile."""
    waiting: deque[_Reading] = deque()
    held_bytes = 0
    for part in wanted:
        while waiting and held_bytes + part.nbytes > READ_AHEAD_BYTES:
            ready_bytes = waiting[0].part.nbytes
            yield _put(waiting.popleft())
            held_bytes -= ready_bytes
        waiting.append(_Reading(part, pool.submit(read, part.stored, part.box)))
        held_bytes += part.nbytes
    while waiting:
        yield _put(waiting.popleft())


def _put(reading: _Reading) -> list[jax.Array]:
    """The cuts on their devices; host memory is free again when this returns."""
    part, data = reading.part, reading.data.result()
    cuts = [jax.device_put(data[cut], device) for device, cut in part.cuts.items()]
    return jax.block_until_ready(cuts)


def _write(
    write: jax.stages.Wrapped, param: Array, round_: Round, pieces: list[jax.Array]
) -> Array:
    update = jax.make_array_from_single_device_arrays(round_.shape, round_.sharding, pieces)
    # Were writes only queued, their updates would pile up in the queue.
    return jax.block_until_ready(write(param, update, np.array(round_.start, np.int32)))


def writer(
    sharding: NamedSharding, update: NamedSharding, axes: tuple[int, ...], transpose: bool
) -> jax.stages.Wrapped:
    """A program that writes a round's update into a parameter, whose memory it takes over."""

    def write(
        param: Shaped[Array, "..."], update: Shaped[Array, "..."], start: Int32[Array, "axes"]
    ) -> Shaped[Array, "..."]:
        tensor = update.reshape(update.shape[len(axes) :])
        tensor = (tensor.T if transpose else tensor).astype(param.dtype)
        place: list[int | Array] = [0] * param.ndim
        for i, axis in enumerate(axes):
            place[axis] = start[i]
        # As plain bits: XLA's CPU compiler would widen a whole bfloat16 or FP8 parameter and back.
        bits = jnp.dtype(f"uint{8 * param.dtype.itemsize}")
        old, new = param.view(bits), jnp.expand_dims(tensor, axes).view(bits)
        return jax.lax.dynamic_update_slice(old, new, place).view(param.dtype)

    mapped = jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, update.spec, PartitionSpec()),
        out_specs=sharding.spec,
    )
    return jax.jit(mapped, donate_argnums=0)
