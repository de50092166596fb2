"""Whole answers over eight devices are those of one, and no weight travels in a decode step."""

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dspark_jax import ops
from dspark_jax.config import DraftConfig, TargetConfig
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.generation import Generation, generate
from dspark_jax.loop import Request, Weights, decode_step, init_state, prefill, prepare_weights
from dspark_jax.ops import Backend
from dspark_jax.sharding import target_mesh, tree_shardings
from dspark_jax.targets.families import make_target
from dspark_jax.targets.mesh import family
from dspark_jax.types import Draft, Rows, Target
from tests.property.test_sharded_targets import GLM, QWEN3, collectives, params_of

pytestmark = pytest.mark.optimised

V, LIMIT, CHUNK, CAPACITY = 12, 30, 6, 48
TARGETS: dict[str, TargetConfig] = {
    "glm": replace(
        GLM,
        vocab_size=V,
        num_hidden_layers=2,
        indexer_types=("full", "shared"),
        first_k_dense_replace=1,
        aux_layer_ids=(1, 2),
    ),
    "qwen3": replace(QWEN3, vocab_size=V, num_hidden_layers=2, aux_layer_ids=(0, 2)),
}
DRAFT = DraftConfig(
    vocab_size=V,
    draft_vocab_size=8,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    aux_layer_ids=(),
    mask_token_id=V - 1,
    block_size=4,
    markov_rank=8,
)
TARGET_ID = np.array([v for v in range(V) if v % 3 != 1])
"""What the draft can propose: a part of the vocabulary that every device of a group shares."""


class Case(NamedTuple):
    """Which target decodes how many sequences with which draft."""

    target: str
    batch: int
    head: Any
    from_anchor: bool
    candidates: int | None = None

    @property
    def draft(self) -> DraftConfig:
        return replace(
            DRAFT,
            aux_layer_ids=TARGETS[self.target].aux_layer_ids,
            markov_head_type=self.head,
            sample_from_anchor=self.from_anchor,
        )


class Pair(NamedTuple):
    """A target and its draft with their weights laid out on a mesh, or on one device."""

    target: Target
    draft: Draft
    weights: Weights


def pair(case: Case, mesh: Mesh | None, fp8: bool = False) -> Pair:
    """Both models of a case, with weights far from their start."""
    config = TARGETS[case.target]
    target, draft = make_target(config, mesh), dspark_draft(case.draft, mesh, case.candidates)
    params = jax.tree.map(jnp.asarray, params_of(config, fp8))
    draft_params = jax.tree.map(lambda x: 3 * x, init_draft_params(case.draft, 5))
    frozen = target.frozen(params, jnp.asarray(TARGET_ID))
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, params, family(config)))
        lie = tree_shardings(mesh, (draft_params, frozen), "draft")
        draft_params, frozen = jax.device_put((draft_params, frozen), lie)
    prepared = jax.jit(partial(prepare_weights, target, draft))(params, draft_params, frozen)
    return Pair(target, draft, prepared)


def request(batch: int, temperature: float = 0.0) -> Request:
    """Answers of several lengths, some with fewer drafts checked than are made."""
    number = jnp.arange(batch)
    return Request(8 - number % 7, jnp.full(batch, temperature), LIMIT - number % 3)


@cache
def answers(
    case: Case, shape: tuple[int, int] | None, temperature: float = 0.0, kernels: bool = False
) -> Generation:
    """What is generated after prompts of one to six tokens."""
    del kernels  # who asks for them settles what is traced; here they only tell answers apart
    mesh = None if shape is None else target_mesh(jax.devices(), shape[1])
    target, draft, weights = pair(case, mesh)
    batch = case.batch
    tokens = np.random.default_rng(2).integers(0, V, (batch, CHUNK))
    real = np.arange(CHUNK) < np.arange(batch)[:, None] % CHUNK
    rows = Rows(jnp.asarray(tokens), jnp.where(real, jnp.arange(CHUNK), CAPACITY))

    def answer(weights: Weights, rows: Rows, request: Request) -> Generation:
        keys = jax.random.split(jax.random.key(0), batch)
        state = init_state(target, draft, keys, CAPACITY)
        state = prefill(target, draft, weights, state, rows, rows.tokens[:, -1])
        return generate(target, draft, weights, state, request, LIMIT, jnp.array([-1]))[1]

    return jax.tree.map(np.asarray, jax.jit(answer)(weights, rows, request(batch, temperature)))


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


