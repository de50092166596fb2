"""The indexer scores by its formula and a row attends to its best visible keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dspark_jax.config import GlmConfig
from dspark_jax.layers import rope_angles
from dspark_jax.targets.indexer import Indexer, index_scores, select_top

CONFIG = GlmConfig(
    vocab_size=11,
    hidden_size=10,
    intermediate_size=8,
    moe_intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_shared_experts=1,
    q_lora_rank=7,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    index_topk=3,
    index_head_dim=6,
    index_n_heads=3,
    first_k_dense_replace=1,
    indexer_types=("full",),
)
# Few distinct values, so that ties are common.
SCORES = arrays.arrays(np.float32, (2, 3, 6), elements=st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0]))
VISIBLE = arrays.arrays(bool, (2, 3, 6))


def best(scores: np.ndarray, visible: np.ndarray, k: int) -> np.ndarray:
    """By sorting every row: highest first, equal scores by place."""
    chosen = np.zeros_like(visible)
    for row in np.ndindex(scores.shape[:-1]):
        places = sorted(np.flatnonzero(visible[row]), key=lambda s: (-scores[row][s], s))
        chosen[row][places[:k]] = True
    return chosen


@settings(deadline=None)  # the first call of every shape compiles
@given(SCORES, VISIBLE, st.integers(1, 8))
def test_a_row_attends_to_its_best_visible_keys(scores: np.ndarray, visible: np.ndarray, k: int):
    ours = select_top(jnp.asarray(scores), jnp.asarray(visible), k)
    assert np.array_equal(ours, best(scores, visible, k))


def test_equal_scores_go_to_the_earlier_key():
    scores, visible = (
        jnp.zeros((1, 1, 7)),
        jnp.asarray([[[False, True, True, True, False, True, True]]]),
    )
    assert jnp.flatnonzero(select_top(scores, visible, 3)[0, 0]).tolist() == [1, 2, 3]


def test_a_negative_score_counts_before_an_invisible_key():
    scores = jnp.asarray([[[9.0, -5.0, 9.0, -7.0, 9.0]]])
    visible = jnp.asarray([[[False, True, False, True, False]]])
    assert np.array_equal(select_top(scores, visible, 2), visible)


def test_rows_that_see_no_more_than_k_keys_see_them_all():
    scores = jax.random.normal(jax.random.key(0), (2, 9, 9))
    visible = jnp.broadcast_to(jnp.tri(9, dtype=bool), scores.shape)
    assert np.array_equal(select_top(scores, visible, 9), visible)
    sparse = select_top(scores, visible, 4)
    assert np.array_equal(sparse[:, :4], visible[:, :4])
    assert np.array_equal(sparse.sum(-1), jnp.minimum(visible.sum(-1), 4))


def test_an_unwritten_cache_row_changes_no_choice():
    scores = jax.random.normal(jax.random.key(1), (1, 4, 12))
    visible = jnp.broadcast_to(jnp.arange(12) < 8, scores.shape)
    wild = jnp.where(visible, scores, 1e30)
    assert np.array_equal(select_top(scores, visible, 3), select_top(wild, visible, 3))


def turned(x: np.ndarray, position: int) -> np.ndarray:
    """One vector with its first dims rotated, in pairs of neighbours, and written apart."""
    dim, x = CONFIG.qk_rope_head_dim, np.asarray(x, float)
    pairs = x[0:dim:2] + 1j * x[1:dim:2]
    pairs *= np.exp(1j * position * CONFIG.rope_theta ** (-np.arange(0, dim, 2) / dim))
    return np.concatenate([pairs.real, pairs.imag, x[dim:]])


@pytest.mark.parametrize("row", [0, 3, 5])
def test_scores_follow_the_formula(row: int):
    indexer = Indexer(CONFIG, rngs=nnx.Rngs(0))
    for i, linear in enumerate((indexer.wq_b, indexer.wk, indexer.weights_proj)):
        linear.kernel[...] = jax.random.normal(jax.random.key(i), linear.kernel.shape)
    indexer.k_norm.weight[...] = jnp.linspace(0.5, 1.5, CONFIG.index_head_dim)
    indexer.k_norm.bias[...] = jnp.linspace(-1.0, 1.0, CONFIG.index_head_dim)
    x, latent = (jax.random.normal(jax.random.key(i), (1, 6, n)) for i, n in ((8, 10), (9, 7)))
    angle = rope_angles(jnp.arange(6)[None], CONFIG.qk_rope_head_dim, CONFIG.rope_theta)
    query, weight = indexer.queries(x, latent, angle)
    ours = index_scores(query, indexer.keys(x, angle), weight)[0, row]

    heads, dim = CONFIG.index_n_heads, CONFIG.index_head_dim
    query = np.asarray(latent[0, row] @ indexer.wq_b.kernel[...]).reshape(heads, dim)
    weight = np.asarray(x[0, row] @ indexer.weights_proj.kernel[...])
    for s in range(6):
        key = np.asarray(x[0, s] @ indexer.wk.kernel[...], float)
        key = (key - key.mean()) / np.sqrt(key.var() + 1e-6)
        key = key * np.asarray(indexer.k_norm.weight[...]) + np.asarray(indexer.k_norm.bias[...])
        products = np.array([turned(q, row) @ turned(key, s) for q in query])
        theirs = weight @ np.maximum(products, 0) / np.sqrt(heads * dim)
        np.testing.assert_allclose(ours[s], theirs, rtol=1e-4, atol=1e-4)
