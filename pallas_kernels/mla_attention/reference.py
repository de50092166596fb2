"""What latent attention over a paged cache is: scores of tiles, one softmax kept up to date."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILE = 16384
"""Rows of a context whose scores exist at a time."""


def mla_attention(
    latent: Float[Array, "B S H r"],
    rope: Float[Array, "B S H p"],
    context_latent: Float[Array, "N size r"],
    context_rope: Float[Array, "N size wide"],
    pages: Int[Array, "B P"],
    position: Int[Array, "B S"],
    selected: Bool[Array, "B S C"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B S H r"]:
    """What every head's query takes from the cached latents up to its row's position, in float32.

    Row c of a sequence's context is `context[pages[b, c // size], c % size]`; all rows up to
    `position` are written already. Scores are (latent · context_latent + rope · context_rope) *
    `scale`: the compressed latent is key and value of all heads at once. With `selected` (the
    sparse attention of GLM-5) only those rows are seen. A row whose position is C or more is
    padding, and that or seeing nothing gives zeros. Rotary parts may be wider in the context than
    in the query, with zeros behind their p numbers: a TPU keeps rows in one place only if they are
    multiples of 128 wide.
    """
    size, p = context_latent.shape[1], rope.shape[-1]
    capacity = pages.shape[1] * size
    tile = TILE if capacity % TILE == 0 else capacity
    row = jnp.arange(capacity)
    visible = (row <= position[:, :, None]) & (position[:, :, None] < capacity)
    if selected is not None:
        visible = visible & selected
    total = jnp.zeros(latent.shape, jnp.float32)
    # Not -inf, from which nothing could be subtracted.
    largest = jnp.full(latent.shape[:3], jnp.finfo(jnp.float32).min)
    summed = jnp.zeros(latent.shape[:3])
    # Tiles are not a loop of the program: XLA would copy the whole cache to loop over it.
    for begin in range(0, capacity, tile):
        keys = _rows(context_latent, pages, begin, tile)
        turned = _rows(context_rope, pages, begin, tile)[..., :p]
        seen = jax.lax.dynamic_slice_in_dim(visible, begin, tile, 2)[:, :, None]
        scores = _product("bshr,bcr->bshc", latent, keys)
        scores = (scores + _product("bshp,bcp->bshc", rope, turned)) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weight, old = jnp.exp(scores - top[..., None]), jnp.exp(largest - top)
        mixed = _product("bshc,bcr->bshr", weight.astype(keys.dtype), keys)
        total = total * old[..., None] + mixed
        largest, summed = top, summed * old + jnp.sum(weight, axis=-1)
    return total / jnp.maximum(summed, 1e-30)[..., None]


def _rows(
    context: Float[Array, "N size wide"], pages: Int[Array, "B P"], begin: int, tile: int
) -> Float[Array, "B tile wide"]:
    """Rows [begin, begin + tile) of every sequence."""
    size = context.shape[1]
    first, beyond = begin // size, -(-(begin + tile) // size)
    found = context[pages[:, first:beyond]].reshape(len(pages), -1, context.shape[-1])
    return found[:, begin - first * size :][:, :tile]


def _product(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
