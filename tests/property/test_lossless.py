"""Speculative decoding emits what the target alone would emit: chi-square over the first tokens.

The target is a table over the last two tokens, so the distribution of the first three emitted
tokens is known exactly; thousands of sequences with keys of their own are decoded side by side.
"""

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jaxtyping import Array

from dspark_jax import acceptance, loop
from dspark_jax.config import DraftConfig, GlmConfig
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.draft_decoder import turned_factor
from dspark_jax.drafter import Drafter
from dspark_jax.loop import Request, Weights, decode_step, init_state, prefill
from dspark_jax.spread import ALONE
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.types import Draft, Frozen, Rows, Target, TargetStates, Verdict

V, HIDDEN, BATCH, CAPACITY, FIRST = 6, 8, 6000, 24, 3
PROMPT = (4, 1, 3)
"""The last of these is the anchor of the first round."""
FALSE_ALARM = 1e-5
"""Seeds are fixed, so a lossless program passes for good; a lossy one is many decades below."""
HEADS = ("vanilla", "gated", "rnn", "none")
LENGTHS = ("0", "1", "2", "all", "by_prefix")
DRAFTS = ("random", "perfect", "adversarial")


class Table(NamedTuple):
    """Parameters of a tabular target: logits and aux states by (token before, token)."""

    logits: Array
    aux: Array


class Described(NamedTuple):
    """As much of a target's config as decoding reads."""

    aux_layer_ids: tuple[int, ...] = (1,)
    hidden_size: int = HIDDEN


def table_target() -> Target:
    """A target whose cache holds its tokens: stale or missing rows change its answers."""

    def extend(table: Table, cache: Array, rows: Rows) -> tuple[Array, TargetStates]:
        row = jnp.arange(cache.shape[0])[:, None]
        cache = cache.at[row, rows.position, 0].set(rows.tokens, mode="drop")
        place = jnp.clip(rows.position, 1, cache.shape[1] - 1)
        pair = cache[row, place - 1, 0] * V + rows.tokens
        return cache, TargetStates(table.aux[pair], jax.nn.one_hot(pair, V * V))

    def missing(*_: Any) -> Any:
        raise AssertionError("decoding needs only extend and logits")

    return Target(
        config=Described(),
        forward=missing,
        trace=missing,
        unembed=missing,
        frozen=missing,
        prepare=lambda table: table,
        init_cache=lambda batch, capacity, dtype=None: jnp.zeros((batch, capacity, 1), jnp.int32),
        extend=extend,
        logits=lambda table, hidden: hidden @ table.logits,
    )


def draft_config(head: str, one_plus_n: bool, reduced: bool) -> DraftConfig:
    return DraftConfig(
        vocab_size=V,
        draft_vocab_size=4 if reduced else V,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        aux_layer_ids=(1,),
        mask_token_id=5,
        block_size=4 if one_plus_n else 3,
        sample_from_anchor=not one_plus_n,
        markov_rank=0 if head == "none" else V,
        markov_head_type="vanilla" if head == "none" else head,  # pyright: ignore[reportArgumentType]
        confidence_head_with_markov=head != "none",
    )


def make_weights(config: DraftConfig, kind: str) -> Weights:
    """A target's table and a draft that knows nothing of it, knows it, or turns it upside down."""
    target_id = jnp.asarray([0, 2, 3, 5]) if config.draft_vocab_size < V else jnp.arange(V)
    normal = jax.random.normal
    keys = jax.random.split(jax.random.key(7), 4)
    embed = normal(keys[0], (V, HIDDEN))
    aux = normal(keys[1], (V * V, HIDDEN))
    if kind == "random":
        # Wide weights, so that the draft reads its context; the target reads two tokens.
        wide = jax.tree.map(lambda x: 4 * x, init_draft_params(config, 3))
        head = 0.5 * normal(keys[2], (HIDDEN, len(target_id)))
        table = Table(1.5 * normal(keys[3], (V * V, V)), aux)
        return Weights(table, prepared(config, wide), Frozen(embed, head, target_id))
    # What a Markov head can know depends on one token, and on none without such a head.
    logits = 1.5 * normal(keys[3], (V, V))
    if config.markov_rank == 0:
        logits = jnp.broadcast_to(logits[0], (V, V))
    known = logits[:, target_id] * (1 if kind == "perfect" else -1)
    table = Table(jnp.tile(logits, (V, 1)), aux)
    drafter, lm_head = drafter_of(config, known)
    frozen = Frozen(jnp.ones((V, HIDDEN)), lm_head, target_id)
    return Weights(table, prepared(config, nnx.state(drafter, nnx.Param)), frozen)


