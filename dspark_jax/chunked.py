"""The loss over vocabularies too large to hold: logits, terms and gradients chunk by chunk.

A chunk is some blocks of every row. Its logits, draft and target alike, exist only while its
values and its gradient are computed; the gradient is taken in the forward pass, where the logits
are at hand, and only scaled in the backward pass. Every slot's value is the one an unchunked
evaluation gives; only the Markov factor's gradient is a sum in another order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dspark_jax.config import LossConfig
from dspark_jax.losses import TERMS, cross_entropy, dpace_weight, overlap

CHUNK_BYTES = 40 * 2**20
"""Size of one chunk's float32 logits when the configuration names no number of blocks."""


class Trained(NamedTuple):
    """What the loss is differentiated by: slots' hidden states, Markov features, their factor."""

    hidden: Float[Array, "B N K D"]
    markov: Float[Array, "B N K r"] | None
    markov_w2: Float[Array, "r Vd"] | None


class Given(NamedTuple):
    """What is constant: the draft's head, the target's states and what is trained how much.

    `teacher` holds the target's parameters and `target_id`; `row` is the row of `final_hidden`
    that a slot predicts from; `weight` is zero where a slot is not trained.
    """

    lm_head: Float[Array, "D Vd"]
    teacher: Any
    final_hidden: Float[Array, "B T Dt"]
    row: Int[Array, "B N K"]
    label: Int[Array, "B N K"]
    mask: Bool[Array, "B N K"]
    weight: Float[Array, "B N K"]


class SlotValues(NamedTuple):
    """Per slot: every term, the acceptance rate and whether draft and target choose alike."""

    terms: dict[str, Float[Array, "B N K"]]
    weight: Float[Array, "B N K"]
    accept_rate: Float[Array, "B N K"]
    correct: Bool[Array, "B N K"]


Unembed = Callable[[Any, Float[Array, "*slots Dt"]], Float[Array, "*slots Vd"]]


def corrected_logits(trained: Trained, lm_head: Float[Array, "D Vd"]) -> Float[Array, "B N K Vd"]:
    """Base logits through the target's own head plus the Markov bias, in float32."""
    head = lm_head.astype(trained.hidden.dtype)
    logits = jnp.matmul(trained.hidden, head, preferred_element_type=jnp.float32)
    if trained.markov is None:
        return logits
    assert trained.markov_w2 is not None
    return logits + jnp.matmul(
        trained.markov, trained.markov_w2, preferred_element_type=jnp.float32
    )


def blocks_per_chunk(loss: LossConfig, B: int, N: int, K: int, vocab_size: int) -> int:
    """How many blocks of every row are evaluated at a time."""
    wanted = loss.chunk_blocks or CHUNK_BYTES // (4 * B * K * vocab_size)
    return max(1, min(N, wanted))


