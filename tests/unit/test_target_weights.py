"""Published GLM tensors and config.json go in and out unchanged, and misfits are all named."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.config import GlmConfig
from dspark_jax.targets.families import init_params, read_config
from dspark_jax.targets.glm_config import config_from_json, config_to_json
from dspark_jax.targets.weights import (
    entries,
    params_from_tensors,
    tensors_from_params,
)

CONFIG = GlmConfig(
    vocab_size=13,
    hidden_size=10,
    intermediate_size=9,
    moe_intermediate_size=4,
    num_hidden_layers=5,
    num_attention_heads=2,
    n_routed_experts=3,
    num_experts_per_tok=2,
    n_shared_experts=1,
    q_lora_rank=7,
    kv_lora_rank=6,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=3,
    index_topk=3,
    index_head_dim=6,
    index_n_heads=2,
    first_k_dense_replace=1,
    indexer_types=("full", "shared", "full", "shared", "full"),
)
STACKED = replace(CONFIG, unroll_layers=0)
Tensors = dict[str, np.ndarray]


def tensors(config: GlmConfig = CONFIG) -> Tensors:
    """A checkpoint of random numbers."""
    rng = np.random.default_rng(0)
    return {e.name: rng.standard_normal(e.shape).astype(np.float32) for e in entries(config)}


def read(config: GlmConfig, given: Tensors) -> Any:
    shapes = {name: value.shape for name, value in given.items()}
    return params_from_tensors(config, shapes, given.__getitem__)


@pytest.mark.parametrize("config", [CONFIG, STACKED], ids=["one_by_one", "stacked"])
def test_tensors_come_back_as_they_were_read(config: GlmConfig):
    given = tensors()
    back = tensors_from_params(config, read(config, given))
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[name], given[name]) for name in given)


@pytest.mark.parametrize("config", [CONFIG, STACKED], ids=["one_by_one", "stacked"])
def test_parameters_are_arranged_as_the_model_is(config: GlmConfig):
    model = jax.eval_shape(lambda: init_params(config, 0))
    found = read(config, tensors())
    assert jax.tree.structure(found) == jax.tree.structure(model)
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (found, model)]
    assert shapes[0] == shapes[1]


def test_stacking_changes_no_name_and_no_shape():
    assert {e.name: e.shape for e in entries(CONFIG)} == {e.name: e.shape for e in entries(STACKED)}


def test_names_and_shapes_are_the_published_ones():
    shapes, prefix = {e.name: e.shape for e in entries(CONFIG)}, "model.layers"
    expected = {
        "model.embed_tokens.weight": (13, 10),
        "lm_head.weight": (13, 10),
        "model.norm.weight": (10,),
        f"{prefix}.0.mlp.gate_proj.weight": (9, 10),
        f"{prefix}.0.self_attn.indexer.k_norm.bias": (6,),
        f"{prefix}.0.self_attn.indexer.wq_b.weight": (12, 7),
        f"{prefix}.1.mlp.gate.weight": (3, 10),
        f"{prefix}.1.mlp.gate.e_score_correction_bias": (3,),
        f"{prefix}.1.mlp.experts.2.gate_proj.weight": (4, 10),
        f"{prefix}.1.mlp.experts.2.down_proj.weight": (10, 4),
        f"{prefix}.4.mlp.shared_experts.up_proj.weight": (4, 10),
        f"{prefix}.4.self_attn.kv_a_proj_with_mqa.weight": (10, 10),
        f"{prefix}.4.self_attn.kv_b_proj.weight": (16, 6),
        f"{prefix}.4.self_attn.o_proj.weight": (10, 6),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not any(".1.self_attn.indexer" in name for name in shapes)


def test_every_misfit_is_named_in_one_error():
    given = tensors()
    del given["model.norm.weight"]
    del given["model.layers.3.mlp.experts.1.up_proj.weight"]
    given["model.layers.2.self_attn.q_norm.weight"] = np.zeros(3, np.float32)
    given["lm_head.weight"] = given["lm_head.weight"].T
    with pytest.raises(ValueError) as error:
        read(CONFIG, given)
    for part in (
        "4 tensors",
        "missing model.norm.weight",
        "missing model.layers.3.mlp.experts.1.up_proj.weight",
        "unexpected model.layers.2.self_attn.q_norm.weight",
        "lm_head.weight has shape [10, 13] instead of [13, 10]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["model.layers", "model.layers.x.y", "model.layers.-7.weight"])
def test_layers_without_a_number_are_unexpected(name: str):
    with pytest.raises(ValueError, match=f"1 tensors .*: unexpected {name}$"):
        read(CONFIG, tensors() | {name: np.zeros(2, np.float32)})


def test_misfits_are_found_before_anything_is_read():
    shapes = {name: value.shape for name, value in tensors().items()}
    del shapes["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head"):
        params_from_tensors(CONFIG, shapes, lambda name: pytest.fail(f"read {name}"))


def test_the_layer_that_predicts_several_tokens_is_skipped():
    given = tensors()
    extra = {"model.layers.5.eh_proj.weight": np.zeros((2, 2), np.float32)}
    extra |= {"model.layers.5.mlp.experts.0.up_proj.weight": np.zeros((2, 2), np.float32)}
    with_extra, without = read(CONFIG, given | extra), read(CONFIG, given)
    assert all(map(np.array_equal, jax.tree.leaves(with_extra), jax.tree.leaves(without)))


def test_a_config_comes_back_as_it_was_written():
    config = replace(CONFIG, rope_theta=12345.0, routed_scaling_factor=1.3, index_topk=7)
    assert config_from_json(config_to_json(config, 1, 0)) == config


def test_another_architecture_is_refused_by_name():
    described = config_to_json(CONFIG, 1, 0) | {"model_type": "llama"}
    with pytest.raises(ValueError, match="'llama' is not supported.*glm_moe_dsa, qwen3, qwen3_moe"):
        read_config(described)


def test_how_layers_share_indexers_can_be_said_in_three_ways():
    described = config_to_json(CONFIG, 1, 0)
    spelled = described.pop("indexer_types")
    frequency = {"index_topk_freq": 2, "index_skip_topk_offset": 1}
    pattern = {"index_topk_pattern": "FFSSF"}

    def read_as(*parts: dict[str, Any]) -> tuple[str, ...]:
        merged = dict(described)
        for part in parts:
            merged |= part
        return config_from_json(merged).indexer_types

    assert read_as(frequency) == CONFIG.indexer_types
    assert read_as(frequency, pattern) == ("full", "full", "shared", "shared", "full")
    assert read_as(frequency, pattern, {"indexer_types": spelled}) == CONFIG.indexer_types
    assert read_as() == ("full",) * 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", 3),
        ("rope_parameters", "x"),
        ("rope_parameters", {"rope_theta": "x"}),
        ("rope_scaling", [1]),
        ("index_topk_freq", 0),
        ("index_topk_freq", "2"),
        ("index_skip_topk_offset", "x"),
        ("index_topk_pattern", 5),
        ("index_topk_pattern", [1, 0, 1, 0, 1]),
        ("index_topk_pattern", "FSXSF"),
        ("indexer_types", [1, 0, 1, 0, 1]),
        ("indexer_types", "full"),
        ("num_hidden_layers", "5"),
        ("rms_norm_eps", "small"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(key: str, value: Any):
    described = config_to_json(CONFIG, 1, 0)
    if key.startswith("index_"):
        del described["indexer_types"]
        described["index_topk_freq"] = 2
    with pytest.raises(ValueError) as error:
        config_from_json(described | {key: value})
    said = str(error.value)
    named = "rope_theta" if isinstance(value, dict) else key
    assert said.startswith(f"config.json has {named} ") and said.endswith("own file.")
    assert said.count(". ") == 0 and "needed" in said


def test_a_key_that_is_null_is_as_good_as_absent():
    described = config_to_json(CONFIG, 1, 0)
    del described["indexer_types"]
    nulls = ("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "attention_bias")
    assert config_from_json(described | dict.fromkeys(nulls)) == config_from_json(described)
    moved = {"rope_theta": 5.0, "rope_parameters": {"rope_theta": None, "rope_type": None}}
    assert config_from_json(described | moved).rope_theta == 5.0
    assert config_from_json(described | {"rope_theta": 5.0, "rope_parameters": None})