def prepared(config: DraftConfig, params: Any) -> Any:
    return dspark_draft(config).prepare(params)


def drafter_of(config: DraftConfig, logits: Array) -> tuple[Drafter, Array]:
    """A drafter and a head that together draft by these logits of (previous token, next)."""
    drafter = Drafter(config, nnx.Rngs(0))
    layer = drafter.layers[0][0]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # every hidden state is ones
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    head = drafter.markov_head
    if head is None:
        return drafter, jnp.tile(logits[0] / HIDDEN, (HIDDEN, 1))
    head.markov_w1[...] = jnp.eye(V)
    head.markov_w2.kernel[...] = logits
    if head.head_type == "gated":
        head.gate_proj.kernel[...] = jnp.zeros_like(head.gate_proj.kernel[...])
        head.gate_proj.bias[...] = jnp.full(V, 50.0, jnp.float32)  # pyright: ignore[reportOptionalSubscript]
    elif head.head_type == "rnn":
        kernel = jnp.zeros_like(head.joint_proj.kernel[...])
        head.joint_proj.kernel[...] = kernel.at[V : 2 * V, 2 * V :].set(30 * jnp.eye(V))
        head.joint_proj.bias[...] = jnp.zeros(3 * V)  # pyright: ignore[reportOptionalSubscript]
    return drafter, jnp.zeros((HIDDEN, logits.shape[1]))


def player(
    target: Target, draft: Draft, most: int | None = None
) -> Callable[..., tuple[Array, Array]]:
    """A compiled function that emits FIRST tokens or more: (tokens, count), both [B, rounds, …].

    `lengths[a]` is the verify length of a round whose anchor is a, known before it drafts; no
    round verifies more than `most`.
    """

    def play(weights: Weights, keys: Array, lengths: Array, temperature: Array) -> Any:
        batch = len(keys)
        rows = jnp.tile(jnp.asarray(PROMPT[:-1]), (batch, 1))
        rows = Rows(rows, jnp.tile(jnp.arange(rows.shape[1]), (batch, 1)))
        anchor = jnp.full(batch, PROMPT[-1])
        state = init_state(target, draft, keys, CAPACITY)
        state = prefill(target, draft, weights, state, rows, anchor)

        def round_(state: Any, _: None) -> Any:
            request = Request(lengths[state.anchor], temperature, jnp.full(batch, CAPACITY))
            return decode_step(target, draft, weights, state, request, most)

        _, emitted = jax.lax.scan(round_, state, length=FIRST)
        return jnp.moveaxis(emitted.tokens, 0, 1), emitted.length.T

    return jax.jit(play)


@lru_cache
def player_of(config: DraftConfig) -> Callable[..., tuple[Array, Array]]:
    return player(table_target(), dspark_draft(config))


@lru_cache
def cached_weights(config: DraftConfig, kind: str) -> Weights:
    return make_weights(config, kind)


def length_table(name: str, draft_length: int) -> Array:
    """The verify length after every anchor; one past the draft length means all."""
    if name == "by_prefix":
        return jnp.arange(V) % (draft_length + 1)
    return jnp.full(V, draft_length + 1 if name == "all" else int(name), jnp.int32)


def first_tokens(tokens: Array, count: Array) -> np.ndarray:
    """The first FIRST emitted tokens of every sequence."""
    real = np.arange(tokens.shape[-1]) < np.asarray(count)[..., None]
    flat, real = np.asarray(tokens).reshape(len(tokens), -1), real.reshape(len(tokens), -1)
    order = np.argsort(~real, axis=1, kind="stable")[:, :FIRST]
    return np.take_along_axis(flat, order, axis=1)


def exact(table: Table, temperature: float = 1.0) -> np.ndarray:
    """Probability of every triple of first tokens, [V, V, V]."""
    p = np.asarray(jax.nn.softmax(table.logits / temperature)).reshape(V, V, V).astype(float)
    a, b = PROMPT[-2:]
    return p[a, b][:, None, None] * p[b][:, :, None] * p


