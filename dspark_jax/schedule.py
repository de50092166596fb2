"""Which drafted tokens are verified: those likeliest to survive, within a round's budget.

A draft's survival is the product of the confidences up to it. A slot's confidence has not seen the
token drafted there, so admitting it looks at nothing that its acceptance will be judged by, and the
emitted tokens keep the target's distribution (paper §5.2 and appendix A).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.types import Places


def verify_lengths(
    chance: Float[Array, "N G"], cap: Int[Array, "N"], budget: Int[Array, ""]
) -> Int[Array, "N"]:
    """How many drafts of every sequence are verified: the `budget` likeliest to survive.

    `chance` is that a slot's draft is accepted if those before it are. `cap` bounds each
    sequence's. Of equal survivals the earlier slot comes first, then the earlier sequence, so that
    what is admitted is always the beginning of a block.
    """
    slot = jnp.arange(chance.shape[1])
    eligible = slot < cap[:, None]
    # The minimum holds where a backend multiplies in another order and rounds upwards.
    survival = jax.lax.cummin(jnp.cumprod(chance, axis=1), axis=1)
    survival = jnp.where(eligible, survival, -1.0)
    row, place = jnp.indices(survival.shape)
    best_first = jnp.lexsort((row.ravel(), place.ravel(), -survival.ravel()))
    rank = jnp.zeros_like(best_first).at[best_first].set(jnp.arange(best_first.size))
    admitted = (rank.reshape(survival.shape) < budget) & eligible
    return jnp.sum(admitted, axis=1, dtype=jnp.int32)


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
