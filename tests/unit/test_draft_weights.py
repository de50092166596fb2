"""Published tensors and config.json go in and out unchanged, and misfits are all named."""

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DraftConfig, MarkovHeadType
from dspark_jax.draft_formats.speculators import config_from_json, config_to_json
from dspark_jax.draft_weights import (
    NOT_TRAINED,
    parameter_table,
    params_from_tensors,
    tensors_from_params,
    warm_start,
)
from dspark_jax.drafter import Drafter

CONFIG = DraftConfig(
    vocab_size=31,
    draft_vocab_size=22,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    aux_layer_ids=(1, 3),
    mask_token_id=30,
    block_size=4,
    layer_types=("full_attention", "sliding_attention", "full_attention"),
    sliding_window=5,
    markov_rank=5,
    rope_theta=8e6,
)
PLAIN = replace(
    CONFIG, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
)


def make_tensors(config: DraftConfig) -> dict[str, np.ndarray]:
    """Random tensors under the published names, in the published layout."""
    rng = np.random.default_rng(0)
    table = parameter_table(config)
    return {row.name: rng.standard_normal(row.shape).astype(np.float32) for row in table}


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("unroll_layers", [8, 0])
@pytest.mark.parametrize("head", get_args(MarkovHeadType))
def test_reading_and_writing_are_inverse(head: MarkovHeadType, unroll_layers: int):
    config = replace(CONFIG, markov_head_type=head, unroll_layers=unroll_layers)
    tensors = make_tensors(config)
    assert_same(tensors_from_params(params_from_tensors(config, tensors)), tensors)
    drafter = Drafter(config, nnx.Rngs(4))
    again = params_from_tensors(config, tensors_from_params(drafter))
    assert_same(nnx.to_pure_dict(nnx.state(again)), nnx.to_pure_dict(nnx.state(drafter)))


def test_stacked_layers_have_the_tensors_of_single_ones():
    names = {row.name: row.shape for row in parameter_table(CONFIG)}
    stacked = parameter_table(replace(CONFIG, unroll_layers=0))
    assert {row.name: row.shape for row in stacked} == names
    assert names["layers.2.self_attn.k_proj.weight"] == (8, 12)
    assert names["fc.weight"] == (12, 24)
    assert names["markov_head.markov_w1.weight"] == (31, 5)
    assert names["confidence_head.proj.weight"] == (1, 17)


def test_half_precision_tensors_become_float32_parameters():
    half = {name: x.astype(jnp.bfloat16) for name, x in make_tensors(CONFIG).items()}
    tensors = tensors_from_params(params_from_tensors(CONFIG, half))
    assert all(x.dtype == np.float32 for x in tensors.values())
    assert_same({name: x.astype(jnp.bfloat16) for name, x in tensors.items()}, half)


def test_tensors_of_the_target_are_passed_over():
    tensors = make_tensors(CONFIG)
    params_from_tensors(CONFIG, {**tensors, **dict.fromkeys(NOT_TRAINED, np.zeros(1))})


def test_every_misfit_is_named_in_one_error():
    tensors = make_tensors(CONFIG)
    del tensors["fc.weight"], tensors["layers.1.mlp.up_proj.weight"]
    tensors["layers.3.mlp.up_proj.weight"] = np.zeros((20, 12))
    tensors["norm.weight"] = np.zeros(13)
    tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"].T
    with pytest.raises(ValueError) as error:
        params_from_tensors(CONFIG, tensors)
    assert str(error.value).partition("together: ")[2].split("; ") == [
        "missing fc.weight [12, 24]",
        "missing layers.1.mlp.up_proj.weight [20, 12]",
        "unknown layers.3.mlp.up_proj.weight",
        "mis-shaped markov_head.markov_w2.weight: found [5, 22], the config needs [22, 5]",
        "mis-shaped norm.weight: found [13], the config needs [12]",
    ]


def test_a_draft_without_heads_starts_one_with_heads():
    tensors = make_tensors(PLAIN)
    drafter, drawn = warm_start(CONFIG, tensors, nnx.Rngs(3))
    ours = tensors_from_params(drafter)
    assert set(drawn) == set(ours) - set(tensors)
    assert all(name.startswith(("markov_head.", "confidence_head.")) for name in drawn)
    assert_same({name: ours[name] for name in tensors}, tensors)
    assert np.std(ours["markov_head.markov_w1.weight"]) == pytest.approx(0.01, rel=0.3)


def test_a_draft_without_a_markov_head_gets_both_heads():
    rankless = replace(CONFIG, markov_rank=0, confidence_head_with_markov=False)
    drafter, drawn = warm_start(CONFIG, make_tensors(rankless), nnx.Rngs(3))
    assert {name.partition(".")[0] for name in drawn} == {"markov_head", "confidence_head"}
    assert drafter.config == CONFIG


def test_a_complete_draft_draws_nothing():
    tensors = make_tensors(CONFIG)
    drafter, drawn = warm_start(CONFIG, tensors, nnx.Rngs(3))
    assert drawn == ()
    assert_same(tensors_from_params(drafter), tensors)


def test_half_a_head_or_a_missing_layer_is_no_warm_start():
    tensors = make_tensors(CONFIG)
    del tensors["markov_head.markov_w2.weight"], tensors["norm.weight"]
    with pytest.raises(ValueError, match=r"missing markov_head\.markov_w2\.weight.*; missing norm"):
        warm_start(CONFIG, tensors, nnx.Rngs(3))


def described(config: DraftConfig) -> dict[str, Any]:
    return config_to_json(config, "org/target", ["GlmMoeDsaForCausalLM"], "bfloat16")


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, sample_from_anchor=False, markov_head_type="rnn", target_hidden_size=16),
        replace(CONFIG, sliding_window_non_causal=True, confidence_head_with_markov=False),
        replace(PLAIN, layer_types=(), sliding_window=2048),
    ],
)
def test_config_json_round_trips(config: DraftConfig):
    assert config_from_json(described(config)) == config


def test_speculative_tokens_are_the_drafted_tokens():
    def written(config: DraftConfig) -> int:
        (method,) = described(config)["speculators_config"]["proposal_methods"]
        return method["speculative_tokens"]

    assert written(CONFIG) == 4
    assert written(replace(CONFIG, sample_from_anchor=False)) == 3


def test_absent_keys_are_all_named_and_none_is_guessed():
    config = described(CONFIG)
    del config["sample_from_anchor"], config["transformer_layer_config"]["head_dim"]
    with pytest.raises(ValueError, match=r"sample_from_anchor, transformer_layer_config\.head_dim"):
        config_from_json(config)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": None},
    ],
)
def test_a_draft_of_another_kind_is_refused(change: dict[str, Any]):
    config = described(CONFIG)
    config["transformer_layer_config"] |= change
    with pytest.raises(ValueError, match="drafts here"):
        config_from_json(config)


def test_rope_theta_is_read_from_older_files_too():
    config = described(CONFIG)
    del config["transformer_layer_config"]["rope_parameters"]
    config["transformer_layer_config"] |= {"rope_theta": 8_000_000, "rope_scaling": None}
    assert config_from_json(config) == CONFIG