def p_value(drawn: np.ndarray, probability: np.ndarray) -> float:
    """Of the chi-square test; triples expected less than five times count as one."""
    cells = np.ravel_multi_index(tuple(drawn.T), probability.shape)
    seen = np.bincount(cells, minlength=probability.size)
    expected = probability.ravel() / probability.sum() * len(drawn)
    often = expected >= 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (seen, expected)]
    if pooled[1][-1] == 0:  # what is impossible decides alone, or not at all
        if pooled[0][-1]:
            return 0.0
        pooled = [x[:-1] for x in pooled]
    return float(scipy.stats.chisquare(*pooled).pvalue)  # pyright: ignore[reportArgumentType]


def emit(config: DraftConfig, kind: str, length: str, temperature: Any = 1.0, play: Any = None):
    """(tokens, count) of every round of BATCH sequences."""
    keys = jax.random.split(jax.random.key(len(length) + 17), BATCH)
    lengths = length_table(length, config.draft_length)
    weights = cached_weights(config, kind)
    play = play or player_of(config)
    return play(
        weights, keys, lengths, jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), BATCH)
    )


@pytest.mark.parametrize("reduced", [False, True], ids=["whole_vocabulary", "part_of_it"])
@pytest.mark.parametrize("one_plus_n", [False, True], ids=["anchor_first", "one_plus_n"])
@pytest.mark.parametrize("head", HEADS)
def test_first_tokens_are_distributed_as_the_targets(head: str, one_plus_n: bool, reduced: bool):
    config, values = draft_config(head, one_plus_n, reduced), {}
    for kind, length in itertools.product(DRAFTS, LENGTHS):
        expected = exact(cached_weights(config, kind).target)
        values[kind, length] = p_value(first_tokens(*emit(config, kind, length)), expected)
    assert {case: p for case, p in values.items() if p < FALSE_ALARM} == {}


@pytest.mark.parametrize("head", HEADS)
def test_a_perfect_draft_is_always_accepted_whole(head: str):
    config = draft_config(head, False, False)
    for length, n in (("0", 0), ("1", 1), ("2", 2), ("all", config.draft_length)):
        _, count = emit(config, "perfect", length)
        assert jnp.all(count == n + 1)


@pytest.mark.parametrize("head", HEADS)
def test_a_verify_pass_with_room_for_fewer_drafts_changes_only_how_many_are_kept(head: str):
    config = draft_config(head, False, False)
    play = player(table_target(), dspark_draft(config), most=1)
    expected = exact(cached_weights(config, "random").target)
    assert p_value(first_tokens(*emit(config, "random", "all", play=play)), expected) > FALSE_ALARM
    _, count = emit(config, "perfect", "all", play=play)
    assert jnp.all(count == 2)
    for length in ("all", "1"):
        shorter = first_tokens(*emit(config, "random", length, 0.0, play))
        whole = first_tokens(*emit(config, "random", length, 0.0))
        assert np.array_equal(shorter, whole)


def test_another_temperature_is_kept_too():
    config = draft_config("vanilla", False, True)
    table = cached_weights(config, "random").target
    drawn = first_tokens(*emit(config, "random", "all", 0.5))
    assert p_value(drawn, exact(table, 0.5)) > FALSE_ALARM
    assert p_value(drawn, exact(table, 1.0)) < 1e-12


def test_sequences_of_several_temperatures_decode_side_by_side():
    config = draft_config("rnn", True, False)
    table = cached_weights(config, "random").target
    choices = np.array([0.0, 0.6, 1.0])
    temperature = choices[np.arange(BATCH) % 3]
    drawn = first_tokens(*emit(config, "random", "by_prefix", temperature))
    assert len(np.unique(drawn[0::3], axis=0)) == 1
    for slot in (1, 2):
        assert p_value(drawn[slot::3], exact(table, choices[slot])) > FALSE_ALARM


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("head", HEADS)
def test_at_temperature_zero_tokens_are_the_targets_argmax(head: str, kind: str):
    config = draft_config(head, False, True)
    table = np.asarray(cached_weights(config, kind).target.logits).reshape(V, V, V)
    expected = list(PROMPT[-2:])
    for _ in range(FIRST):
        expected.append(int(table[expected[-2], expected[-1]].argmax()))  # pyright: ignore[reportArgumentType]
    for length in LENGTHS:
        drawn = first_tokens(*emit(config, kind, length, 0.0))
        assert np.all(drawn == expected[2:])


