"""The drafter's laws: decoding computes what training scored, and sees only what it may see."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.chunked import Trained, corrected_logits
from dspark_jax.config import DraftConfig, MarkovHeadType
from dspark_jax.draft_decoder import extend_context, init_draft_cache, prepare, run_block
from dspark_jax.draft_weights import params_from_tensors, tensors_from_params
from dspark_jax.drafter import Drafter, base_logits, score_blocks
from dspark_jax.drafting import draft_block, likeliest
from dspark_jax.sampling import gumbel, sampling_noise
from dspark_jax.types import Batch, Blocks, BlockScores, DraftCache, Frozen, Proposal

CONFIG = DraftConfig(
    vocab_size=31,
    draft_vocab_size=22,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    aux_layer_ids=(1, 3),
    mask_token_id=30,
    block_size=4,
    layer_types=("full_attention", "sliding_attention"),
    sliding_window=3,
    markov_rank=5,
    rope_theta=1e3,
)
CAPACITY = 16
LENGTH = jnp.asarray([9, 4, 0])
ANCHOR = jnp.asarray([3, 17, 8])
TEMPERATURE = jnp.asarray([0.0, 0.7, 1.3])
KEYS = jax.random.split(jax.random.key(11), 3)
AUX = jax.random.normal(jax.random.key(5), (3, CAPACITY, 24))
POSITION = jnp.tile(jnp.arange(CAPACITY), (3, 1))


@lru_cache
def make_drafter(config: DraftConfig) -> Drafter:
    """A drafter whose weights are drawn wide, so that everything it reads shows."""
    graphdef, params = nnx.split(Drafter(config, nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    wide = [x + 0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, wide))


@lru_cache
def make_frozen(config: DraftConfig) -> Frozen:
    embed_key, head_key, id_key = jax.random.split(jax.random.key(2), 3)
    ids = jax.random.permutation(id_key, config.vocab_size)[: config.draft_vocab_size]
    return Frozen(
        jax.random.normal(embed_key, (config.vocab_size, config.hidden_size)),
        jax.random.normal(head_key, (config.hidden_size, config.draft_vocab_size)),
        jnp.sort(ids),
    )


def jitted(function: Any, drafter: Drafter, *args: Any) -> Any:
    """One compilation per function, model and shapes for the whole file."""
    return compiled(function, *nnx.split(drafter), args)


def decoding(function: Any, drafter: Drafter, *args: Any) -> Any:
    """The same for a function of a prepared draft."""
    return jitted(on_prepared(function), drafter, *args)


@lru_cache
def on_prepared(function: Any) -> Any:
    return lambda drafter, *args: function(drafter.config, prepare(drafter), *args)


@partial(jax.jit, static_argnums=(0, 1))
def compiled(function: Any, graphdef: nnx.GraphDef, params: nnx.State, args: Any) -> Any:
    return function(nnx.merge(graphdef, params), *args)


def fill_cache(drafter: Drafter, aux: jax.Array) -> DraftCache:
    empty = init_draft_cache(drafter.config, aux.shape[0], CAPACITY)
    return decoding(extend_context, drafter, empty, aux, POSITION[: aux.shape[0]])


def draft(
    config: DraftConfig, aux: jax.Array = AUX, rows: Any = slice(None), keys: jax.Array = KEYS
) -> Proposal:
    """A proposal for the chosen rows of the standard state."""
    drafter, frozen = make_drafter(config), make_frozen(config)
    state = (LENGTH[rows], ANCHOR[rows], keys[rows], TEMPERATURE[rows])
    return decoding(draft_block, drafter, frozen, fill_cache(drafter, aux[rows]), *state)


def score(config: DraftConfig, blocks: Blocks, aux: jax.Array = AUX) -> BlockScores:
    """Training scores of blocks in rows that hold one document each."""
    B, T = aux.shape[:2]
    trained = jnp.ones((B, T), bool)
    batch = Batch(jnp.zeros((B, T), jnp.int32), trained, jnp.ones((B, T), jnp.int32), POSITION[:B])
    return jitted(score_blocks, make_drafter(config), make_frozen(config), batch, aux, blocks)


def logits_of(config: DraftConfig, scores: BlockScores) -> jax.Array:
    head = make_drafter(config).markov_head
    factor = None if head is None else head.markov_w2.kernel[...]
    trained = Trained(scores.hidden, scores.markov, factor)
    return corrected_logits(trained, make_frozen(config).lm_head)


def blocks_at(anchor: jax.Array, tokens: jax.Array) -> Blocks:
    """One valid block per row."""
    everything = jnp.ones((*tokens.shape[:1], 1, *tokens.shape[1:]), bool)
    return Blocks(anchor[:, None], everything[..., 0], tokens[:, None], tokens[:, None], everything)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), a, b)


@pytest.mark.parametrize("sample_from_anchor", [True, False])
@pytest.mark.parametrize("head", [*get_args(MarkovHeadType), None])
def test_a_drafted_block_scores_as_when_its_tokens_are_given(
    head: MarkovHeadType | None, sample_from_anchor: bool
):
    changes = {"markov_head_type": head} if head else {"markov_rank": 0}
    changes |= {} if head else {"confidence_head_with_markov": False}
    config = replace(CONFIG, sample_from_anchor=sample_from_anchor, **changes)
    proposal = draft(config)
    G, K = config.draft_length, config.block_size
    tokens = jnp.concatenate([ANCHOR[:, None], proposal.tokens], axis=1)[:, :K]
    scores = score(config, blocks_at(LENGTH, tokens))
    assert proposal.tokens.shape == (3, G)
    assert_close(proposal.logits, logits_of(config, scores)[:, 0, -G:])
    assert scores.confidence is not None
    assert_close(proposal.confidence, scores.confidence[:, 0, -G:])


@pytest.mark.parametrize("non_causal", [True, False])
def test_sliding_layers_decode_as_they_were_trained(non_causal: bool):
    kinds = ("sliding_attention",) * 2
    config = replace(CONFIG, layer_types=kinds, sliding_window_non_causal=non_causal)
    proposal = draft(config)
    tokens = jnp.concatenate([ANCHOR[:, None], proposal.tokens[:, :-1]], axis=1)
    scores = score(config, blocks_at(LENGTH, tokens))
    assert_close(proposal.logits, logits_of(config, scores)[:, 0])


def test_greedy_rows_take_the_largest_logit_and_proposals_are_target_ids():
    proposal, target_id = draft(CONFIG), make_frozen(CONFIG).target_id
    assert jnp.isin(proposal.tokens, target_id).all()
    greedy = target_id[jnp.argmax(proposal.logits[0], axis=-1)]
    np.testing.assert_array_equal(proposal.tokens[0], greedy)


def test_a_draft_without_confidence_head_says_how_likely_its_likeliest_token_is():
    proposal = draft(replace(CONFIG, enable_confidence_head=False))
    temperature = np.array(TEMPERATURE)[:, None, None]
    scaled = proposal.logits / np.where(temperature == 0, 1, temperature)
    best = jnp.max(jax.nn.softmax(scaled), axis=-1)
    np.testing.assert_allclose(
        proposal.confidence, jnp.log(best / (1 - best)), rtol=1e-4, atol=1e-5
    )


def test_what_a_headless_draft_says_of_a_slot_has_not_seen_its_token():
    config = replace(CONFIG, enable_confidence_head=False, confidence_head_with_markov=False)
    proposals = [draft(config, keys=jax.random.split(jax.random.key(n), 3)) for n in range(12)]
    tokens = np.stack([proposal.tokens for proposal in proposals])
    said = np.stack([proposal.confidence for proposal in proposals])
    for row in range(3):
        for j in range(config.draft_length):
            alike = [n for n in range(12) if np.array_equal(tokens[n, row, :j], tokens[0, row, :j])]
            np.testing.assert_array_equal(said[alike, row, j], said[0, row, j])
    assert len(np.unique(tokens[:, 2, 0])) > 1


def test_the_odds_of_a_certain_token_are_a_number():
    logits = jnp.array([[[0.0, -jnp.inf], [200.0, 0.0], [1.0, 1.0]]])
    np.testing.assert_array_equal(likeliest(logits, jnp.zeros(1)), [[40, 40, 0]])


def test_a_row_does_not_depend_on_its_neighbours_or_its_slot():
    whole = draft(CONFIG)
    swapped = draft(CONFIG, rows=jnp.asarray([2, 0, 1]))
    assert_close(swapped, jax.tree.map(lambda x: x[jnp.asarray([2, 0, 1])], whole))
    for row in range(3):
        alone = draft(CONFIG, rows=slice(row, row + 1))
        assert_close(alone, jax.tree.map(lambda x, r=row: x[r : r + 1], whole))


def test_cache_rows_at_or_past_length_are_invisible():
    stale = POSITION >= LENGTH[:, None]
    garbage = jnp.where(stale[..., None], 100.0, AUX)
    jax.tree.map(np.testing.assert_array_equal, draft(CONFIG), draft(CONFIG, garbage))
    seen = AUX.at[0, LENGTH[0] - 1].add(1.0)
    assert jnp.abs(draft(CONFIG).logits - draft(CONFIG, seen).logits)[0].max() > 1e-3


def test_a_window_hides_older_context():
    config = replace(CONFIG, layer_types=("sliding_attention",) * 2)
    before = draft(config)
    outside = AUX.at[0, LENGTH[0] - 4].add(1.0)
    inside = AUX.at[0, LENGTH[0] - 3].add(1.0)
    jax.tree.map(np.testing.assert_array_equal, before, draft(config, outside))
    assert jnp.abs(before.logits - draft(config, inside).logits)[0].max() > 1e-3


def test_training_sees_no_context_at_or_after_the_anchor():
    blocks = blocks_at(LENGTH, jnp.tile(jnp.arange(4), (3, 1)))
    hidden_future = jnp.where((POSITION >= LENGTH[:, None])[..., None], 100.0, AUX)
    jax.tree.map(
        np.testing.assert_array_equal,
        score(CONFIG, blocks),
        score(CONFIG, blocks, hidden_future),
    )


def test_training_sees_neither_other_documents_nor_padding():
    drafter, frozen = make_drafter(CONFIG), make_frozen(CONFIG)
    segment = jnp.asarray([[1] * 5 + [2] * 8 + [0] * 3])
    position = jnp.asarray([[*range(5), *range(8), 0, 0, 0]])
    batch = Batch(jnp.zeros_like(segment), segment > 0, segment, position)
    blocks = blocks_at(jnp.asarray([9]), jnp.asarray([[1, 2, 3, 4]]))
    scores = jitted(score_blocks, drafter, frozen, batch, AUX[:1], blocks)
    elsewhere = jnp.where((segment == 2)[..., None], AUX[:1], 100.0)
    other = jitted(score_blocks, drafter, frozen, batch, elsewhere, blocks)
    jax.tree.map(np.testing.assert_array_equal, scores, other)
    # Alone in its row, the document scores the same: positions restart, rows do not matter.
    alone = Batch(*(x[:, 5:13] for x in batch))
    moved = blocks._replace(anchor=blocks.anchor - 5)
    assert_close(scores, jitted(score_blocks, drafter, frozen, alone, AUX[:1, 5:13], moved))


def test_blocks_do_not_see_one_another():
    tokens = jax.random.randint(jax.random.key(0), (3, 2, 4), 0, 30)
    pair = Blocks(jnp.asarray([[4, 7]] * 3), jnp.ones((3, 2), bool), tokens, tokens, tokens >= 0)
    both = score(CONFIG, pair)
    for n in range(2):
        single = score(CONFIG, jax.tree.map(lambda x, n=n: x[:, n : n + 1], pair))
        assert_close(single, jax.tree.map(lambda x, n=n: x[:, n : n + 1], both))


def test_context_written_in_pieces_equals_context_written_at_once():
    drafter = make_drafter(CONFIG)
    cache = init_draft_cache(CONFIG, 3, CAPACITY)
    for start, stop in ((0, 5), (5, 6), (6, 16)):
        piece = slice(start, stop)
        cache = decoding(extend_context, drafter, cache, AUX[:, piece], POSITION[:, piece])
    assert_close(cache, fill_cache(drafter, AUX))


def test_padding_rows_are_not_written():
    drafter = make_drafter(CONFIG)
    full = fill_cache(drafter, AUX)
    position = jnp.asarray([[2, CAPACITY], [CAPACITY, CAPACITY], [15, CAPACITY + 7]])
    cache = decoding(extend_context, drafter, full, -AUX[:, :2], position)
    changed = jnp.any(cache.k[0] != full.k[0], axis=(1, 3))
    assert jnp.argwhere(changed).tolist() == [[0, 2], [2, 15]]


def test_scanned_layers_compute_what_unrolled_layers_do():
    config = replace(
        CONFIG,
        num_hidden_layers=3,
        layer_types=("full_attention", "sliding_attention", "full_attention"),
    )
    drafter, frozen = make_drafter(config), make_frozen(config)
    scanned = params_from_tensors(replace(config, unroll_layers=0), tensors_from_params(drafter))
    assert len(scanned.layers) == 1
    caches = [fill_cache(d, AUX) for d in (drafter, scanned)]
    assert_close(*caches)
    given = (frozen, caches[0], LENGTH, ANCHOR)
    assert_close(decoding(run_block, drafter, *given), decoding(run_block, scanned, *given))


def test_drafts_are_drawn_from_the_softmax_at_their_temperature():
    draws, rows = 4000, jnp.ones(4000, int)
    drafter, frozen = make_drafter(CONFIG), make_frozen(CONFIG)
    cache = jax.tree.map(lambda x: x[rows], fill_cache(drafter, AUX))
    keys = jax.random.split(jax.random.key(0), draws)
    state = (LENGTH[rows], ANCHOR[rows], keys, jnp.full(draws, 2.0))
    proposal = decoding(draft_block, drafter, frozen, cache, *state)
    for slot in (0, 1):
        # After the first slot, only the draws whose first token is the commonest share logits.
        first = np.asarray(proposal.tokens[:, 0])
        same = np.ones(draws, bool) if slot == 0 else first == np.bincount(first).argmax()
        drawn = np.asarray(proposal.tokens)[same, slot]
        share = np.bincount(drawn, minlength=31)[frozen.target_id] / same.sum()
        expected = jax.nn.softmax(proposal.logits[np.flatnonzero(same)[0], slot] / 2.0)
        deviation = np.sqrt(expected * (1 - expected) / same.sum())
        assert (np.abs(share - expected) < 4.5 * deviation + 1e-3).all()


def test_noise_is_fixed_by_key_and_length_and_new_in_every_round():
    noise = sampling_noise(KEYS, LENGTH, (4, 22))
    np.testing.assert_array_equal(sampling_noise(KEYS[1:], LENGTH[1:], (4, 22)), noise[1:])
    later = sampling_noise(KEYS, LENGTH + 1, (4, 22))
    assert not jnp.isin(later, noise).any()


def test_noise_is_finite_for_all_bits():
    extremes = gumbel(jnp.asarray([0, 2**32 - 1], jnp.uint32))
    assert jnp.isfinite(extremes).all() and extremes[0] < -2 and extremes[1] > 16


def test_noise_of_a_large_vocabulary_is_gumbel_distributed():
    """Its mean, spread and shape are right, and neighbouring entries are uncorrelated."""
    noise = np.asarray(sampling_noise(KEYS[:1], LENGTH[:1], (8, 32000))[0], np.float64)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.std() == pytest.approx(np.pi / 6**0.5, rel=0.01)
    uniform = np.exp(-np.exp(-noise))
    counts = np.histogram(uniform, bins=64, range=(0, 1))[0]
    expected = uniform.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 115  # 63 degrees of freedom, p = 1e-4
    for other in (np.roll(uniform, 1, axis=0), np.roll(uniform, 1, axis=1)):
        assert abs(np.corrcoef(uniform.ravel(), other.ravel())[0, 1]) < 0.01


def test_logits_are_float32_for_half_precision_parameters():
    graphdef, params = nnx.split(make_drafter(CONFIG))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    drafter, frozen = nnx.merge(graphdef, half), make_frozen(CONFIG)
    cache = init_draft_cache(CONFIG, 3, CAPACITY, jnp.bfloat16)
    cache = decoding(extend_context, drafter, cache, AUX, POSITION)
    assert cache.k[0].dtype == jnp.bfloat16
    proposal = decoding(draft_block, drafter, frozen, cache, LENGTH, ANCHOR, KEYS, TEMPERATURE)
    assert (proposal.logits.dtype, proposal.confidence.dtype) == (jnp.float32, jnp.float32)
    hidden, logits = decoding(run_block, drafter, frozen, cache, LENGTH, ANCHOR)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(logits, base_logits(frozen, hidden))
