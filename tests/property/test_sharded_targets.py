"""A target over eight devices computes what one device does, and only what is listed travels."""

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import GlmConfig, Qwen3Config, TargetConfig
from dspark_jax.fp8 import BlockScaled, quantise
from dspark_jax.sharding import target_mesh, tree_shardings
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.targets.mesh import family
from dspark_jax.types import Rows

pytestmark = pytest.mark.optimised

GLM = GlmConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=7,
    num_attention_heads=8,
    n_routed_experts=24,
    num_experts_per_tok=3,
    n_shared_experts=2,
    q_lora_rank=16,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    index_topk=7,
    index_head_dim=8,
    index_n_heads=3,
    first_k_dense_replace=2,
    indexer_types=("full", "full", "full", "shared", "full", "shared", "full"),
    aux_layer_ids=(0, 2, 5),
    unroll_layers=0,
)
QWEN3 = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    aux_layer_ids=(1, 3),
    unroll_layers=0,
)
QWEN3_MOE = replace(
    QWEN3, num_experts=24, num_experts_per_tok=4, moe_intermediate_size=16, norm_topk_prob=True
)
TARGETS = {
    "glm": GLM,
    "glm_few_experts": replace(GLM, n_routed_experts=8, unroll_layers=8),
    "glm_uneven_experts": replace(GLM, n_routed_experts=18),
    "qwen3_tied": replace(QWEN3, tie_word_embeddings=True, unroll_layers=8),
    "qwen3_moe": QWEN3_MOE,
}
BLOCK = (8, 8)


def params_of(config: TargetConfig, fp8: bool = False) -> Any:
    """Weights far from their start, every kernel a layer has in FP8 if so wished."""
    shapes = jax.eval_shape(lambda: init_params(config, 3))
    rng = np.random.default_rng(4)

    def draw(path: Any, shape: Any) -> np.ndarray:
        norm = "norm" in jax.tree_util.keystr(path)
        return (norm + 0.2 * rng.standard_normal(shape.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    if not fp8:
        return params
    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state(
        [
            (path, p.replace(quantise(jnp.asarray(p[...]), BLOCK)) if is_quantised(path) else p)
            for path, p in flat
        ]
    )


def is_quantised(path: tuple[Any, ...]) -> bool:
    linear = path[-1] == "kernel" and path[-2] not in ("gate", "weights_proj", "lm_head")
    return linear or "experts" in path


@cache
def states_of(
    config: TargetConfig, shape: tuple[int, int] | None, batch: int = 8, fp8: bool = False
) -> Any:
    """A pass over packed rows, and the same through the cache in ragged chunks, with logits."""
    params = params_of(config, fp8)
    mesh = None if shape is None else target_mesh(jax.devices()[: shape[0] * shape[1]], shape[1])
    target = make_target(config, mesh)
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, params, family(config)))
    tokens = jax.random.randint(jax.random.key(1), (batch, 13), 0, 64)
    place = jnp.broadcast_to(jnp.arange(13), tokens.shape)
    packed = jnp.where(place < 9, place, place - 9)
    forward = jax.jit(target.forward)(params, tokens, 1 + (place >= 9), packed)
    prepared, found = jax.jit(target.prepare)(params), []
    step = jax.jit(target.extend, donate_argnums=1)
    cache = target.init_cache(batch, 16)
    # Rows past the capacity are padding: every sequence has a length of its own, in its first part.
    short = jnp.arange(5) >= 5 - jnp.arange(batch)[:, None] % 3
    for start, left_out in ((0, short), (2, False), (7, False)):
        piece = slice(start, start + 5)
        rows = jnp.where(left_out, 16, place[:, piece])
        cache, states = step(prepared, cache, Rows(tokens[:, piece], rows))
        real = (rows < 16)[..., None]
        found.append(jax.tree.map(lambda x, real=real: jnp.where(real, x, 0), states))
    return forward, found, jax.jit(target.logits)(prepared, found[-1].final_hidden)


def close(ours: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def slow(*case: object) -> object:
    """A case for the slow runs."""
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    ("glm", (4, 2)),
    ("glm_uneven_experts", (8, 1)),
    ("qwen3_tied", (4, 2)),
    ("qwen3_moe", (2, 4)),
    slow("glm", (8, 1)),
    slow("glm", (1, 8)),
    slow("glm_few_experts", (2, 4)),
    slow("glm_uneven_experts", (4, 2)),
    slow("glm_uneven_experts", (1, 8)),
    slow("qwen3_moe", (8, 1)),
]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_many_devices_give_the_numbers_of_one(name: str, shape: tuple[int, int]) -> None:
    close(states_of(TARGETS[name], shape), states_of(TARGETS[name], None))


