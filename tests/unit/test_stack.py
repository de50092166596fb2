"""Layers are grouped so that few are compiled, in their order, and run to the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dspark_jax.layers import Linear
from dspark_jax.stack import LONGEST_UNIT, Group, build_layers, members, plan_groups, run_layers
from dspark_jax.targets.glm_config import config_from_json

GLM_5_2 = {"num_hidden_layers": 78, "index_topk_freq": 4, "index_skip_topk_offset": 3}
"""What decides the kinds of GLM-5.2's layers, with `first_k_dense_replace` 3."""


def glm_kinds() -> list[tuple[str, str]]:
    """(indexer, mlp) of every layer of GLM-5.2, written out from its published pattern."""
    full = {0, 1, 2, *range(6, 78, 4)}
    return [("full" if i in full else "shared", "dense" if i < 3 else "sparse") for i in range(78)]


def compiled_layers(groups: tuple[Group, ...]) -> int:
    return sum(group.unit for group in groups)


def test_the_layers_of_glm_5_2_become_two_scans_and_little_else():
    groups = plan_groups(glm_kinds(), 8)
    assert groups[0] == Group(0, 1, 3)
    assert groups[1].unit == 4 and groups[1].repeats == 18
    assert compiled_layers(groups) <= 8
    assert sorted(layer for *_, layer in members(groups)) == list(range(78))


def test_the_kinds_of_glm_5_2_are_read_from_its_config():
    sizes = dict.fromkeys(
        (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_attention_heads "
            "n_routed_experts num_experts_per_tok n_shared_experts q_lora_rank kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim index_topk index_head_dim index_n_heads"
        ).split(),
        8,
    )
    described = sizes | GLM_5_2 | {"model_type": "glm_moe_dsa", "first_k_dense_replace": 3}
    described["rope_parameters"] = {"rope_theta": 8e6, "rope_type": "default"}
    assert list(config_from_json(described).layer_kinds) == glm_kinds()


def test_a_shallow_model_is_not_stacked():
    assert plan_groups("aaaa", 4) == tuple(Group(i, 1, 1) for i in range(4))
    assert plan_groups("aaaa", 3) == (Group(0, 1, 4),)
    assert plan_groups("", 0) == ()


@pytest.mark.parametrize(
    ("kinds", "groups"),
    [
        ("abab", [Group(0, 2, 2)]),
        ("xababab", [Group(0, 1, 1), Group(1, 2, 3)]),
        ("aaabbb", [Group(0, 1, 3), Group(3, 1, 3)]),
        ("abc", [Group(0, 1, 1), Group(1, 1, 1), Group(2, 1, 1)]),
    ],
)
def test_the_longest_repetition_is_taken_by_its_shortest_unit(kinds: str, groups: list[Group]):
    assert list(plan_groups(kinds, 0)) == groups


@given(st.text("ab", max_size=30), st.integers(0, 10))
def test_groups_cover_every_layer_once_and_mix_no_kinds(kinds: str, unroll: int):
    groups = plan_groups(kinds, unroll)
    layers = [layer for *_, layer in members(groups)]
    assert layers == list(range(len(kinds)))
    for group in groups:
        assert group.unit <= LONGEST_UNIT
        for member in range(group.unit):
            repeats = range(group.repeats)
            assert len({kinds[group.layer(member, repeat)] for repeat in repeats}) == 1


def test_running_by_scan_equals_running_one_by_one():
    kinds = "xababab"
    groups = plan_groups(kinds, 0)
    stacked = build_layers(groups, lambda _, rngs: Linear(3, 3, rngs=rngs), nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 3))
    scale = np.arange(1.0, 8.0)
    inputs = [[scale[0]], [scale[1::2], scale[2::2]]]

    def step(layer: Linear, carry: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = carry + factor * layer(carry)
        return carry, carry

    last, outputs = run_layers(groups, stacked, x, inputs, step)
    for group, member, repeat, layer in members(groups):
        kernel = stacked[group][member].kernel[...]
        x = x + scale[layer] * x @ (kernel if repeat is None else kernel[repeat])
        output = outputs[group][member]
        np.testing.assert_allclose(output if repeat is None else output[repeat], x, rtol=1e-5)
    np.testing.assert_allclose(last, x, rtol=1e-5)


def test_every_stacked_layer_has_weights_of_its_own():
    groups = plan_groups("aaaa", 0)
    layers = build_layers(groups, lambda _, rngs: Linear(4, 4, rngs=rngs), nnx.Rngs(0))
    kernel = layers[0][0].kernel[...]
    assert kernel.shape == (4, 4, 4)
    assert all(jnp.any(kernel[0] != kernel[i]) for i in range(1, 4))