@pytest.mark.parametrize("reduced", [False, True], ids=["whole_vocabulary", "part_of_it"])
@pytest.mark.parametrize("head", HEADS[:3])
def test_tokens_drafted_among_candidates_are_judged_by_what_they_were_drawn_from(
    head: str, reduced: bool
):
    config, values = draft_config(head, reduced, reduced), {}
    compiled = player(table_target(), dspark_draft(config, candidates=2))

    def play(weights: Weights, *rest: Any) -> Any:
        factor = turned_factor(weights.draft.markov_head, ALONE)
        return compiled(
            weights._replace(draft=weights.draft._replace(candidate_factor=factor)), *rest
        )

    for kind, length in itertools.product(DRAFTS, ("1", "all", "by_prefix")):
        table = cached_weights(config, kind).target
        drawn = first_tokens(*emit(config, kind, length, 1.0, play))
        values[kind, length] = p_value(drawn, exact(table))
        greedy = first_tokens(*emit(config, kind, length, 0.0, play))
        assert np.array_equal(greedy, first_tokens(*emit(config, kind, "0", 0.0)))
    assert {case: p for case, p in values.items() if p < FALSE_ALARM} == {}


def always_accept(
    proposal: Any, target_logits: Array, target_id: Any, n: Array, _: Any, keys: Array, mesh: Any
) -> Verdict:
    """A wrong rule: every admitted draft is kept."""
    last = jnp.take_along_axis(target_logits, n[:, None, None], axis=1)[:, 0]
    return Verdict(n, jax.vmap(jax.random.categorical)(keys, last).astype(jnp.int32))


def emit_from_target(*given: Any) -> Any:
    """A wrong rule: a refused draft is replaced by a draw from p, not from the residual."""
    *before, refused, temperature, keys = given
    return acceptance_emit(*before, jnp.zeros_like(refused), temperature, keys)  # pyright: ignore[reportCallIssue]


acceptance_emit = acceptance._emit


@pytest.mark.parametrize("length", ["1", "2", "all"])
@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [(loop, "accept", always_accept), (acceptance, "_emit", emit_from_target)],
    ids=["always_accept", "residual_is_p"],
)
def test_a_wrong_acceptance_rule_is_noticed(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any, length: str
):
    config = draft_config("vanilla", False, False)
    monkeypatch.setattr(module, name, wrong)
    play = player(table_target(), dspark_draft(config))
    expected = exact(cached_weights(config, "random").target)
    assert p_value(first_tokens(*emit(config, "random", length, 1.0, play)), expected) < 1e-12


GLM = GlmConfig(
    vocab_size=V,
    hidden_size=HIDDEN,
    intermediate_size=12,
    moe_intermediate_size=4,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    q_lora_rank=6,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    index_topk=3,
    index_head_dim=4,
    index_n_heads=2,
    first_k_dense_replace=1,
    indexer_types=("full", "shared"),
    aux_layer_ids=(1,),
)


def test_first_tokens_of_a_glm_are_distributed_as_its_own():
    config, target = draft_config("gated", False, True), make_target(GLM)
    params = jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), init_params(GLM, 1))
    weights = Weights(target.prepare(params), *cached_weights(config, "random")[1:])
    triples = np.array(list(itertools.product(range(V), repeat=FIRST)))
    rows = jnp.asarray(np.c_[np.tile(PROMPT, (len(triples), 1)), triples])
    position = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    states = jax.jit(target.forward)(params, rows, jnp.ones_like(rows), position)
    p = jax.nn.softmax(target.unembed(params, states.final_hidden))
    p = jnp.take_along_axis(p[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    expected = np.asarray(p[:, -FIRST:], float).prod(axis=1).reshape((V,) * FIRST)
    assert abs(expected.sum() - 1) < 1e-5 and expected.max() < 0.5
    play = player(target, dspark_draft(config))
    keys = jax.random.split(jax.random.key(3), BATCH // 2)
    for length in ("2", "by_prefix"):
        lengths = length_table(length, config.draft_length)
        drawn = first_tokens(*play(weights, keys, lengths, jnp.ones(len(keys))))
        assert p_value(drawn, expected) > FALSE_ALARM
