"""The two small heads on the parallel backbone: the Markov logit bias and the confidence.

The Markov head is what makes a block semi-autoregressive: every slot's logits get a low-rank bias
that depends on the token before it (paper §3.1, eq. 4-6). The confidence head predicts how likely
the slot's token is to be accepted (§3.2.1). Both follow the names of the published checkpoints.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dspark_jax.config import DraftConfig
from dspark_jax.layers import Linear, init_normal


def uniform_linear(size_in: int, size_out: int, *, bias: bool, rngs: nnx.Rngs) -> Linear:
    """A linear map drawn from U(±1/√size_in), bias included, as speculators starts its heads."""
    linear = Linear(size_in, size_out, bias=bias, rngs=rngs)
    bound = size_in**-0.5

    def draw(*shape: int) -> nnx.Param:
        return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

    linear.kernel = draw(size_in, size_out)
    if bias:
        linear.bias = draw(size_out)
    return linear


class MarkovHead(nnx.Module):
    """Bias `W2 · f(e, h, s)` on a slot's logits, where `e = W1[previous target token]`.

    h is the slot's hidden state after the final norm, s a state that runs along the block:
    vanilla `f = e`; gated `f = σ(Wg [h; e]) ⊙ e`; rnn `(g, c, o) = split(Wj [s; e; h])`,
    `f = tanh(o)`, `s ← σ(g) ⊙ s + (1 - σ(g)) ⊙ tanh(c)`, with o taken before s changes.
    Biases are float32, as they are added to logits.
    """

    def __init__(self, config: DraftConfig, *, rngs: nnx.Rngs):
        rank, hidden = config.markov_rank, config.hidden_size
        self.head_type = config.markov_head_type
        self.rank = rank
        self.markov_w1 = init_normal(rngs, (config.vocab_size, rank), std=0.01)
        self.markov_w2 = uniform_linear(rank, config.draft_vocab_size, bias=False, rngs=rngs)
        if self.head_type == "gated":
            self.gate_proj = uniform_linear(hidden + rank, rank, bias=True, rngs=rngs)
        elif self.head_type == "rnn":
            self.joint_proj = uniform_linear(2 * rank + hidden, 3 * rank, bias=True, rngs=rngs)

    @property
    def mixing(self) -> tuple[Float[Array, "m n"] | None, Float[Array, "n"] | None]:
        """(kernel, bias) of the map that a gated and an rnn head mix with."""
        if self.head_type == "vanilla":
            return None, None
        linear = self.gate_proj if self.head_type == "gated" else self.joint_proj
        return linear.kernel[...], None if linear.bias is None else linear.bias[...]

    def start(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows r"]:
        """The state before the first slot; only the rnn ever changes it."""
        return jnp.zeros((*hidden.shape[:-1], self.rank), hidden.dtype)

    def embed(self, prev: Int[Array, "*rows"]) -> Float[Array, "*rows r"]:
        """`e`, the embedding of the previous target token; also a feature of the confidence."""
        return self.markov_w1[...][prev]

    def step(
        self,
        state: Float[Array, "*rows r"],
        prev: Int[Array, "*rows"],
        hidden: Float[Array, "*rows D"],
    ) -> tuple[Float[Array, "*rows r"], Float[Array, "*rows Vd"], Float[Array, "*rows r"]]:
        """One slot: (new state, bias, embedding of the previous token)."""
        state, mixed, embedding = self.mixed(state, prev, hidden)
        return state, self._project(mixed), embedding

    def mixed(
        self,
        state: Float[Array, "*rows r"],
        prev: Int[Array, "*rows"],
        hidden: Float[Array, "*rows D"],
    ) -> tuple[Float[Array, "*rows r"], Float[Array, "*rows r"], Float[Array, "*rows r"]]:
        """The same with f, of which `W2 · f` is the bias, in its place."""
        embedding = self.embed(prev)
        return *self._mix(state, embedding, hidden), embedding

    def block(
        self, prev: Int[Array, "*blocks K"], hidden: Float[Array, "*blocks K D"]
    ) -> tuple[Float[Array, "*blocks K r"], Float[Array, "*blocks K r"]]:
        """A whole block whose previous tokens are known: (f, embedding), equal to K steps.

        `W2 · f` is the bias.
        """
        embedding = self.embed(prev)
        if self.head_type == "rnn":
            return self._run(embedding, hidden), embedding
        _, mixed = self._mix(jnp.zeros_like(embedding), embedding, hidden)
        return mixed, embedding

    def _mix(
        self,
        state: Float[Array, "*rows r"],
        embedding: Float[Array, "*rows r"],
        hidden: Float[Array, "*rows D"],
    ) -> tuple[Float[Array, "*rows r"], Float[Array, "*rows r"]]:
        """(new state, f) of the class's formulas."""
        if self.head_type == "vanilla":
            return state, embedding
        if self.head_type == "gated":
            gate = self.gate_proj(jnp.concatenate([hidden, embedding], axis=-1))
            return state, jax.nn.sigmoid(gate) * embedding
        joint = self.joint_proj(jnp.concatenate([state, embedding, hidden], axis=-1))
        gate, candidate, output = jnp.split(joint, 3, axis=-1)
        keep = jax.nn.sigmoid(gate)
        return keep * state + (1 - keep) * jnp.tanh(candidate), jnp.tanh(output)

    def _run(
        self, embedding: Float[Array, "*blocks K r"], hidden: Float[Array, "*blocks K D"]
    ) -> Float[Array, "*blocks K r"]:
        along_block = (jnp.moveaxis(embedding, -2, 0), jnp.moveaxis(hidden, -2, 0))
        state = self.start(hidden[..., 0, :])
        _, mixed = jax.lax.scan(lambda s, slot: self._mix(s, *slot), state, along_block)
        return jnp.moveaxis(mixed, 0, -2)

    def _project(self, mixed: Float[Array, "*rows r"]) -> Float[Array, "*rows Vd"]:
        kernel = self.markov_w2.kernel[...]
        return jnp.matmul(mixed, kernel, preferred_element_type=jnp.float32)


class ConfidenceHead(nnx.Module):
    """Logit of a slot's acceptance probability, `w · [h; e] + b` or `w · h + b`, in float32."""

    def __init__(self, config: DraftConfig, *, rngs: nnx.Rngs):
        features = config.hidden_size
        if config.confidence_head_with_markov:
            features += config.markov_rank
        self.with_markov = config.confidence_head_with_markov
        self.proj = uniform_linear(features, 1, bias=True, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "*rows D"], embedding: Float[Array, "*rows r"] | None
    ) -> Float[Array, "*rows"]:
        features = hidden.astype(jnp.float32)
        if self.with_markov:
            assert embedding is not None  # DraftConfig refuses these features without a Markov head
            features = jnp.concatenate([features, embedding.astype(jnp.float32)], axis=-1)
        return self.proj(features)[..., 0]
