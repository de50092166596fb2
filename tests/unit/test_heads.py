"""The Markov and confidence heads: step by step equals whole block, and how they start."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DraftConfig, MarkovHeadType
from dspark_jax.heads import ConfidenceHead, MarkovHead

HEAD_TYPES = get_args(MarkovHeadType)


def make_config(head: MarkovHeadType = "vanilla", **changes: Any) -> DraftConfig:
    return DraftConfig(
        vocab_size=50,
        draft_vocab_size=37,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        aux_layer_ids=(1,),
        mask_token_id=0,
        markov_rank=9,
        markov_head_type=head,
        **changes,
    )


def make_block(blocks: int = 3, K: int = 5) -> tuple[jax.Array, jax.Array]:
    """(previous tokens, hidden states) of a few blocks."""
    token_key, hidden_key = jax.random.split(jax.random.key(7))
    prev = jax.random.randint(token_key, (blocks, K), 0, 50)
    return prev, jax.random.normal(hidden_key, (blocks, K, 12))


def biases(head: MarkovHead, prev: jax.Array, hidden: jax.Array) -> jax.Array:
    """Biases of a whole block."""
    mixed, _ = head.block(prev, hidden)
    return jnp.matmul(mixed, head.markov_w2.kernel[...], preferred_element_type=jnp.float32)


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_a_block_equals_its_steps(head_type: MarkovHeadType):
    head = MarkovHead(make_config(head_type), rngs=nnx.Rngs(0))
    prev, hidden = make_block()
    bias, (_, embedding) = biases(head, prev, hidden), head.block(prev, hidden)
    state = head.start(hidden[:, 0])
    for k in range(prev.shape[1]):
        state, step_bias, step_embedding = head.step(state, prev[:, k], hidden[:, k])
        np.testing.assert_allclose(step_bias, bias[:, k], atol=1e-6)
        np.testing.assert_array_equal(step_embedding, embedding[:, k])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_what_the_bias_depends_on(head_type: MarkovHeadType):
    """vanilla: the previous token; gated: also its slot's hidden state; rnn: also earlier slots."""
    head = MarkovHead(make_config(head_type), rngs=nnx.Rngs(0))
    prev, hidden = make_block()

    def changed(prev: jax.Array, hidden: jax.Array) -> list[bool]:
        difference = jnp.abs(biases(head, prev, hidden) - bias).max(axis=(0, 2))
        return (difference > 1e-7).tolist()

    bias = biases(head, prev, hidden)
    later = [head_type == "rnn"] * 3
    assert changed(prev.at[:, 1].set((prev[:, 1] + 1) % 50), hidden) == [False, True, *later]
    own = head_type != "vanilla"
    assert changed(prev, hidden.at[:, 1].add(1.0)) == [False, own, *later]


def test_the_vanilla_bias_is_a_product_of_two_tables():
    head = MarkovHead(make_config(), rngs=nnx.Rngs(0))
    prev, hidden = make_block()
    table = head.markov_w1[...] @ head.markov_w2.kernel[...]
    np.testing.assert_allclose(biases(head, prev, hidden), table[prev], atol=1e-6)


def halved(head: Any) -> Any:
    """The head with bfloat16 parameters."""
    graphdef, params = nnx.split(head)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_biases_and_confidences_are_float32_for_half_precision_parameters():
    config = make_config("rnn")
    prev, hidden = make_block()
    markov = halved(MarkovHead(config, rngs=nnx.Rngs(0)))
    confidence = halved(ConfidenceHead(config, rngs=nnx.Rngs(1)))
    half = hidden.astype(jnp.bfloat16)
    _, bias, embedding = markov.step(markov.start(half[:, 0]), prev[:, 0], half[:, 0])
    assert (bias.dtype, embedding.dtype) == (jnp.float32, jnp.bfloat16)
    assert confidence(half[:, 0], embedding).dtype == jnp.float32


def test_confidence_is_an_affine_map_of_hidden_state_and_embedding():
    head = ConfidenceHead(make_config(), rngs=nnx.Rngs(0))
    hidden, embedding = jnp.ones((2, 12)), jnp.full((2, 9), 0.5)
    kernel, bias = head.proj.kernel[...][:, 0], head.proj.bias
    assert bias is not None
    expected = kernel[:12].sum() + 0.5 * kernel[12:].sum() + bias[...][0]
    np.testing.assert_allclose(head(hidden, embedding), jnp.full(2, expected), rtol=1e-6)


def test_confidence_without_markov_needs_no_embedding():
    head = ConfidenceHead(make_config(confidence_head_with_markov=False), rngs=nnx.Rngs(0))
    assert head.proj.kernel[...].shape == (12, 1)
    assert head(jnp.ones((2, 3, 12)), None).shape == (2, 3)


def test_heads_start_as_speculators_starts_them():
    """W1 from N(0, 0.01²), everything else from U(±1/√fan_in), biases too."""
    head = MarkovHead(make_config("rnn"), rngs=nnx.Rngs(0))
    assert 0.008 < jnp.std(head.markov_w1[...]) < 0.012
    joint = head.joint_proj
    for parameter, size in ((head.markov_w2.kernel, 9), (joint.kernel, 30), (joint.bias, 30)):
        assert parameter is not None
        largest = jnp.abs(parameter[...]).max()
        assert 0.8 * size**-0.5 < largest <= size**-0.5
