"""Bytes per device: what is held for good, and what the compiler adds."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dspark_jax.plan.floor import Held

REFUSED = re.compile(r"total memory required[^(]*\(([\d.]+)([KMG])\)|Used ([\d.]+)([KMG]) of")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Memory(NamedTuple):
    """Bytes per device. `temporaries` are all beyond the arguments: what is computed and not yet
    used, results that reuse no argument's memory, code and padding. None when the compiler refused
    and did not say."""

    weights: int
    cache: int
    temporaries: int | None
    available: float

    @property
    def held(self) -> int:
        return self.weights + self.cache

    @property
    def total(self) -> int:
        return self.held + (self.temporaries or 0)

    @property
    def fits(self) -> bool:
        return self.temporaries is not None and self.total <= self.available


def shard_bytes(leaf: Any) -> int:
    """Of an array that is sharded, on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def tree_bytes(tree: Any) -> int:
    """Of a tree of sharded shapes, on one device."""
    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def held_weights(tree: Any) -> Iterator[Held]:
    """Every weight of a device with its place."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield Held(jax.tree_util.keystr(path), shard_bytes(leaf))


def beyond_arguments(stats: Any, argument_bytes: int) -> int:
    """What the compiler's memory analysis finds beyond arguments of these bytes.

    Arguments take more than their bytes where they are padded to tiles, and none where the program
    does not use them.
    """
    padding = max(0, stats.argument_size_in_bytes - argument_bytes)
    fresh = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return padding + fresh + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def refused_bytes(message: str) -> int | None:
    """What a compiler that refused says the program would need."""
    found = REFUSED.search(message)
    if found is None:
        return None
    number, unit = (found.group(1), found.group(2)) if found.group(1) else found.groups()[2:]
    return round(float(number) * UNITS[unit])
