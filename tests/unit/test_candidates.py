"""Drafting among candidates: with all of them the usual tokens, with a few none but those."""

from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import DraftConfig, MarkovHeadType
from dspark_jax.draft import dspark_draft
from dspark_jax.draft_candidates import draft_among
from dspark_jax.draft_decoder import prepare, run_block
from dspark_jax.drafting import draft_block
from dspark_jax.heads import MarkovHead
from dspark_jax.types import Proposal
from tests.unit.test_drafter import (
    ANCHOR,
    AUX,
    CONFIG,
    KEYS,
    LENGTH,
    TEMPERATURE,
    assert_close,
    blocks_at,
    decoding,
    fill_cache,
    logits_of,
    make_drafter,
    make_frozen,
    score,
)

SOME = 3


def drafted(config: DraftConfig, count: int | None) -> Proposal:
    """The standard state's blocks, of a greedy sequence and two that sample."""
    drafter, frozen = make_drafter(config), make_frozen(config)

    @jax.jit
    def draft(cache: Any) -> Proposal:
        prepared = prepare(drafter, count is not None)
        given = (frozen, cache, LENGTH, ANCHOR, KEYS, TEMPERATURE)
        return draft_block(config, prepared, *given, candidates=count)

    return draft(fill_cache(drafter, AUX))


def variant(head: MarkovHeadType, from_anchor: bool, headless: bool = False) -> DraftConfig:
    return replace(
        CONFIG,
        markov_head_type=head,
        sample_from_anchor=from_anchor,
        enable_confidence_head=not headless,
        confidence_head_with_markov=not headless,
    )


@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("head", get_args(MarkovHeadType))
def test_with_all_entries_the_tokens_are_those_of_the_whole_vocabulary(
    head: MarkovHeadType, from_anchor: bool
):
    config = variant(head, from_anchor, headless=from_anchor)
    whole, among = drafted(config, None), drafted(config, config.draft_vocab_size)
    np.testing.assert_array_equal(among.tokens, whole.tokens)
    assert_close(among.confidence, whole.confidence)
    entry, logits = among.logits
    assert_close(logits, jnp.take_along_axis(whole.logits, entry, axis=-1))


@pytest.mark.parametrize("head", get_args(MarkovHeadType))
def test_tokens_are_drawn_by_the_corrected_logits_of_the_likeliest_bases(head: MarkovHeadType):
    config = variant(head, from_anchor=True)
    proposal, drafter = drafted(config, SOME), make_drafter(config)
    frozen, cache = make_frozen(config), fill_cache(drafter, AUX)
    _, base = decoding(run_block, drafter, frozen, cache, LENGTH, ANCHOR)
    entry, logits = proposal.logits
    np.testing.assert_array_equal(entry, jax.lax.top_k(base, SOME)[1])
    place = np.searchsorted(frozen.target_id, proposal.tokens)
    assert np.all(np.any(entry == place[..., None], axis=-1))
    # As training scores these very tokens.
    tokens = jnp.concatenate([ANCHOR[:, None], proposal.tokens[:, :-1]], axis=1)
    scored = logits_of(config, score(config, blocks_at(LENGTH, tokens)))[:, 0]
    assert_close(logits, jnp.take_along_axis(scored, entry, axis=-1))
    np.testing.assert_array_equal(place[0], jnp.take_along_axis(entry, argmax(logits), -1)[0, :, 0])


def argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1, keepdims=True)


def test_nothing_is_as_large_as_the_vocabulary_but_what_is_given():
    B, G, Vd, D, r = 2, 3, 101, 6, 5
    head = make_drafter(replace(CONFIG, vocab_size=103, draft_vocab_size=Vd, hidden_size=D))
    rows = dict(base=(B, G, Vd), hidden=(B, G, D), state=(B, r))
    shaped = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in rows.items()}

    def draft(base: Any, hidden: Any, state: Any, factor: Any) -> Any:
        assert isinstance(head.markov_head, MarkovHead)
        words, anchor = jnp.zeros((B, 2), jnp.uint32), jnp.zeros(B, jnp.int32)
        given = (head.markov_head, factor, base, hidden, state, anchor, words, jnp.ones(B))
        return draft_among(*given, jnp.arange(Vd), SOME)

    factor = jax.ShapeDtypeStruct((Vd, r), jnp.float32)
    traced = jax.make_jaxpr(draft)(*shaped.values(), factor)
    made = [x.aval for x in results(traced.jaxpr) if Vd in x.aval.shape]
    assert [x.shape for x in made] == [(Vd,)], "the target's ids alone"


def results(jaxpr: Any) -> Any:
    """Of every equation, at any depth."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                yield from results(inner)


@pytest.mark.parametrize("count", [0, CONFIG.draft_vocab_size + 1])
def test_as_many_candidates_as_there_are_tokens_are_allowed(count: int):
    dspark_draft(CONFIG, candidates=CONFIG.draft_vocab_size)
    with pytest.raises(ValueError, match=f"dspark_draft_topk {count} must be from 1 to the 22"):
        dspark_draft(CONFIG, candidates=count)


def test_a_draft_without_a_markov_head_has_nothing_to_spare():
    config = replace(CONFIG, markov_rank=0, confidence_head_with_markov=False)
    with pytest.raises(ValueError, match="no such head"):
        dspark_draft(config, candidates=SOME)
