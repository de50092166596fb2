"""Decoding with merged weights computes what the model computes, however they are merged."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import GlmConfig
from dspark_jax.sampling import largest
from dspark_jax.targets.decoder import FOLDED_ELEMENTS, deinterleave, prepare
from dspark_jax.targets.extend import extend, init_cache, logits
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.targets.glm import Glm
from dspark_jax.types import Rows, TargetStates

CONFIG = GlmConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=6,
    num_hidden_layers=5,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=2,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    index_topk=5,
    index_head_dim=8,
    index_n_heads=3,
    first_k_dense_replace=1,
    indexer_types=("full", "full", "shared", "full", "shared"),
    aux_layer_ids=(0, 2, 5),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 14), 0, 20)
POSITION = jnp.broadcast_to(jnp.arange(14), TOKENS.shape)


def params_of(config: GlmConfig) -> nnx.State:
    """Weights far from their start, so that every term counts."""
    params = init_params(config, 3)
    keys = iter(jax.random.split(jax.random.key(4), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)


def through_the_cache(
    config: GlmConfig, params: nnx.State, folded: int, chunk: int
) -> tuple[TargetStates, jax.Array]:
    """States and logits of all tokens, `chunk` at a time."""
    glm = nnx.merge(nnx.split(Glm(config, rngs=nnx.Rngs(0)))[0], params, copy=True)
    decoder, found = prepare(glm, folded), []
    step = jax.jit(partial(extend, config))
    cache = init_cache(config, 2, 16, params["embed_tokens"][...].dtype)
    for start in range(0, 14, chunk):
        piece = slice(start, start + chunk)
        cache, states = step(decoder, cache, Rows(TOKENS[:, piece], POSITION[:, piece]))
        found.append(states)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)
    return whole, logits(config, decoder, whole.final_hidden)


@pytest.mark.parametrize("chunk", [1, 5, 14])
@pytest.mark.parametrize("unroll", [0, 8])
@pytest.mark.parametrize("folded", [0, FOLDED_ELEMENTS])
def test_chunks_through_the_cache_give_the_states_of_one_pass(
    folded: int, unroll: int, chunk: int
) -> None:
    config = replace(CONFIG, unroll_layers=unroll)
    params, target = params_of(config), make_target(config)
    ours, scores = through_the_cache(config, params, folded, chunk)
    whole = jax.jit(target.forward)(params, TOKENS, jnp.ones_like(TOKENS), POSITION)
    for a, b in zip(ours, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    np.testing.assert_allclose(scores, target.unembed(params, whole.final_hidden), atol=1e-4)


def test_half_precision_models_keep_router_and_index_weights_apart() -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(CONFIG))
    glm = nnx.merge(nnx.split(Glm(CONFIG, rngs=nnx.Rngs(0)))[0], half, copy=True)
    dense, sparse = prepare(glm).layers[0][0], prepare(glm).layers[1][0]
    assert dense.index_weight is not None and sparse.mlp.router is not None
    states, scores = through_the_cache(CONFIG, half, FOLDED_ELEMENTS, 7)
    assert states.final_hidden.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    assert np.isfinite(np.asarray(scores)).all()


def test_deinterleaving_moves_pairs_apart_and_leaves_the_rest() -> None:
    columns = jnp.arange(8.0)
    assert deinterleave(columns, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 7]
    assert deinterleave(columns, 6, last=True).tolist() == [0, 1, 2, 4, 6, 3, 5, 7]


def test_the_largest_is_the_first_of_equals() -> None:
    rows = jnp.asarray([[0.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -1.0], [2.0, 2.0, 2.0]])
    assert largest(rows).tolist() == [1, 2, 0] == jnp.argmax(rows, axis=-1).tolist()
