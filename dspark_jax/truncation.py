"""Min-p, top-k and top-p: which tokens may be drawn, and edits of logits that go before them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class Truncation(NamedTuple):
    """Per sequence; 0, 0 and 1 leave everything."""

    min_p: Float[Array, "N"]
    top_k: Int[Array, "N"]
    top_p: Float[Array, "N"]


class Edits(NamedTuple):
    """What changes logits before they are drawn from, per sequence, in vLLM's order.

    A token outside `allowed` (bit v % 32 of word v // 32) is impossible; `bias` is added; logits of
    tokens in `seen` are divided by `repetition` where positive, else multiplied; `penalty` is
    subtracted.
    """

    allowed: UInt32[Array, "N words"]
    bias: Float[Array, "N V"]
    seen: Bool[Array, "N V"]
    repetition: Float[Array, "N"]
    penalty: Float[Array, "N V"]


def edit(logits: Float[Array, "N V"], edits: Edits) -> Float[Array, "N V"]:
    """The logits that a request asks to be drawn from."""
    token = jnp.arange(logits.shape[-1])
    allowed = (edits.allowed[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1
    logits = jnp.where(allowed == 1, logits, -jnp.inf) + edits.bias
    factor = edits.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(edits.seen, repeated, logits) - edits.penalty


def truncate(
    logits: Float[Array, "N S V"], temperature: Float[Array, "N"], truncation: Truncation
) -> Float[Array, "N S V"]:
    """Logits with -inf where a token may not be drawn; costs nothing when nobody asks for it.

    Judged at the temperature: min-p, then top-k, then top-p over what those leave. Tokens as likely
    as the last one kept are kept too; the likeliest always is. Temperature 0 leaves everything.
    """
    asked = (truncation.min_p > 0) | (truncation.top_k > 0) | (truncation.top_p < 1)
    return jax.lax.cond(
        jnp.any(asked & (temperature > 0)),
        lambda: _truncated(logits, temperature, truncation),
        lambda: logits,
    )


def _truncated(
    logits: Float[Array, "N S V"], temperature: Float[Array, "N"], truncation: Truncation
) -> Float[Array, "N S V"]:
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)[:, None, None]
    min_p, top_k, top_p = (x[:, None, None] for x in truncation)
    descending = -jnp.sort(-scaled, axis=-1)
    likeliest = descending[..., :1]
    least = jnp.where(min_p > 0, likeliest + jnp.log(jnp.maximum(min_p, 1e-30)), -jnp.inf)
    last = jnp.where(top_k > 0, top_k, logits.shape[-1]) - 1
    last = jnp.broadcast_to(jnp.minimum(last, logits.shape[-1] - 1), likeliest.shape)
    least = jnp.maximum(least, jnp.take_along_axis(descending, last, axis=-1))
    probability = jax.nn.softmax(jnp.where(descending >= least, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The running sum may reach 1 by rounding, before the last token.
    inside = ((before < top_p) | (top_p >= 1)) & (descending >= least)
    least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    left = (scaled >= jnp.minimum(least, likeliest)) | (temperature == 0)[:, None, None]
    return jnp.where(left, logits, -jnp.inf)
