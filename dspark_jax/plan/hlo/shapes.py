"""Types as optimised HLO writes them: `bf16[6,16]{1,0:T(8,128)(2,1)S(1)}`, and tuples of them."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
TILE = re.compile(r"T\(([\d,]+)\)")
SPACE = re.compile(r"S\((\d+)\)")


class Shape(NamedTuple):
    """An array: its type, its dimensions and how it lies in memory.

    `order` lists dimensions from the fastest to the slowest; `tile` is what the fastest ones are
    padded to; `space` is 0 in the device's main memory, 1 in a TPU's vector memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def packed_bytes(self) -> int:
        """Without what its layout adds."""
        return -(-self.elements * bits(self.dtype) // 8)

    @property
    def bytes(self) -> int:
        """As laid out: whole tiles, and bits rounded up."""
        sizes = [self.dims[i] for i in reversed(self.order)] or list(self.dims)
        if len(self.tile) <= len(sizes):
            for i, tile in enumerate(reversed(self.tile), start=1):
                sizes[-i] = -(-sizes[-i] // tile) * tile
        return -(-math.prod(sizes) * bits(self.dtype) // 8)

    @property
    def main_bytes(self) -> int:
        """Bytes in main memory: none for what lies in a memory of the core's own."""
        return self.bytes if self.space == 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Type: TypeAlias = Shape | tuple[Any, ...]
"""An array, or a tuple of types."""


def bits(dtype: str) -> int:
    """Bits of one element; none of a token."""
    if dtype == "pred":
        return 8
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 0


def parse_type(text: str, start: int = 0) -> tuple[Type, int]:
    """The type that begins at `start`, and where it ends."""
    if text[start] != "(":
        found = ARRAY.match(text, start)
        if found is None:
            raise ValueError(f"no HLO type in {text[start : start + 40]!r}.")
        return _array(*found.groups()), found.end()
    parts, at = [], start + 1
    while text[at] != ")":
        if text[at] in ", ":
            at += 1
            continue
        part, at = parse_type(text, at)
        parts.append(part)
    return tuple(parts), at + 1


def leaves(kind: Type) -> Iterator[Shape]:
    """The arrays of a type."""
    if isinstance(kind, Shape):
        yield kind
        return
    for part in kind:
        yield from leaves(part)


def main_bytes(kind: Type) -> int:
    """Bytes of a type's arrays that lie in main memory."""
    return sum(shape.main_bytes for shape in leaves(kind))


def _array(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    order, _, rest = (layout or "").partition(":")
    tile, space = TILE.search(rest), SPACE.search(rest)
    return Shape(
        dtype,
        sizes,
        tuple(int(i) for i in order.split(",") if i),
        tuple(map(int, tile.group(1).split(","))) if tile else (),
        int(space.group(1)) if space else 0,
    )