def slot_losses(
    unembed: Unembed, loss: LossConfig, trained: Trained, given: Given, shards: int = 1
) -> tuple[Float[Array, ""], SlotValues]:
    """`Σ slots weight · Σ terms w · term`, and the values of every slot.

    `unembed(teacher, hidden)` gives the target's logits over the draft vocabulary. The values
    carry no gradient. With the batch on several devices, `shards` of them, a device holds only its
    part of a chunk.
    """
    B, N, K = given.mask.shape
    size = blocks_per_chunk(loss, max(1, B // shards), N, K, given.lm_head.shape[1])
    return _slot_losses(unembed, loss, size, trained, given)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _slot_losses(
    unembed: Unembed, loss: LossConfig, size: int, trained: Trained, given: Given
) -> tuple[Float[Array, ""], SlotValues]:
    def add(total: Any, chunk: Any) -> tuple[Any, SlotValues]:
        value, slots = _chunk_loss(unembed, loss, *chunk)
        return total + value, slots

    return _over_chunks(add, jnp.zeros(()), trained, given, size)


def _forward(
    unembed: Unembed, loss: LossConfig, size: int, trained: Trained, given: Given
) -> tuple[tuple[Float[Array, ""], SlotValues], Trained]:
    differentiate = jax.value_and_grad(
        partial(_chunk_loss, unembed, loss), has_aux=True, allow_int=True
    )

    def add(carry: Any, chunk: Any) -> tuple[Any, Any]:
        total, factor_gradient = carry
        (value, slots), gradient = differentiate(*chunk)
        if factor_gradient is not None:
            factor_gradient += gradient.markov_w2.astype(jnp.float32)
        return (total + value, factor_gradient), (slots, gradient._replace(markov_w2=None))

    factor = trained.markov_w2
    zero = None if factor is None else jnp.zeros(factor.shape, jnp.float32)
    (total, summed), (slots, gradient) = _over_chunks(
        add, (jnp.zeros(()), zero), trained, given, size
    )
    if factor is not None:
        gradient = gradient._replace(markov_w2=summed.astype(factor.dtype))
    return (total, slots), gradient


def _backward(
    unembed: Unembed, loss: LossConfig, size: int, gradient: Trained, outer: Any
) -> tuple[Trained, None]:
    scale, _ = outer
    return jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient), None


_slot_losses.defvjp(_forward, _backward)


def _chunk_loss(
    unembed: Unembed, loss: LossConfig, trained: Trained, given: Given
) -> tuple[Float[Array, ""], SlotValues]:
    """The loss of the slots given, unchunked.

    What is not trained is not looked at either: its logits may be no numbers.
    """
    trained = trained._replace(hidden=jnp.where(given.mask[..., None], trained.hidden, 0))
    if trained.markov is not None:
        trained = trained._replace(markov=jnp.where(given.mask[..., None], trained.markov, 0))
    hidden = jax.vmap(lambda states, row: states[row])(given.final_hidden, given.row)
    teacher = unembed(given.teacher, hidden)
    logits = corrected_logits(trained, given.lm_head)
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
    choice = jnp.argmax(teacher, axis=-1)
    label = given.label if loss.rule == "paper" else choice
    terms = {name: TERMS[name](log_q, log_p, label) for name, _ in loss.weights}
    weight = given.weight
    if loss.position_weights == "dpace":
        surprise = terms["ce"] if "ce" in terms else cross_entropy(log_q, log_p, label)
        weight = weight * dpace_weight(surprise, given.mask, loss.dpace_alpha)
    slot = sum((w * terms[name] for name, w in loss.weights), start=jnp.zeros(given.mask.shape))
    value = jnp.sum(jnp.where(given.mask, weight * slot, 0.0))
    correct = jnp.argmax(logits, axis=-1) == choice
    values = SlotValues(terms, weight, overlap(log_q, log_p), correct)
    return value, jax.lax.stop_gradient(values)


def _over_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    trained: Trained,
    given: Given,
    size: int,
) -> tuple[Any, Any]:
    """Scan `step(carry, (trained, given))` over chunks of `size` blocks of every row.

    What belongs to blocks is cut along N, whole rows staying where they are on a mesh; a last
    chunk is filled up with blocks that are not trained.
    """
    N = given.mask.shape[1]
    chunks = -(-N // size)
    if chunks == 1:
        return step(carry, (trained, given))

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * size - N)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    def joined(x: Array) -> Array:
        whole = jnp.moveaxis(x, 0, 1)
        return whole.reshape(whole.shape[0], chunks * size, *whole.shape[3:])[:, :N]

    slots = {name: getattr(given, name) for name in ("row", "label", "mask", "weight")}
    cuts = jax.tree.map(cut, (trained.hidden, trained.markov, slots))

    def one(carry: Any, piece: Any) -> tuple[Any, Any]:
        hidden, markov, slots = piece
        return step(carry, (Trained(hidden, markov, trained.markov_w2), given._replace(**slots)))

    carry, outputs = jax.lax.scan(one, carry, cuts)
    return carry, jax.tree.map(joined, outputs)
