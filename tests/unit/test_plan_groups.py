"""Into what groups devices are split: what target, draft and FP8 blocks can be shared by."""

import pytest

from dspark_jax.plan.groups import check_groups, fits, tensor_size
from dspark_jax.plan.models import Models, find_models


@pytest.fixture(scope="module")
def glm() -> Models:
    return find_models("glm-5.2")


@pytest.fixture(scope="module")
def qwen3() -> Models:
    return find_models("qwen3-8b")


def test_glm_5_2_is_shared_by_groups_whose_parts_are_whole_blocks(glm: Models):
    assert [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if fits(n, 128, glm)] == [1, 2, 4, 8, 16]


def test_parts_of_blocks_are_named(glm: Models):
    with pytest.raises(ValueError, match=r"a mesh of 4 x 32 .* cuts blocks of 128 x 128 of layers"):
        check_groups(32, 128, glm)


def test_key_value_heads_bound_a_group(qwen3: Models):
    assert [n for n in (1, 2, 4, 8, 16) if fits(n, 16, qwen3)] == [1, 2, 4, 8]
    with pytest.raises(ValueError, match="cannot share 8 key-value heads by 16 evenly"):
        check_groups(16, 16, qwen3)


@pytest.mark.parametrize(
    ("devices", "batch", "size"),
    [
        (128, 64, 8),
        (128, 16, 8),
        (128, 8, 16),  # 16 groups could not share 8 sequences
        (128, 3, 16),  # nor could 8 groups: each has all of them, and fewest groups is best
        (8, 3, 8),
        (4, 8, 4),
        (1, 1, 1),
    ],
)
def test_groups_are_small_and_share_the_batch(glm: Models, devices: int, batch: int, size: int):
    assert tensor_size(None, devices, batch, glm) == size


def test_what_is_asked_for_is_taken_or_refused(glm: Models, qwen3: Models):
    assert tensor_size(2, 8, 3, glm) == 2
    with pytest.raises(ValueError, match="tensor_parallel 3 does not divide 8 devices; use one of"):
        tensor_size(3, 8, 6, glm)
    with pytest.raises(ValueError, match="cannot share 8 key-value heads by 16 evenly"):
        tensor_size(16, 16, 16, qwen3)
