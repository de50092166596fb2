"""Picking tokens from logits: the argmax, and draws whose noise is fixed by key and length."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32


def sampling_noise(
    keys: Key[Array, "B"], length: Int[Array, "B"], shape: tuple[int, ...]
) -> Float[Array, "B G Vd"]:
    """Gumbel noise of each sequence's round: a function of its key and length alone.

    The two words of the round's key come from threefry; each entry then mixes them with its own
    number by a 32-bit integer hash (the finaliser that vLLM's sampler uses too), twenty times
    cheaper than threefry over the whole vocabulary.
    """
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(1, *shape)
    return noise_at(noise_words(keys, length), number)


def noise_at(words: UInt32[Array, "B 2"], number: UInt32[Array, "#B G n"]) -> Float[Array, "B G n"]:
    """The same noise of entries by their numbers in the block, `slot * Vd + entry`."""
    low, high = words[:, :1, None], words[:, 1:, None]
    return gumbel(_mix(_mix(number * jnp.uint32(0x9E3779B9) + low) ^ high))


def noise_words(keys: Key[Array, "B"], length: Int[Array, "B"]) -> UInt32[Array, "B 2"]:
    """What the noise of each sequence's round is made of."""
    return key_words(jax.vmap(jax.random.fold_in)(keys, length))


def key_words(keys: Key[Array, "B"]) -> UInt32[Array, "B 2"]:
    """Two words of every key, for noise that is hashed from them: whoever draws so needs his own
    keys."""
    return jax.random.key_data(keys).astype(jnp.uint32)[:, -2:]


def salted(keys: Key[Array, "B"], salt: int) -> Key[Array, "B"]:
    """The keys of another purpose within the same round."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, salt)


def gumbel(bits: UInt32[Array, "*any"]) -> Float[Array, "*any"]:
    """Gumbel noise from random bits, always finite.

    23 bits and a half are exact in float32; with 24 the largest would round to 1, whose noise is
    infinite and would pick its token whatever the logits say.
    """
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """murmur3's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def choose(
    logits: Float[Array, "B Vd"], noise: Float[Array, "B Vd"], temperature: Float[Array, "B"]
) -> Int[Array, "B"]:
    """A draw from softmax(logits / temperature) by the Gumbel-max rule; the argmax at 0."""
    return largest(logits + temperature[:, None] * noise)


def draw(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`jax.random.categorical`, row by row: the same draws from the same keys.

    Its argmax, which XLA fuses with the noise, takes a TPU compiler minutes over a large
    vocabulary; two plain reductions take it a second.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    return largest(logits + noise)


def largest(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The argmax, the first of equals: two plain reductions, which a CPU runs faster than one pair.

    Places are compared as float32, exact up to 2^24 entries.
    """
    place = jnp.arange(logits.shape[-1], dtype=jnp.float32)
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, place, jnp.inf), axis=-1).astype(jnp.int32)
