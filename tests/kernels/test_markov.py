"""Every drafting step through a Markov head against the same definition, over the same shapes.

Tolerance: a logit's float32 sum of r products is off by √r + 8 half units (2^-24) of the sum of
magnitudes at most, noise by what two backends' logarithms differ: 4 units of a number up to 17,
taken as 2^-18 · temperature. Where the two largest sums are further apart than twice that, every
implementation draws the same entry; elsewhere one whose sum is as large within it. Logarithms of
probabilities are sums over a vocabulary of what exp gives: 2^-17 more, divided by no temperature
below 1/2 here.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DraftConfig
from dspark_jax.drafting import likeliest
from dspark_jax.heads import MarkovHead
from dspark_jax.pallas_kernels.markov import reference, tpu
from dspark_jax.sampling import choose, sampling_noise
from tests.kernels.races import interpreted, race_found


class Case(NamedTuple):
    """Sequences, rank, vocabulary, the factor's type."""

    B: int
    r: int
    Vd: int
    dtype: Any


CASES = [
    Case(1, 64, 4096, jnp.float32),
    Case(3, 64, 4200, jnp.float32),  # no multiple of the tile
    Case(5, 17, 777, jnp.float32),  # one tile, no multiple of anything
    Case(64, 64, 5003, jnp.bfloat16),
    Case(8, 256, 2049, jnp.bfloat16),  # one entry in the last tile
    Case(130, 32, 1500, jnp.float32),  # more sequences than fit a full tile
]
IMPLEMENTATIONS = ("reference", "tpu")
SLOT, G = 2, 4


def interpreted_step(*arguments: Any) -> Any:
    drawn = jax.block_until_ready(tpu.markov_step(*arguments, interpret=interpreted()))
    assert not race_found()
    return drawn


def implementation(name: str) -> Callable[..., Any]:
    return jax.jit(reference.markov_step) if name == "reference" else interpreted_step


@functools.cache
def arguments(case: Case) -> tuple[Any, ...]:
    """A step's, with temperatures from 0 to 2 and equal logits where an argmax meets them."""
    rng = np.random.default_rng(case.B)
    base = 3 * rng.standard_normal((G, case.B, case.Vd))
    mixed = jnp.asarray(rng.standard_normal((case.B, case.r)), case.dtype)
    w2 = jnp.asarray(rng.standard_normal((case.r, case.Vd)) / case.r**0.5, case.dtype)
    temperature = jnp.asarray(np.resize([0.0, 1.0, 0.5, 2.0], case.B), jnp.float32)
    words = jnp.asarray(rng.integers(2**32, size=(case.B, 2)), jnp.uint32)
    first = jnp.int32(SLOT * case.Vd)
    return jnp.asarray(base, jnp.float32), mixed, w2, words, temperature, jnp.int32(SLOT), first


