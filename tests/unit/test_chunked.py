"""The chunked loss is the unchunked one, values and gradients, at every chunk size."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.chunked import Given, SlotValues, Trained, corrected_logits, slot_losses
from dspark_jax.config import LossConfig, TermName
from dspark_jax.losses import dpace_weight

B, N, K, D, RANK, V, T = 2, 5, 4, 8, 3, 23, 30
ALL_TERMS = LossConfig(weights=tuple((name, 0.3) for name in get_args(TermName)))
SETTINGS = {
    "all terms": ALL_TERMS,
    "paper": replace(ALL_TERMS, rule="paper"),
    "dpace": LossConfig(weights=(("ce", 1.0),), position_weights="dpace"),
}


def unembed(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head


def inputs(markov: bool = True) -> tuple[Trained, Given]:
    draws = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(draws), shape)

    def below(limit: int) -> jax.Array:
        return jax.random.randint(next(draws), (B, N, K), 0, limit)

    mask = jax.random.bernoulli(next(draws), 0.7, (B, N, K))
    trained = Trained(
        normal(B, N, K, D),
        normal(B, N, K, RANK) if markov else None,
        normal(RANK, V) if markov else None,
    )
    weight = jnp.where(mask, jax.random.uniform(next(draws), (B, N, K)), 0.0)
    given = Given(normal(D, V), normal(D, V), normal(B, T, D), below(T), below(V), mask, weight)
    return trained, given


def evaluate(loss: LossConfig, trained: Trained, given: Given) -> tuple[Any, Any]:
    call = partial(slot_losses, unembed, loss)
    return jax.jit(jax.value_and_grad(call, has_aux=True))(trained, given)


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7), a, b)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_do_not_depend_on_the_chunk_size(name: str, blocks: int):
    trained, given = inputs()
    whole = evaluate(replace(SETTINGS[name], chunk_blocks=N), trained, given)
    chunked = evaluate(replace(SETTINGS[name], chunk_blocks=blocks), trained, given)
    assert_close(chunked, whole)


def test_a_draft_without_a_markov_head_is_chunked_too():
    trained, given = inputs(markov=False)
    whole = evaluate(replace(ALL_TERMS, chunk_blocks=N), trained, given)
    assert_close(evaluate(replace(ALL_TERMS, chunk_blocks=2), trained, given), whole)


def plain(loss: LossConfig, trained: Trained, given: Given) -> jax.Array:
    """The same total by plain automatic differentiation over whole logits."""
    hidden = jax.vmap(lambda states, row: states[row])(given.final_hidden, given.row)
    log_p = jax.nn.log_softmax(unembed(given.teacher, hidden))
    log_q = jax.nn.log_softmax(corrected_logits(trained, given.lm_head))
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    rate = jnp.minimum(q, p).sum(-1)
    kl = (p * (log_p - log_q)).sum(-1)
    share = jnp.exp(-3 * jax.lax.stop_gradient(rate))
    middle = jnp.log((p + q) / 2)
    label = given.label if loss.rule == "paper" else log_p.argmax(-1)
    terms = {
        "ce": -(log_q * jax.nn.one_hot(label, V)).sum(-1),
        "tv": 1 - rate,
        "l1": jnp.abs(q - p).sum(-1),
        "kl_div": kl,
        "rkl": (q * (log_q - log_p)).sum(-1),
        "jsd": ((p * (log_p - middle)).sum(-1) + (q * (log_q - middle)).sum(-1)) / 2,
        "nla": -jnp.log(jnp.maximum(rate, 1e-5)),
        "lk_hybrid": share * kl + (1 - share) * (1 - rate),
    }
    weight = given.weight
    if loss.position_weights == "dpace":
        weight = weight * dpace_weight(terms["ce"], given.mask, loss.dpace_alpha)
    return jnp.sum(weight * sum(w * terms[name] for name, w in loss.weights))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradient_is_that_of_plain_differentiation(name: str):
    trained, given = inputs()
    loss = replace(SETTINGS[name], chunk_blocks=2)
    (value, _), gradient = evaluate(loss, trained, given)
    wanted = jax.value_and_grad(partial(plain, loss))(trained, given)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), (value, gradient), wanted
    )


def test_dpace_weighs_a_slot_by_what_comes_after_it():
    surprise = -jnp.log(jnp.asarray([[0.5, 0.2, 0.8]]))
    mask = jnp.asarray([[True, True, True]])
    # alpha 0: products of likelihoods 0.5, 0.1, 0.08, summed from each slot on.
    np.testing.assert_allclose(dpace_weight(surprise, mask, 0.0), [[0.68, 0.18, 0.08]], rtol=1e-6)
    gap = jnp.asarray([[True, False, True]])
    np.testing.assert_allclose(dpace_weight(surprise, gap, 0.0), [[0.9, 0.0, 0.4]], rtol=1e-6)
    assert (dpace_weight(surprise, mask, 1.0) == jnp.asarray([[3.0, 2.0, 1.0]])).all()


def test_an_untrained_slot_costs_nothing_even_where_its_logits_are_no_numbers():
    trained, given = inputs()
    broken = trained._replace(hidden=trained.hidden.at[0, 0, 0].set(jnp.inf))
    given = given._replace(mask=given.mask.at[0, 0, 0].set(False))
    (value, slots), gradient = evaluate(ALL_TERMS, broken, given)
    assert jnp.isfinite(value) and isinstance(slots, SlotValues)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert not jnp.any(gradient.hidden[0, 0, 0])