CASES = [
    ((4, 2), Case("glm", 8, "vanilla", True)),
    ((2, 4), Case("qwen3", 8, "gated", True)),
    slow((2, 4), Case("glm", 3, "rnn", False)),
    slow((4, 2), Case("qwen3", 3, "vanilla", False)),
    slow((4, 2), Case("glm", 3, "gated", False)),
    slow((2, 4), Case("glm", 8, "gated", True)),
    slow((4, 2), Case("qwen3", 8, "rnn", True)),
    slow((2, 4), Case("qwen3", 3, "rnn", False)),
    slow((8, 1), Case("glm", 8, "rnn", True)),
    slow((2, 4), Case("qwen3", 8, "gated", True, 3)),
    slow((4, 2), Case("glm", 3, "rnn", False, 3)),
]


@pytest.mark.parametrize(("shape", "case"), CASES)
def test_many_devices_give_the_answers_of_one(shape: tuple[int, int], case: Case) -> None:
    many, one = answers(case, shape), answers(case, None)
    assert np.array_equal(one.length, LIMIT - np.arange(case.batch) % 3)
    for name in set(Generation._fields) - {"confidence"}:
        assert np.array_equal(getattr(many, name), getattr(one, name)), name
    np.testing.assert_allclose(many.confidence, one.confidence, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "case", "temperature"),
    [
        ((2, 4), Case("qwen3", 8, "gated", True), 1.0),
        slow((4, 2), Case("glm", 8, "rnn", False), 1.0),
        slow((2, 4), Case("qwen3", 3, "vanilla", True), 0.0),
        slow((8, 1), Case("qwen3", 8, "vanilla", False), 1.0),
    ],
)
def test_devices_whose_kernels_share_a_vocabulary_draw_as_one(
    shape: tuple[int, int], case: Case, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = answers(case, None, temperature)
    monkeypatch.setattr(ops, "backend_of", lambda *_: Backend("tpu", {"interpret": True}))
    with ops.using("auto"):
        many, ran = answers(case, shape, temperature, kernels=True), ops.picked()
    for op in ("markov.markov_step", "acceptance.row_statistics", "acceptance.residual_draw"):
        assert ran[op] == "tpu kernel"
    assert np.array_equal(many.tokens, one.tokens)
    assert np.array_equal(many.accepted, one.accepted)
    assert one.accepted.sum() > case.batch, "little was accepted, so little was compared"


def test_the_example_is_worth_checking() -> None:
    one = answers(CASES[0][1], None)
    assert one.survived[:, 0].sum() > 2
    assert len({tuple(row) for row in one.tokens}) == len(one.tokens)
    assert all(len(set(row)) > 2 for row in one.tokens)


STEPS = [((4, 2), Case("glm", 8, "vanilla", True)), slow((2, 4), Case("qwen3", 8, "rnn", True))]


@pytest.mark.parametrize(("shape", "case"), STEPS)
def test_no_collective_of_a_decode_step_carries_weights(shape: tuple[int, int], case: Case) -> None:
    target, draft, weights = pair(case, target_mesh(jax.devices(), shape[1]))
    state = init_state(target, draft, jax.random.split(jax.random.key(0), case.batch), CAPACITY)
    step = jax.jit(partial(decode_step, target, draft), donate_argnums=1)
    text = step.lower(weights, state, request(case.batch)).compile().as_text() or ""
    drafts, size, own = draft.draft_length, case.draft.hidden_size, case.batch // shape[0]
    slots, rows, group = case.draft.block_size, drafts + 1, shape[1]
    listed = {
        # Sums of a group's columns: of the draft's block, of the verified rows.
        ("all-reduce", f"f32[{own},{slots},{size}]"),
        ("all-reduce", f"f32[{own},{rows},{size}]"),
        # Everyone's columns: base logits, Markov bias, fused context, the target's logits.
        ("all-gather", f"f32[{group},{own},{drafts},{DRAFT.draft_vocab_size // group}]"),
        ("all-gather", f"f32[{group},{own},{DRAFT.draft_vocab_size // group}]"),
        ("all-gather", f"f32[{group},{own},{rows},{size // group}]"),
        ("all-gather", f"f32[{group},{own},{rows},{V // group}]"),
    }
    if case.target == "glm":  # the experts of all devices see the rows of all groups
        listed |= {
            ("all-gather", f"f32[{case.batch},{rows},{size}]"),
            ("reduce-scatter", f"f32[{own},{rows},{size}]"),
        }
    assert set(collectives(text)) == listed
