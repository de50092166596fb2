"""Every formulation of the experts is the mixture that a loop over tokens computes."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import GlmConfig
from dspark_jax.fp8 import dequantise, quantise
from dspark_jax.targets.moe import Moe, all_experts, chosen_experts, local_experts

CONFIG = GlmConfig(
    vocab_size=11,
    hidden_size=10,
    intermediate_size=8,
    moe_intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    n_routed_experts=7,
    num_experts_per_tok=3,
    n_shared_experts=2,
    q_lora_rank=7,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    index_topk=3,
    index_head_dim=6,
    index_n_heads=3,
    first_k_dense_replace=0,
    indexer_types=("full",),
    routed_scaling_factor=1.8,
)
X = jax.random.normal(jax.random.key(5), (2, 6, CONFIG.hidden_size))


@lru_cache
def moe() -> Moe:
    """A mixture whose weights and router bias are drawn wide, so that both show."""
    graphdef, params = nnx.split(Moe(CONFIG, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    wide = [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, wide))


def wide(param: Any) -> np.ndarray:
    return np.asarray(param[...], float)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    g = x @ gate
    return (g * sigmoid(g) * (x @ up)) @ down


def routed(x: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(chosen experts, their weights) of one token."""
    score = sigmoid(x @ wide(moe().gate.kernel))
    ranked = np.argsort(-(score + wide(moe().gate.e_score_correction_bias)), kind="stable")
    chosen = ranked[: CONFIG.num_experts_per_tok]
    return list(chosen), CONFIG.routed_scaling_factor * score[chosen] / score[chosen].sum()


def token_by_token() -> np.ndarray:
    experts, shared = moe().experts, moe().shared_experts
    gate, up, down = (wide(p) for p in (experts.gate_proj, experts.up_proj, experts.down_proj))
    always = [wide(p.kernel) for p in (shared.gate_proj, shared.up_proj, shared.down_proj)]
    out = np.zeros(X.shape)
    for place in np.ndindex(X.shape[:2]):
        x = np.asarray(X[place], float)
        out[place] = swiglu(x, *always)
        for e, weight in zip(*routed(x), strict=True):
            out[place] += weight * swiglu(x, gate[e], up[e], down[e])
    return out


def test_the_dense_formulation_equals_a_loop_over_tokens():
    expected = token_by_token()
    np.testing.assert_allclose(moe()(X)[0], expected, atol=1e-5 * np.abs(expected).max())


def test_weights_are_those_of_the_chosen_experts_and_zero_elsewhere():
    _, routing = moe()(X)
    for place in np.ndindex(X.shape[:2]):
        chosen, weight = routed(np.asarray(X[place], float))
        expected = np.zeros(CONFIG.n_routed_experts)
        expected[chosen] = weight
        np.testing.assert_allclose(routing.weight[place], expected, rtol=1e-4, atol=1e-6)
        assert set(routing.expert[place].tolist()) == set(chosen)


def test_the_bias_chooses_but_does_not_weigh():
    gate = nnx.clone(moe().gate)
    before = gate(X)
    gate.e_score_correction_bias[...] += 100 * (jnp.arange(CONFIG.n_routed_experts) == 2)
    after = gate(X)
    assert jnp.all(jnp.any(after.expert == 2, axis=-1))
    assert np.array_equal(before.logits, after.logits)
    total = after.weight.sum(-1)
    np.testing.assert_allclose(total, CONFIG.routed_scaling_factor, rtol=1e-5)


def test_a_token_does_not_see_its_neighbours():
    alone = moe()(X[:, 3:4])[0]
    np.testing.assert_allclose(alone, moe()(X)[0][:, 3:4], rtol=1e-5, atol=1e-6)


def test_the_router_works_in_float32_whatever_comes_in():
    narrow = X.astype(jnp.bfloat16)
    out, routing = moe()(narrow)
    assert out.dtype == jnp.bfloat16 and routing.logits.dtype == jnp.float32
    assert np.array_equal(routing.logits, moe().gate(narrow.astype(jnp.float32)).logits)


class Choices(NamedTuple):
    """Rows, the experts each chose, the weights of these, and the kernels of all experts."""

    rows: jax.Array
    expert: jax.Array
    share: jax.Array
    kernels: tuple[Any, ...]


