"""What block attention is: a dense gather of the context, all scores, one softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def block_attention(
    query: Float[Array, "B K H d"],
    key: Float[Array, "B K Hk d"],
    value: Float[Array, "B K Hk d"],
    context_key: Float[Array, "N Hk size wide"],
    context_value: Float[Array, "N Hk size wide"],
    pages: Int[Array, "B P"],
    length: Int[Array, "B"],
    *,
    window: int | None,
    causal: bool,
) -> Float[Array, "B K H d"]:
    """What every slot of a drafted block takes from its context and from its own block.

    Row c of a sequence's context is `context[pages[b, c // size], :, c % size]`; those before
    `length` are seen, of them with `window` the last `window` only. Slots see their whole block,
    or what is not after them when `causal`. Queries and keys are normed and rotated already; the
    H / Hk query heads that share a key head are neighbours. A contiguous cache is one page per
    sequence. A context may be wider than a head, with zeros behind its d numbers: a TPU keeps rows
    in one place only if they are multiples of 128 wide.
    """
    (B, K, H, d), shared = query.shape, key.shape[2]
    keys, values = (side_by_side(x[pages])[..., :d] for x in (context_key, context_value))
    row = jnp.arange(keys.shape[2])
    seen = row < length[:, None]
    if window is not None:
        seen = seen & (row >= length[:, None] - window)
    slot = jnp.arange(K)
    block_seen = (slot <= slot[:, None]) | (not causal)
    query = query.reshape(B, K, shared, H // shared, d)
    scores = jnp.concatenate(
        [
            jnp.where(
                seen[:, None, None, None], _product("bkhgd,bhcd->bhgkc", query, keys), -jnp.inf
            ),
            jnp.where(block_seen, _product("bkhgd,bjhd->bhgkj", query, key), -jnp.inf),
        ],
        axis=-1,
    )
    probs = jax.nn.softmax(scores * d**-0.5, axis=-1).astype(query.dtype)
    on_context, on_block = jnp.split(probs, [keys.shape[2]], axis=-1)
    out = _product("bhgkc,bhcd->bhgkd", on_context, values)
    out = out + _product("bhgkj,bjhd->bhgkd", on_block, value)
    return jnp.moveaxis(out, 3, 1).astype(query.dtype).reshape(B, K, H, d)


def side_by_side(pages: Shaped[Array, "B P Hk size wide"]) -> Shaped[Array, "B Hk C wide"]:
    """Pages of every head, one after another."""
    moved = jnp.moveaxis(pages, 2, 1)
    return moved.reshape(*moved.shape[:2], -1, moved.shape[-1])


def _product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
