"""Which stored tensors are written together, and which part of each the devices here need.

A parameter may be spread over the very axis that its tensors are stacked on, as experts are. Then
one tensor lies on some of the devices only. A round takes one tensor for every shard of such axes,
all with the same place inside their shard: every device gets one tensor's part, reads no other, and
writes it where all others write theirs.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.read import needed_bytes

Index = tuple[slice, ...]
Device = Any  # jax.Device, which type checkers take for a variable
Cut = tuple[slice | None, ...]
"""Index into what was read; each None is a stacked axis, which the update has in front."""
ParamPath = tuple[Any, ...]
Parameters = Mapping[ParamPath, jax.ShapeDtypeStruct]
"""Shape, type and `NamedSharding` of every parameter."""


class Placement(NamedTuple):
    """Where a stored tensor goes: into parameter `path`, at `place`, transposed or as it is."""

    stored: Stored
    path: ParamPath
    place: tuple[int | slice, ...]
    """A number per stacked axis, such as (repeat, expert); `slice(None)` for an axis between."""
    transpose: bool


class Round(NamedTuple):
    """Tensors of one parameter that are written at once, by their shard of the stacked axes."""

    path: ParamPath
    axes: tuple[int, ...]
    """The parameter's stacked axes."""
    start: tuple[int, ...]
    """Place on these axes inside each shard."""
    transpose: bool
    members: dict[tuple[int, ...], Stored]
    shape: tuple[int, ...]
    """Of the update: a shard per stacked axis, then the stored tensor's own axes."""
    sharding: NamedSharding


class Part(NamedTuple):
    """One range of bytes that a process reads, and the cuts of it that its devices hold."""

    stored: Stored
    box: Index
    cuts: dict[Device, Cut]

    @property
    def nbytes(self) -> int:
        """Bytes that reading it takes."""
        return needed_bytes(self.stored, self.box)


def plan_rounds(placements: Iterable[Placement], params: Parameters) -> list[Round]:
    """All rounds, in the order in which their tensors lie in the files."""
    rounds: dict[tuple[ParamPath, tuple[int, ...]], Round] = {}
    for placement in placements:
        shard, round_ = _round(placement, params[placement.path])
        round_ = rounds.setdefault((round_.path, round_.start), round_)
        assert shard not in round_.members, f"{placement.stored.name} has another's place"
        round_.members[shard] = placement.stored
    _check_whole(rounds.values(), params)
    return sorted(
        rounds.values(), key=lambda r: min((s.path, s.offset) for s in r.members.values())
    )


def parts(round_: Round) -> list[Part]:
    """What this process reads for a round: the same bytes once, however many devices hold them."""
    layout = _layout(round_.sharding, round_.shape, len(round_.axes))
    return [Part(round_.members[shard], box, cuts) for shard, box, cuts in layout]


@functools.cache  # a model has a hundred thousand tensors in a few dozen layouts
def _layout(
    sharding: NamedSharding, shape: tuple[int, ...], stacked: int
) -> list[tuple[tuple[int, ...], Index, dict[Device, Cut]]]:
    """Shard, box and cuts of every range of rows that the devices here hold of an update."""
    needs: dict[tuple[tuple[int, ...], tuple[int, int]], dict[Device, Index]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        whole = tuple(slice(*part.indices(n)) for part, n in zip(index, shape, strict=True))
        shard, cut = tuple(part.start for part in whole[:stacked]), whole[stacked:]
        rows = (cut[0].start, cut[0].stop) if cut else (0, 1)
        needs.setdefault((shard, rows), {})[device] = cut
    found = []
    for (shard, _), cuts in needs.items():
        axes = zip(*cuts.values(), strict=True)
        box = tuple(slice(min(c.start for c in a), max(c.stop for c in a)) for a in axes)
        front = (None,) * stacked
        inside = {device: (*front, *_relative(cut, box)) for device, cut in cuts.items()}
        found.append((shard, box, inside))
    return found


def _round(placement: Placement, param: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], Round]:
    """A round without members, and the shard that this placement is in."""
    stored, path, place, transpose = placement
    sharding = param.sharding
    assert isinstance(sharding, NamedSharding), f"{path} has no NamedSharding"
    spec = (*sharding.spec, *(None,) * (len(param.shape) - len(sharding.spec)))
    numbers = {i: part for i, part in enumerate(place) if not isinstance(part, slice)}
    axes = tuple(numbers)
    kept = [i for i in range(len(param.shape)) if i not in axes]
    kept = kept[::-1] if transpose else kept
    expected = tuple(param.shape[i] for i in kept)
    assert stored.shape == expected, f"{stored.name} is {stored.shape}, its place is {expected}"
    local = sharding.shard_shape(param.shape)
    spots = [divmod(number, local[i]) for i, number in numbers.items()]
    counts = tuple(param.shape[i] // local[i] for i in axes)
    return tuple(shard for shard, _ in spots), Round(
        path,
        axes,
        tuple(start for _, start in spots),
        transpose,
        {},
        (*counts, *stored.shape),
        NamedSharding(sharding.mesh, PartitionSpec(*(spec[i] for i in (*axes, *kept)))),
    )


def _relative(cut: Index, box: Index) -> Index:
    return tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(cut, box, strict=True))


def _check_whole(rounds: Iterable[Round], params: Parameters) -> None:
    filled = dict.fromkeys(params, 0)
    for round_ in rounds:
        assert len(round_.members) == math.prod(round_.shape[: len(round_.axes)]), round_.path
        filled[round_.path] += sum(math.prod(s.shape) for s in round_.members.values())
    short = [path for path, size in filled.items() if size != math.prod(params[path].shape)]
    assert not short, f"parameters that no tensors fill: {short}"
