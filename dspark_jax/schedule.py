"""Which drafted tokens are verified: those likeliest to survive, within a round's budget.

A draft's survival is the product of the confidences up to it. A slot's confidence has not seen the
token drafted there, so admitting it looks at nothing that its acceptance will be judged by, and the
emitted tokens keep the target's distribution (paper §5.2 and appendix A).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.types import Places

NEVER = -1.0
"""In place of the survival of a draft that may not be verified."""


def verify_lengths(
    chance: Float[Array, "N G"], cap: Int[Array, "N"], budget: Int[Array, ""]
) -> Int[Array, "N"]:
    """How many drafts of every sequence are verified: the `budget` likeliest to survive.

    `chance` is that a slot's draft is accepted if those before it are. `cap` bounds each
    sequence's. Of equal survivals the earlier slot comes first, then the earlier sequence, so that
    what is admitted is always the beginning of a block.
    """
    survival = survivals(chance, cap)
    row, place = jnp.indices(survival.shape)
    best_first = jnp.lexsort((row.ravel(), place.ravel(), -survival.ravel()))
    rank = jnp.zeros_like(best_first).at[best_first].set(jnp.arange(best_first.size))
    admitted = (rank.reshape(survival.shape) < budget) & (survival != NEVER)
    return jnp.sum(admitted, axis=1, dtype=jnp.int32)


def survivals(chance: Float[Array, "N G"], cap: Int[Array, "N"]) -> Float[Array, "N G"]:
    """The products of chances along a block, never rising; NEVER from `cap` on."""
    # The minimum holds where a backend multiplies in another order and rounds upwards.
    survival = jax.lax.cummin(jnp.cumprod(chance, axis=1), axis=1)
    return jnp.where(jnp.arange(chance.shape[1]) < cap[:, None], survival, NEVER)


def worth_verifying(
    chance: Float[Array, "N G"],
    cap: Int[Array, "N"],
    active: Int[Array, ""],
    seconds: Float[Array, "rows"],
) -> Int[Array, ""]:
    """How many drafts a round of `active` sequences verifies by Algorithm 1 (paper §3.2.2).

    The likeliest to survive is taken next as long as that promises more tokens per second, where a
    round of n verified rows takes `seconds[n]`. It stops at the first that does not: looking past
    it would let a draft in for the sake of later ones of its block, which have seen it (appendix
    A). For the same reason it is no harm to take more in the same order, up to any number that is
    rounded up to from this one alone: whether a draft is among them is settled by those before it.
    """
    survival = -jnp.sort(-survivals(chance, cap).ravel())
    gains = jnp.concatenate([jnp.zeros(1), jnp.where(survival == NEVER, 0.0, survival)])
    rows = jnp.minimum(active + jnp.arange(gains.size), len(seconds) - 1)
    rate = (active + jnp.cumsum(gains)) / seconds[rows]
    better = (rate[1:] > rate[:-1]) & (survival != NEVER)
    return jnp.sum(jnp.cumprod(better), dtype=jnp.int32)


def pack(
    active: Bool[Array, "N"],
    length: Int[Array, "N"],
    verify_length: Int[Array, "N"],
    sizes: tuple[int, int],
    beyond: int,
) -> tuple[Places, Int[Array, "R 1"]]:
    """(places, positions) of the R flat rows of a round: an anchor and its drafts, per sequence.

    `sizes` is (R, S). Rows left over belong to sequence N and stand at `beyond`, as all places do
    where no row stands. There must be room for everything.
    """
    rows, width = sizes
    sequences = len(active)
    counts = jnp.where(active, verify_length + 1, 0)
    number = jnp.arange(rows)
    ends = jnp.cumsum(counts)
    sequence = jnp.searchsorted(ends, number, side="right")
    inside = jnp.minimum(sequence, sequences - 1)
    offset = jnp.where(sequence < sequences, number - (ends - counts)[inside], width)
    position = jnp.where(sequence < sequences, length[inside] + offset, beyond)
    place = jnp.arange(width)
    standing = place < counts[:, None]
    blocks = jnp.where(standing, length[:, None] + place, beyond)
    return Places(sequence, offset, blocks), position[:, None]