def test_a_batch_that_the_groups_cannot_share_is_whole_on_each() -> None:
    close(states_of(GLM, (4, 2), 3), states_of(GLM, None, 3))


@pytest.mark.parametrize("name", [slow("glm"), "qwen3_moe"])
def test_fp8_weights_are_shared_like_others(name: str) -> None:
    params = params_of(TARGETS[name], fp8=True)
    assert any(map(is_scaled, jax.tree.leaves(params, is_leaf=is_scaled)))
    close(states_of(TARGETS[name], (4, 2), 8, True), states_of(TARGETS[name], None, 8, True))


def is_scaled(x: Any) -> bool:
    return isinstance(x, BlockScaled)


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (replace(GLM, num_attention_heads=6), (2, 4), "6 attention heads by 4"),
        (replace(QWEN3, num_key_value_heads=1), (1, 2), "1 key-value heads by 2"),
        (replace(QWEN3, vocab_size=63, intermediate_size=50), (2, 4), "63 vocabulary rows by 4"),
    ],
)
def test_a_mesh_that_shares_unevenly_is_refused(
    config: TargetConfig, shape: tuple[int, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_target(config, target_mesh(jax.devices()[: shape[0] * shape[1]], shape[1]))


COLLECTIVE = re.compile(
    r"= \(?(?P<shapes>[^=]*?)\)? "
    r"(?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\("
)


def collectives(text: str) -> Counter[tuple[str, str]]:
    """(kind, what) of every collective of a compiled program."""
    return Counter(
        (found["kind"], re.sub(r"\{[\d,]*\}", "", found["shapes"]))
        for found in COLLECTIVE.finditer(text)
    )


def compiled_step(config: TargetConfig, shape: tuple[int, int], fp8: bool = False) -> str:
    """The optimised program of a pass over eight sequences of four rows."""
    mesh = target_mesh(jax.devices(), shape[1])
    target = make_target(config, mesh)
    params = params_of(config, fp8)
    params = jax.device_put(params, tree_shardings(mesh, params, family(config)))
    rows = Rows(jnp.zeros((8, 4), jnp.int32), jnp.zeros((8, 4), jnp.int32))
    lowered = jax.jit(target.extend, donate_argnums=1).lower(params, target.init_cache(8, 16), rows)
    return lowered.compile().as_text() or ""


LISTED = {
    # Of a group of 8 / tensor sequences: [B S D]. One sum for the embedding, one per layer after
    # attention, one after the MLP; a mixture also gathers all rows and scatters their sums.
    ("glm", (4, 2)): {("all-reduce", "f32[2,4,32]"), ("all-gather", "f32[8,4,32]")},
    ("glm", (8, 1)): {("all-gather", "f32[8,4,32]")},
    ("qwen3_moe", (2, 4)): {("all-reduce", "f32[4,4,32]"), ("all-gather", "f32[8,4,32]")},
    ("qwen3_tied", (4, 2)): {("all-reduce", "f32[2,4,32]")},
}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("name", "shape"), LISTED)
def test_no_collective_carries_weights(name: str, shape: tuple[int, int], fp8: bool) -> None:
    config = replace(TARGETS[name], unroll_layers=100)
    found = collectives(compiled_step(config, shape, fp8))
    listed = LISTED[name, shape]
    scattered = {entry for entry in found if entry[0] == "reduce-scatter"}
    assert set(found) - scattered == listed
    layers, data = config.num_hidden_layers, shape[0]
    sparse = sum("sparse" in kind for kind in config.layer_kinds)
    for kind, what in found:
        expected = {"all-gather": sparse, "reduce-scatter": sparse, "all-reduce": 1 + 2 * layers}
        assert found[kind, what] == expected[kind]
    assert {what for _, what in scattered} == ({f"f32[{8 // data},4,32]"} if sparse else set())


@pytest.mark.parametrize("config", [GLM, QWEN3_MOE], ids=["glm", "qwen3_moe"])
def test_a_deep_model_is_no_longer_program_than_a_shallow_one(config: TargetConfig) -> None:
    def instructions(layers: int) -> int:
        deep: TargetConfig = replace(config, num_hidden_layers=layers)
        if isinstance(deep, GlmConfig):
            kinds = ("full",) * 3 + ("shared",) * 3 + ("full", "shared", "shared", "shared") * 20
            deep = replace(deep, indexer_types=kinds[:layers], first_k_dense_replace=3)
        text = compiled_step(deep, (4, 2))
        return sum(" = " in line for line in text.splitlines())

    assert instructions(78) == instructions(14)
