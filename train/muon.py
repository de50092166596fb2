"""Muon as torch.optim.Muon computes it: momentum whose singular values are brought near one.

The iteration runs in bfloat16 with every product accumulated in float32 and rounded once, as
torch does it: it amplifies rounding so much that float32 would end a few percent elsewhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SMALLEST_NORM = 1e-7
RMS_OF_ADAMW = 0.2
"""`match_rms_adamw`: an update of this root mean square, as AdamW's, so that both share a rate."""


class MuonState(NamedTuple):
    """The running mean of the gradients."""

    momentum: Any


def scale_by_muon(momentum: float = 0.95, steps: int = 5) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal, scaled by `0.2 √max(in, out)`.

    Takes matrices [in, out], or stacks of them on leading axes.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        def mean(m: Array, g: Array) -> Array:
            return m + (1.0 - momentum) * (g - m)

        def direction(m: Array, g: Array) -> Array:
            ahead = m - (m - g) * (1.0 - momentum)
            return RMS_OF_ADAMW * max(g.shape[-2:]) ** 0.5 * orthogonal(ahead, steps)

        running = jax.tree.map(mean, state.momentum, gradients)
        return jax.tree.map(direction, running, gradients), MuonState(running)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def orthogonal(kernel: Float[Array, "*stack i o"], steps: int) -> Float[Array, "*stack i o"]:
    """Newton-Schulz: singular values into about 0.7 to 1.2, directions kept; returns float32."""
    a, b, c = COEFFICIENTS
    # torch's weight is [out, in] and its rows the shorter side, or `out` when the sides are equal.
    turn = kernel.shape[-2] >= kernel.shape[-1]
    x = (kernel.mT if turn else kernel).astype(jnp.bfloat16)
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    norm = jnp.maximum(norm.astype(jnp.bfloat16).astype(jnp.float32), SMALLEST_NORM)
    x = (x.astype(jnp.float32) / norm).astype(jnp.bfloat16)

    def product(left: Array, right: Array) -> Array:
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    for _ in range(steps):
        gram = product(x, x.mT).astype(jnp.bfloat16)
        both = (b * gram.astype(jnp.float32) + c * product(gram, gram)).astype(jnp.bfloat16)
        x = (a * x.astype(jnp.float32) + product(both, x)).astype(jnp.bfloat16)
    return (x.mT if turn else x).astype(jnp.float32)
