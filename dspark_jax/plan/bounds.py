"""How fast a step can be at best, and what would make it fit."""

from typing import NamedTuple

from dspark_jax.plan.chips import Chip
from dspark_jax.plan.hlo.cost import Cost

Number = int | float
"""Of bytes or operations: whole where they are counted, not where they are expected."""


class Bound(NamedTuple):
    """Seconds of a step on a device that is always busy with the slower of moving and computing.

    Exchanges come on top: their time is rarely hidden in a decode step.
    """

    moving: float
    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        return max(self.moving, self.computing) + self.exchanging


def bound(chip: Chip, moved: Number, flops: Number, fp8_flops: Number, sent: Number) -> Bound:
    """Of so many bytes and operations on one device."""
    computing = (flops - fp8_flops) / chip.bf16_flops + fp8_flops / chip.fp8_flops
    exchanging = sent / chip.interconnect_bytes_per_second
    return Bound(moved / chip.bytes_per_second, computing, exchanging)


def accounted(chip: Chip, cost: Cost) -> Bound:
    """Of a compiled program."""
    return bound(chip, cost.bytes, cost.flops, cost.fp8_flops, sent_bytes(cost))


def sent_bytes(cost: Cost) -> int:
    """Bytes that a device sends in a step."""
    return sum(one.sent * one.times for one in cost.collectives)


class Remedies(NamedTuple):
    """Each alone makes the plan fit; 0 where it alone cannot."""

    devices: int
    batch: int
    context: int


def remedies(
    available: Number,
    weights: Number,
    cache: Number,
    temporaries: Number,
    sizes: tuple[int, int, int],
) -> Remedies:
    """From bytes per device now, with `sizes` = (devices, batch, context).

    Devices are doubled until it fits, as machines come. Assumes that weights and caches spread
    over more devices evenly, that caches and temporaries grow with the batch, and caches with the
    context.
    """
    devices, batch, context = sizes
    needed = weights + cache + temporaries
    more = 1 << (-(-int(needed * devices) // int(available)) - 1).bit_length()
    left = max(0.0, available - weights)
    fewer = int(batch * left / (cache + temporaries)) if cache + temporaries else 0
    shorter = int(context * max(0.0, left - temporaries) / cache) if cache else 0
    return Remedies(more, fewer, shorter)