@functools.cache
def exact(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In float64: logits / temperature, sums with the noise, and what a sum may be off by."""
    base, mixed, w2, words, temperature, *_ = arguments(case)
    a, b = np.asarray(mixed, np.float64), np.asarray(w2, np.float64)
    own = np.asarray(base[SLOT], np.float64)
    logits = own + a @ b
    number = np.arange(SLOT * case.Vd, (SLOT + 1) * case.Vd, dtype=np.uint32)
    noise = np.asarray(reference.hashed_gumbel(words[:, :1], words[:, 1:], jnp.asarray(number)))
    t = np.asarray(temperature, np.float64)[:, None]
    off = 2.0**-24 * (case.r**0.5 + 8) * (np.abs(own) + np.abs(a) @ np.abs(b)) + 2.0**-18 * t
    return logits / np.where(t == 0, 1, t), logits + t * noise, off


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case[:3])))
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_step_draws_the_largest_sum_and_knows_its_probability(name: str, case: Case):
    drawn = implementation(name)(*arguments(case))
    scaled, sums, off = exact(case)
    entry, rows, bound = np.asarray(drawn.entry), np.arange(case.B), off.max(axis=1)
    most = sums.max(axis=1)
    assert np.all(sums[rows, entry] >= most - 2 * bound)
    second = np.partition(sums, -2, axis=1)[:, -2]
    clear = most - second > 2 * bound
    assert np.mean(clear) > 0.9
    assert np.array_equal(entry[clear], sums.argmax(axis=1)[clear])
    assert np.all(np.abs(drawn.score - most) <= bound)
    peak = scaled.max(axis=1)
    log_q = scaled[rows, entry] - peak - np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
    assert np.all(np.abs(reference.log_probability(drawn) - log_q) <= 4 * bound + 2.0**-17)


@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: "x".join(map(str, case[:3])))
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_first_of_equals_is_drawn_and_the_likeliest_is_judged(name: str, case: Case):
    base, mixed, w2, words, temperature, *rest = arguments(case)
    equal = jnp.round(base).at[SLOT, :, 5].set(50).at[SLOT, 0, case.Vd - 1].set(50)
    drawn = implementation(name)(equal, 0 * mixed, w2, words, 0 * temperature, *rest)
    assert np.all(drawn.entry == 5)
    odds = likeliest(equal[SLOT][:, None], 0 * temperature)[:, 0]
    assert np.allclose(reference.likeliest_odds(drawn), odds, rtol=1e-5, atol=1e-6)
    assert odds[0] < 1e-6 < odds[1]


def test_noise_is_the_cores():
    keys = jax.random.split(jax.random.key(3), 5)
    length = jnp.arange(5, dtype=jnp.int32)
    words = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, length)).astype(jnp.uint32)
    number = jnp.arange(3 * 700, dtype=jnp.uint32)
    ours = reference.hashed_gumbel(words[:, :1], words[:, 1:], number).reshape(5, 3, 700)
    assert np.array_equal(ours, sampling_noise(keys, length, (3, 700)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_parts_of_a_vocabulary_draw_what_the_whole_does(name: str):
    case = CASES[1]
    base, mixed, w2, words, temperature, slot, first = arguments(case)
    step, cuts = implementation(name), [(0, 1400), (1400, 2800), (2800, 4200)]
    parts = [
        step(base[:, :, a:b], mixed, w2[:, a:b], words, temperature, slot, first + a)
        for a, b in cuts
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    joined = reference.joined(stacked, jnp.array([a for a, _ in cuts]))
    whole = implementation("reference")(*arguments(case))
    assert np.array_equal(joined.entry, whole.entry)
    for ours, theirs in zip(joined[1:], whole[1:], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def make_config(V: int, Vd: int, D: int, r: int, head_type: Any) -> DraftConfig:
    return DraftConfig(
        vocab_size=V,
        draft_vocab_size=Vd,
        hidden_size=D,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        aux_layer_ids=(1,),
        mask_token_id=0,
        markov_rank=r,
        markov_head_type=head_type,
    )


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_block_is_what_the_cores_head_draws_slot_by_slot(name: str, head_type: str):
    B, D, V, Vd, r = 3, 24, 900, 600, 16
    head = MarkovHead(make_config(V, Vd, D, r, head_type), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    base = jnp.asarray(rng.standard_normal((B, G, Vd)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((B, G, D)), jnp.float32)
    target_id = jnp.asarray(np.sort(rng.choice(V, Vd, replace=False)), jnp.int32)
    temperature, anchor = jnp.array([0.0, 0.7, 1.0]), jnp.array([4, 7, 899])
    keys = jax.random.split(jax.random.key(0), B)
    length = jnp.arange(B, dtype=jnp.int32)
    words = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, length)).astype(jnp.uint32)
    linear = {"gated": "gate_proj", "rnn": "joint_proj"}.get(head_type)
    maps: Any = (None, None)
    if linear:
        maps = tuple(getattr(getattr(head, linear), part)[...] for part in ("kernel", "bias"))
    settings: dict[str, Any] = {} if name == "reference" else {"interpret": interpreted()}
    module = reference if name == "reference" else tpu
    drafted = module.markov_block(
        base, hidden, anchor, head.start(hidden[:, 0]), words, temperature,
        head.markov_w1[...], head.markov_w2.kernel[...], maps[0], maps[1], target_id,
        head_type=head_type, **settings,
    )  # fmt: skip
    noise = sampling_noise(keys, length, (G, Vd))
    state, prev = head.start(hidden[:, 0]), anchor
    for g in range(G):
        state, bias, embedding = head.step(state, prev, hidden[:, g])
        logits = base[:, g] + bias
        entry = choose(logits, noise[:, g], temperature)
        prev = target_id[entry]
        assert np.array_equal(drafted.tokens[:, g], prev)
        assert np.array_equal(drafted.embedding[:, g], embedding)
        again = reference.markov_logits(base[:, g], drafted.mixed[:, g], head.markov_w2.kernel[...])
        assert np.allclose(again, logits, atol=1e-6)
        scale = jnp.where(temperature == 0, 1.0, temperature)[:, None]
        log_q = jax.nn.log_softmax(logits / scale)[jnp.arange(B), entry]
        assert np.allclose(drafted.log_q[:, g], log_q, atol=1e-5)
        lse = jax.nn.logsumexp(logits / scale, axis=-1)
        assert np.allclose(drafted.lse[:, g], lse, atol=1e-5)
        odds = likeliest(logits[:, None], temperature)[:, 0]
        assert np.allclose(drafted.odds[:, g], odds, atol=1e-4)


def test_a_row_ignores_its_neighbours():
    base, mixed, *rest = arguments(CASES[2])
    others = jnp.array([0, 1, 3, 4])
    spoilt = base.at[:, others].set(jnp.nan), mixed.at[others].set(jnp.inf)
    for ours, theirs in zip(
        interpreted_step(base, mixed, *rest), interpreted_step(*spoilt, *rest), strict=True
    ):
        assert ours[2] == theirs[2]


def test_what_cannot_be_run_is_said():
    given = arguments(CASES[2])
    assert tpu.unsupported(*given) is None
    base, mixed, w2, *rest = given
    for wrong in (
        tpu.unsupported(base[0], *given[1:]),
        tpu.unsupported(base.astype(jnp.float16), *given[1:]),
        tpu.unsupported(base, mixed, w2.astype(jnp.int8), *rest),
        tpu.unsupported(jax.ShapeDtypeStruct((1, 2048, 8), jnp.float32), *given[1:]),
    ):
        assert wrong is not None and wrong.endswith(".")


def test_a_step_that_begins_with_nothing_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "clear", lambda *kept: None)
    drawn = tpu.markov_step(*arguments(CASES[2]), interpret=interpreted())
    _, sums, off = exact(CASES[2])
    assert not np.all(np.abs(drawn.score - sums.max(axis=1)) <= off.max(axis=1))


def test_cores_that_share_a_draw_are_a_race(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpu, "SEMANTICS", ("parallel",))
    two = interpreted(num_cores_or_threads=2)
    jax.block_until_ready(tpu.markov_step(*arguments(CASES[1]), interpret=two))
    assert race_found()
