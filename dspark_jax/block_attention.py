"""Attention of training blocks over the context, tile by tile, skipping tiles nobody sees.

Scores are [tile of blocks, tile of context]; the whole square (17 GB a layer at GLM-5.2's size)
never exists, forward or backward. Blocks are sorted by anchor and see their own document up to it,
so most tiles of a packed row are empty and are not computed. A softmax over more than the context
is put together from the logarithms of the sums (`lse`) that come with each part.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BLOCKS, ROWS = 64, 128
"""Blocks and context rows of a tile."""
NOTHING = -1e30
"""Score of what is not seen; finite, so that a row that sees nothing has no 0/0."""


class Part(NamedTuple):
    """Softmax attention over some of the keys: the mean of values, and the log of the sum."""

    out: Float[Array, "B h N R d"]
    lse: Float[Array, "B h N R"]


def combine(a: Part, b: Part) -> Float[Array, "B h N R d"]:
    """Attention over the keys of both parts."""
    share = jax.nn.sigmoid(a.lse - b.lse)[..., None]
    return share * a.out + (1.0 - share) * b.out


def attend_tiled(
    query: Float[Array, "B h N R d"],
    key: Float[Array, "B h C d"],
    value: Float[Array, "B h C v"],
    seen: Bool[Array, "B N C"],
    tile: tuple[int, int] = (BLOCKS, ROWS),
) -> Part:
    """What R queries of each of N blocks take from the rows they see; `query` is scaled.

    A block that sees nothing has an `lse` so small that `combine` gives it no share.
    """
    N, C = seen.shape[1:]
    n, c = min(N, tile[0]), min(C, tile[1])
    pad_n, pad_c = -N % n, -C % c
    query = jnp.pad(query, ((0, 0), (0, 0), (0, pad_n), (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_c), (0, 0))) for x in (key, value))
    seen = jnp.pad(seen, ((0, 0), (0, pad_n), (0, pad_c)))
    part: Any = _attend((n, c), query, key, value, seen)
    return Part(*(x[:, :, :N] for x in part))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tile: tuple[int, int], query: Any, key: Any, value: Any, seen: Any) -> Any:
    return _forward(tile, query, key, value, seen)[0]


def _forward(tile: tuple[int, int], query: Any, key: Any, value: Any, seen: Any) -> Any:
    n, c = tile
    live = _live(seen, tile)

    def of_blocks(i: Any) -> Any:
        q = _cut(query, i, n, 2)
        shape = q.shape[:-1]

        def add(carry: Any, j: Any) -> Any:
            def compute(carry: Any) -> Any:
                total, largest, summed = carry
                score = _scores(q, _cut(key, j, c, 2), _cut2(seen, i, j, tile))
                top = jnp.maximum(largest, score.max(axis=-1))
                weight, old = jnp.exp(score - top[..., None]), jnp.exp(largest - top)
                blended = _product("bhnrc,bhcd->bhnrd", weight, _cut(value, j, c, 2))
                total = total * old[..., None] + blended
                return total, top, summed * old + weight.sum(axis=-1)

            return jax.lax.cond(live[i, j], compute, lambda carry: carry, carry), None

        total = jnp.zeros((*shape, value.shape[-1]), jnp.float32)
        start = (total, jnp.full(shape, NOTHING), jnp.zeros(shape))
        (total, top, summed), _ = jax.lax.scan(add, start, jnp.arange(live.shape[1]))
        summed = jnp.maximum(summed, jnp.finfo(jnp.float32).tiny)
        return total / summed[..., None], top + jnp.log(summed)

    out, lse = jax.lax.map(of_blocks, jnp.arange(live.shape[0]))
    out, lse = _joined(out), _joined(lse)
    return (out, lse), (query, key, value, seen, out, lse)


def _backward(tile: tuple[int, int], kept: Any, outer: Any) -> Any:
    query, key, value, seen, out, lse = kept
    d_out, d_lse = outer
    n, c = tile
    live = _live(seen, tile)
    # dS = P ⊙ (dO·Vᵀ - dO·O + dlse), with P = exp(S - lse).
    shift = d_lse - (d_out * out).sum(axis=-1)

    def of_blocks(carry: Any, i: Any) -> Any:
        parts = (_cut(x, i, n, 2) for x in (query, d_out, lse, shift))
        q, d_o, norm, offset = parts

        def add(carry: Any, j: Any) -> Any:
            def compute(carry: Any) -> Any:
                d_q, d_key, d_value = carry
                k, v = _cut(key, j, c, 2), _cut(value, j, c, 2)
                weight = jnp.exp(_scores(q, k, _cut2(seen, i, j, tile)) - norm[..., None])
                d_weight = _product("bhnrd,bhcd->bhnrc", d_o.astype(v.dtype), v)
                d_score = (weight * (d_weight + offset[..., None])).astype(q.dtype)
                d_q += _product("bhnrc,bhcd->bhnrd", d_score, k)
                d_key = _add(d_key, j, c, _product("bhnrc,bhnrd->bhcd", d_score, q))
                weight, d = weight.astype(v.dtype), d_o.astype(v.dtype)
                d_value = _add(d_value, j, c, _product("bhnrc,bhnrd->bhcd", weight, d))
                return d_q, d_key, d_value

            return jax.lax.cond(live[i, j], compute, lambda carry: carry, carry), None

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        (d_q, *carry), _ = jax.lax.scan(add, start, jnp.arange(live.shape[1]))
        return tuple(carry), d_q.astype(q.dtype)

    zero = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    (d_key, d_value), d_query = jax.lax.scan(of_blocks, zero, jnp.arange(live.shape[0]))
    return _joined(d_query), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, seen: Array) -> Array:
    score = _product("bhnrd,bhcd->bhnrc", q, k)
    return jnp.where(seen[:, None, :, None, :], score, NOTHING)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _live(seen: Bool[Array, "B N C"], tile: tuple[int, int]) -> Bool[Array, "i j"]:
    """Which tiles hold anything that is seen, in any row of the batch."""
    B, N, C = seen.shape
    n, c = tile
    return seen.reshape(B, N // n, n, C // c, c).any(axis=(0, 2, 4))


def _cut(x: Array, i: Any, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _cut2(seen: Array, i: Any, j: Any, tile: tuple[int, int]) -> Array:
    return _cut(_cut(seen, i, tile[0], 1), j, tile[1], 2)


def _add(x: Array, j: Any, size: int, more: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, j, size, 2) + more, j * size, 2)


def _joined(tiles: Array) -> Array:
    """[i B h n …] as [B h i·n …]."""
    whole = jnp.moveaxis(tiles, 0, 2)
    return whole.reshape(*whole.shape[:2], -1, *whole.shape[4:])
