"""Models that a plan is for, and what they make any program read: against published figures."""

import json
from pathlib import Path

import pytest

from dspark_jax.config import GlmConfig
from dspark_jax.draft_weights import parameter_table
from dspark_jax.plan.builtin import TARGETS
from dspark_jax.plan.floor import (
    Held,
    Needs,
    distinct_experts,
    draft_needs,
    held_bytes,
    step_bytes,
    target_needs,
)
from dspark_jax.plan.models import Models, find_models
from dspark_jax.targets.weights import entries

TINY = Path("dspark_jax/assets/tiny-glm")


def needs_of(models: Models) -> Needs:
    tensors = ((entry.name, entry.shape) for entry in entries(models.target))
    return target_needs(tensors, models.target, models.block)


@pytest.fixture(scope="module")
def glm() -> Models:
    return find_models("glm-5.2")


@pytest.fixture(scope="module")
def glm_needs(glm: Models) -> Needs:
    return needs_of(glm)


def test_glm_5_2_is_the_fp8_checkpoint(glm: Models):
    assert glm.block == (128, 128)
    assert isinstance(glm.target, GlmConfig)
    full = [i for i, kind in enumerate(glm.target.indexer_types) if kind == "full"]
    assert full == [0, 1, 2, *range(6, 78, 4)]
    assert glm.target.aux_layer_ids == glm.draft.aux_layer_ids == (8, 23, 39, 55, 70)


def test_the_floor_of_glm_5_2_is_what_its_checkpoint_holds(glm_needs: Needs):
    assert glm_needs.fixed == pytest.approx(18.73e9, rel=1e-3)
    assert glm_needs.expert == pytest.approx(37.758e6, rel=1e-5)
    assert glm_needs.expert_layers == 75
    assert glm_needs.all_experts == pytest.approx(724.95e9, rel=1e-5)
    assert glm_needs.cache_per_token == 95232


@pytest.mark.parametrize(
    ("tokens", "experts", "gigabytes"),
    [(1, 8, 41.4), (4, 30.5, 105), (8, 57.4, 181), (32, 163, 481), (256, 255.9, 744)],
)
def test_steps_of_glm_5_2_read_what_was_published(
    glm_needs: Needs, tokens: int, experts: float, gigabytes: float
):
    assert distinct_experts(256, 8, tokens) == pytest.approx(experts, rel=3e-3)
    assert step_bytes(glm_needs, tokens, 1, 0) == pytest.approx(gigabytes * 1e9, rel=2e-3)


def test_the_context_is_read_once_per_sequence(glm_needs: Needs):
    short, long = (step_bytes(glm_needs, 8, 2, context) for context in (0, 1000))
    assert long - short == 2 * 1000 * 95232


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19), ("qwen3-32b", 32.76), ("qwen3-30b-a3b", 30.53)],
)
def test_built_in_models_have_their_published_sizes(name: str, billions: float):
    models = find_models(name)
    needs, config = needs_of(models), models.target
    embedding = config.vocab_size * needs.embedding_row
    shared = getattr(config, "tie_word_embeddings", False)
    size = needs.fixed + needs.all_experts + (0 if shared else embedding)
    assert size / 2e9 == pytest.approx(billions, rel=1e-3)


def test_every_built_in_target_can_be_read():
    assert {find_models(name).target.num_hidden_layers for name in TARGETS} >= {78, 36, 28}


def test_a_draft_reads_all_but_its_tables_of_rows(glm: Models):
    rows = [(row.name, row.shape) for row in parameter_table(glm.draft)]
    needs = draft_needs(rows, glm.draft)
    every = sum(2 * a * b for _, (a, b) in ((n, (*s, 1)[:2]) for n, s in rows))
    head, table = 2 * 154880 * 6144, 2 * 154880 * 256
    assert needs.fixed == every - table + head
    assert needs.cache_per_token == 5 * 2 * 32 * 96 * 2


def test_a_device_reads_what_it_holds_and_needs():
    needs = Needs(0, 100, 1, 4, 1, 8, 0)
    weights = [Held(".norm", 10), Held(".experts.up", 200), Held(".embed_tokens", 10**9)]
    assert held_bytes(weights, needs, 1, 1000, 0.5) == 10 + 200 / 4 + 8 + 500


def test_a_folder_and_its_config_json_are_the_same_target():
    folder, file = find_models(str(TINY)), find_models(str(TINY / "config.json"))
    assert folder.target == file.target and folder.block is None


def test_a_draft_folder_is_read():
    models = find_models(str(TINY), "dspark_jax/assets/tiny-glm-dspark")
    assert models.draft.num_hidden_layers == 1
    assert models.target.aux_layer_ids == models.draft.aux_layer_ids


def test_a_draft_of_another_target_is_refused():
    with pytest.raises(ValueError, match=r"drafter vocab_size 512 does not match .* 151936"):
        find_models("qwen3-8b", "dspark_jax/assets/tiny-glm-dspark")


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(ValueError, match="nor a hub id.*Known by name are glm-5.2"):
        find_models("glm-five")


def test_a_config_that_is_not_json_is_named(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        find_models(str(path))
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is not a JSON object"):
        find_models(str(path))