def routed_rows() -> tuple[Choices, jax.Array]:
    """What `moe` chooses for X, and the weights of all experts."""
    experts, routing = moe().experts, moe().gate(X)
    rows, expert, weight = (a.reshape(-1, a.shape[-1]) for a in (X, routing.expert, routing.weight))
    kernels = (experts.gate_proj[...], experts.up_proj[...], experts.down_proj[...])
    return Choices(rows, expert, jnp.take_along_axis(weight, expert, axis=-1), kernels), weight


def test_running_only_the_chosen_experts_changes_nothing():
    given, weight = routed_rows()
    wanted = all_experts(given.rows, weight, *given.kernels)
    chosen = chosen_experts(*given[:3], *given.kernels)
    np.testing.assert_allclose(chosen, wanted, rtol=2e-5, atol=1e-5)


def test_a_row_of_chosen_experts_never_meets_its_neighbours():
    given, _ = routed_rows()
    order = np.random.default_rng(0).permutation(len(given.rows))
    together = chosen_experts(*given[:3], *given.kernels)
    shuffled = chosen_experts(*(a[order] for a in given[:3]), *given.kernels)
    np.testing.assert_allclose(shuffled, together[order], rtol=1e-6, atol=1e-6)


EXPERTS, DEVICES, CHOSEN, ROWS = 24, 8, 4, 40
BLOCK = (4, 4)
CHOICES = ("drawn", "a_few_of_one_device", "none_of_most_devices")


def drawn(choice: str, fp8: bool = False) -> Choices:
    """Rows that choose among as many experts as several devices share."""
    rng = np.random.default_rng(7)
    # Experts of a device that all rows choose are more rows than its first chunk holds.
    of = {"drawn": EXPERTS, "a_few_of_one_device": CHOSEN, "none_of_most_devices": 2 * CHOSEN}
    expert = np.stack([rng.permutation(of[choice])[:CHOSEN] for _ in range(ROWS)])
    shapes = (EXPERTS, 10, 6), (EXPERTS, 10, 6), (EXPERTS, 6, 10)
    kernels = tuple(jnp.asarray(0.5 * rng.standard_normal(s), jnp.float32) for s in shapes)
    return Choices(
        jnp.asarray(rng.standard_normal((ROWS, 10)), jnp.float32),
        jnp.asarray(expert, jnp.int32),
        jnp.asarray(rng.uniform(0.1, 1, expert.shape), jnp.float32),
        tuple(quantise(k, BLOCK) for k in kernels) if fp8 else kernels,
    )


@jax.jit
def part_of(given: Choices, device: int) -> jax.Array:
    """What one device's experts add to every row."""
    here = EXPERTS // DEVICES
    kernels = [
        jax.tree.map(lambda k: jax.lax.dynamic_slice_in_dim(k, device * here, here), kernel)
        for kernel in given.kernels
    ]
    gate, up, down = kernels
    local = given.expert - device * here
    return local_experts(given.rows, local, given.share, gate, up, down, EXPERTS)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_parts_of_all_devices_sum_to_the_chosen_experts(choice: str, fp8: bool):
    given = drawn(choice, fp8)
    parts = [part_of(given, device) for device in range(DEVICES)]
    kernels = [dequantise(k, jnp.float32) if fp8 else k for k in given.kernels]
    wanted = chosen_experts(*given[:3], *kernels)
    np.testing.assert_allclose(sum(parts), wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_a_device_whose_experts_nobody_chose_adds_exactly_nothing(fp8: bool):
    assert not np.any(part_of(drawn("none_of_most_devices", fp8), DEVICES - 1))


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_row_of_local_experts_never_meets_its_neighbours(choice: str, fp8: bool):
    given = drawn(choice, fp8)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = given._replace(**{f: getattr(given, f)[order] for f in Choices._fields[:3]})
    together = part_of(given, 0)
    np.testing.assert_allclose(part_of(shuffled, 0), together[order], rtol=1e-6, atol=1e-6)
    # Huge neighbours that crowd the same experts change nothing either.
    loud = np.arange(ROWS) % 2 == 1
    crowded = given._replace(
        rows=jnp.where(loud[:, None], 1e4, given.rows),
        expert=jnp.where(loud[:, None], jnp.arange(CHOSEN), given.expert),
    )
    found = part_of(crowded, 0)
    np.testing.assert_allclose(found[~loud], together[~loud], rtol=1e-6, atol=1e-6)
