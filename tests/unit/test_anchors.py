"""Anchors are drawn fairly from where blocks fit, and slots are supervised where they should be."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.anchors import (
    eligible_anchors,
    make_blocks,
    sample_anchors,
    sample_blocks,
    teacher_rows,
)
from dspark_jax.config import DraftConfig

CONFIG = DraftConfig(
    vocab_size=100,
    draft_vocab_size=100,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    aux_layer_ids=(1,),
    mask_token_id=99,
    block_size=4,
)
ONE_PLUS_N = replace(CONFIG, sample_from_anchor=False)

# Documents of 15, 12 and 8 tokens and 5 pads; prompts of 4, 3 and 3 tokens are not trained.
LENGTHS, PROMPTS = (15, 12, 8), (4, 3, 3)
SEGMENT = jnp.asarray([[s + 1 for s, n in enumerate(LENGTHS) for _ in range(n)] + [0] * 5])
LOSS_MASK = jnp.asarray(
    [[i >= p for n, p in zip(LENGTHS, PROMPTS, strict=True) for i in range(n)] + [False] * 5]
)
TOKENS = jnp.arange(40)[None]


def keys(rows: int, seed: int = 0) -> jax.Array:
    """One key per row."""
    return jax.random.split(jax.random.key(seed), rows)


def slots_trained(anchors: list[int], config: DraftConfig, **options: Any) -> list[str]:
    """The label mask of blocks at the given anchors, as strings of 0 and 1."""
    anchor = jnp.asarray([anchors])
    valid = jnp.ones_like(anchor, bool)
    blocks = make_blocks(anchor, valid, TOKENS, LOSS_MASK, SEGMENT, config, **options)
    return ["".join(str(int(k)) for k in slots) for slots in blocks.label_mask[0]]


def test_anchors_are_trained_positions_with_a_whole_block_after_them():
    eligible = eligible_anchors(LOSS_MASK, CONFIG)[0]
    trained = [*range(4, 15), *range(18, 27), *range(30, 35)]
    assert jnp.flatnonzero(eligible).tolist() == trained
    short = eligible_anchors(LOSS_MASK[:, :20], CONFIG)[0]
    assert jnp.flatnonzero(short).tolist() == [*range(4, 15)]


@pytest.mark.parametrize("num_anchors", [1, 6, 25, 30, 64])
def test_a_draw_is_ascending_without_repeats_and_as_large_as_can_be(num_anchors: int):
    eligible = eligible_anchors(LOSS_MASK, CONFIG)
    anchor, valid = sample_anchors(keys(1, num_anchors), eligible, SEGMENT, num_anchors)
    drawn = anchor[valid].tolist()
    assert anchor.shape == valid.shape == (1, num_anchors)
    assert len(drawn) == min(num_anchors, 25)
    assert drawn == sorted(set(drawn))
    assert eligible[0, jnp.asarray(drawn)].all()
    assert not anchor[~valid].any()


def test_every_eligible_position_is_equally_likely():
    draws, wanted = 2000, 5
    eligible = jnp.tile(eligible_anchors(LOSS_MASK, CONFIG), (draws, 1))
    segment = jnp.tile(SEGMENT, (draws, 1))
    anchor, _ = sample_anchors(keys(draws), eligible, segment, wanted)
    share = np.bincount(anchor.ravel(), minlength=40)[np.asarray(eligible[0])] / draws
    np.testing.assert_allclose(share, wanted / 25, atol=0.04)


def test_a_row_without_eligible_positions_has_no_block():
    blocks = sample_blocks(keys(1), TOKENS, jnp.zeros_like(LOSS_MASK), SEGMENT, 4, CONFIG)
    assert not blocks.valid.any() and not blocks.label_mask.any()


def test_slots_hold_the_tokens_from_the_anchor_on():
    anchor = jnp.asarray([[9, 34]])
    rows = (TOKENS + 50, LOSS_MASK, SEGMENT)
    blocks = make_blocks(anchor, jnp.ones_like(anchor, bool), *rows, CONFIG)
    assert blocks.tokens.tolist() == [[[59, 60, 61, 62], [84, 85, 86, 87]]]


def test_speculators_masks_by_the_token_a_slot_follows():
    masks = slots_trained([9, 11, 20, 26, 33, 34], CONFIG, mask_cross_document=False)
    assert masks == ["1111", "1111", "1111", "1000", "1100", "1000"]


def test_speculators_masks_by_the_token_a_slot_predicts_in_the_one_plus_n_layout():
    masks = slots_trained([9, 11, 20, 26, 33, 34], ONE_PLUS_N, mask_cross_document=False)
    assert masks == ["0111", "0111", "0111", "0000", "0100", "0000"]


def test_no_slot_is_taught_to_continue_into_the_next_document():
    assert slots_trained([9, 11, 14, 26, 34], CONFIG) == ["1111", "1110", "0000", "0000", "0000"]
    assert slots_trained([9, 11, 14], ONE_PLUS_N) == ["0111", "0111", "0000"]


def test_the_next_document_is_masked_even_where_its_prompt_is_trained():
    everything = jnp.ones_like(LOSS_MASK)
    anchor = jnp.asarray([[13]])
    rows = (TOKENS, everything, SEGMENT)
    for config, expected in ((CONFIG, [1, 0, 0, 0]), (ONE_PLUS_N, [0, 1, 0, 0])):
        blocks = make_blocks(anchor, jnp.ones_like(anchor, bool), *rows, config)
        assert blocks.label_mask[0, 0].astype(int).tolist() == expected


def test_the_teacher_reads_the_row_before_the_predicted_token():
    anchor = jnp.asarray([[5, 0]])
    assert teacher_rows(anchor, CONFIG, 40).tolist() == [[[5, 6, 7, 8], [0, 1, 2, 3]]]
    assert teacher_rows(anchor, ONE_PLUS_N, 40).tolist() == [[[4, 5, 6, 7], [39, 0, 1, 2]]]


def test_unused_blocks_train_nothing():
    blocks = sample_blocks(keys(1, 3), TOKENS, LOSS_MASK, SEGMENT, 64, CONFIG)
    assert not blocks.label_mask[~blocks.valid].any()
    assert blocks.label_mask[blocks.valid].any()


def test_every_document_gets_its_share_of_the_anchors():
    everything = jnp.ones_like(LOSS_MASK)
    sizes = np.array([14, 11, 7])  # positions with a successor in their document
    counts = []
    for seed in range(50):
        blocks = sample_blocks(keys(1, seed), TOKENS, everything, SEGMENT, 8, CONFIG)
        where = np.asarray(SEGMENT[0])[np.asarray(blocks.anchor[0])]
        counts.append(np.bincount(where, minlength=4)[1:4])
    assert np.abs(np.array(counts) - 8 * sizes / sizes.sum()).max() < 1.5
    assert np.min(counts) >= 1


def test_the_paper_stops_at_the_first_token_that_is_not_trained():
    masks = slots_trained([9, 11, 20, 26, 33, 34], CONFIG, rule="paper", mask_cross_document=False)
    assert masks == ["1111", "1110", "1111", "0000", "1000", "0000"]
    assert slots_trained([9, 11], ONE_PLUS_N, rule="paper") == ["0111", "0111"]


def test_a_row_draws_the_same_blocks_whatever_its_neighbours_are():
    alone = sample_blocks(keys(3)[1:2], TOKENS, LOSS_MASK, SEGMENT, 6, CONFIG)
    tokens, mask, segment = (jnp.tile(x, (3, 1)) for x in (TOKENS, LOSS_MASK, SEGMENT))
    mask = mask.at[0].set(False)
    together = sample_blocks(keys(3), tokens, mask, segment, 6, CONFIG)
    np.testing.assert_array_equal(alone.anchor[0], together.anchor[1])
