"""Rows of a cache: written where they stand, overwritten rather than rolled back.

A cache is contiguous, [B, C …], or made of pages that sequences own in any order (`types.Rows`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from dspark_jax.types import Rows


class Cached(NamedTuple):
    """A layer's memory and the rows at hand: arrays [B C …], or [layers B C …] and a `layer`.

    Stacked arrays are written in place, row by row; to take a layer out and put it back would copy
    the whole cache at every step.
    """

    arrays: Any
    rows: Rows
    layer: Any = None

    def write(self, new: Any) -> "Cached":
        """With `new` [B S …] where the rows stand; what stands past the capacity is dropped."""
        size = jax.tree.leaves(self.arrays)[0].shape[len(self._front()) + 1]
        page, place = cells(self.rows, size)
        return self._set((*self._front(), page, place), new)

    def write_heads(self, new: Any) -> "Cached":
        """The same for arrays [… B H C …] and `new` [B S H …]."""
        size = jax.tree.leaves(self.arrays)[0].shape[len(self._front()) + 2]
        page, place = cells(self.rows, size)
        # Indices apart from one another put what they index in front: [B S H …].
        return self._set((*self._front(), page, slice(None), place), new)

    def read(self) -> Any:
        """This layer's arrays [N C …], as they are now."""
        if self.rows.pages is not None:
            return self._paged(self.rows.pages)
        if self.layer is None:
            return self.arrays
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), self.arrays
        )

    def read_heads(self) -> Any:
        """The same for arrays [… B H C …]: [N H C …]."""
        if self.rows.pages is None:
            return self.read()
        index = (*self._front(), self.rows.pages)
        return jax.tree.map(lambda x: side_by_side(x[index]), self.arrays)

    def read_rows(self, start: int, size: int) -> Any:
        """`size` rows of this layer's arrays [N C …] from `start` on, read where they lie."""
        if self.rows.pages is not None:
            page = jax.tree.leaves(self.arrays)[0].shape[len(self._front()) + 1]
            first, beyond = start // page, -(-(start + size) // page)
            read = self._paged(self.rows.pages[:, first:beyond])
            begin = start - first * page
            return jax.tree.map(lambda x: x[:, begin : begin + size], read)

        def cut(x: Array) -> Array:
            if self.layer is None:
                return jax.lax.dynamic_slice_in_dim(x, start, size, 1)
            begin = (self.layer, 0, start, *(0,) * (x.ndim - 3))
            shape = (x.shape[1], size, *x.shape[3:])
            return jax.lax.dynamic_slice(x, begin, (1, *shape)).reshape(shape)

        return jax.tree.map(cut, self.arrays)

    def as_pages(self) -> tuple[Any, Int[Array, "N P"]]:
        """(arrays [pages size …] of all layers, the pages of every sequence in this one)."""
        lead = len(self._front())
        arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead + 1 :]), self.arrays)
        count = jax.tree.leaves(self.arrays)[0].shape[lead]
        own = self.rows.pages
        own = jnp.arange(len(self.rows.position))[:, None] if own is None else own
        return arrays, own if self.layer is None else own + self.layer * count

    def blocks(self, flat: Any) -> Any:
        """Arrays [R 1 …] of flat rows as [N S …], as attention takes them; others stay."""
        return jax.tree.map(lambda x: to_blocks(self.rows, x), flat)

    def flat(self, blocks: Any) -> Any:
        """The way back."""
        return jax.tree.map(lambda x: to_flat(self.rows, x), blocks)

    def _front(self) -> tuple[Any, ...]:
        return () if self.layer is None else (self.layer,)

    def _set(self, index: tuple[Any, ...], new: Any) -> "Cached":
        def put(old: Array, rows: Array) -> Array:
            # Rows may be wider than what is kept in them (`ops.row_width`): zeros stand behind.
            behind = old.shape[-1] - rows.shape[-1]
            rows = jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, behind),)) if behind else rows
            return old.at[index].set(rows.astype(old.dtype), mode="drop")

        return self._replace(arrays=jax.tree.map(put, self.arrays, new))

    def _paged(self, pages: Int[Array, "N P"]) -> Any:
        def gather(x: Array) -> Array:
            found = x[(*self._front(), pages)]
            return found.reshape(len(pages), -1, *found.shape[3:])

        return jax.tree.map(gather, self.arrays)


def cells(rows: Rows, size: int) -> tuple[Int[Array, "B #S"], Int[Array, "B S"]]:
    """(sequence or page, place in it) of every row; what must not be written is out of range."""
    if rows.pages is None:
        return jnp.arange(len(rows.position))[:, None], rows.position
    pages = rows.pages if rows.places is None else rows.pages[rows.places.sequence]
    number = rows.position // size
    page = jnp.take_along_axis(pages, jnp.minimum(number, pages.shape[1] - 1), axis=1)
    nowhere = (number >= pages.shape[1]) | (page == 0)
    return jnp.where(nowhere, jnp.iinfo(page.dtype).max, page), rows.position % size


def capacity(rows: Rows, size: int) -> int:
    """C: how many rows a sequence can have in a cache with `size` rows per sequence or page."""
    return size if rows.pages is None else size * rows.pages.shape[1]


def places(rows: Rows) -> Int[Array, "N S"]:
    """The position of every row, as attention takes them."""
    return rows.position if rows.places is None else rows.places.position


def to_blocks(rows: Rows, flat: Shaped[Array, "R one *rest"]) -> Shaped[Array, "N S *rest"]:
    """Flat rows side by side with those of their sequence, zeros where there is none."""
    if rows.places is None:
        return flat
    at = rows.places
    empty = jnp.zeros((*at.position.shape, *flat.shape[2:]), flat.dtype)
    return empty.at[at.sequence, at.offset].set(flat[:, 0], mode="drop")


def to_flat(rows: Rows, blocks: Shaped[Array, "N S *rest"]) -> Shaped[Array, "R one *rest"]:
    """The inverse of `to_blocks`; a row that belongs nowhere gets any other's numbers."""
    if rows.places is None:
        return blocks
    return blocks[rows.places.sequence, rows.places.offset][:, None]


def side_by_side(pages: Shaped[Array, "N P H size *rest"]) -> Shaped[Array, "N H C *rest"]:
    """Pages of every head, one after another."""
    moved = jnp.moveaxis(pages, 2, 1)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])
