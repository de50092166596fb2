"""A cache extended by any ragged rows holds what a pass over whole sequences computes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.cache import to_blocks
from dspark_jax.config import TargetConfig
from dspark_jax.targets.families import make_target
from dspark_jax.types import Places, Rows, TargetStates
from tests.property.test_sharded_targets import GLM, QWEN3, QWEN3_MOE, params_of

B, T, S, CAPACITY, PAGE = 5, 13, 6, 16, 4
KINDS = ("full", "shared", "full")
SHORT_GLM = replace(GLM, num_hidden_layers=3, indexer_types=KINDS, first_k_dense_replace=1)
TARGETS: dict[str, TargetConfig] = {
    "glm": replace(SHORT_GLM, index_topk=4, aux_layer_ids=(0, 2)),
    "glm_few_experts": replace(
        SHORT_GLM, n_routed_experts=8, index_topk=4, aux_layer_ids=(0, 2), unroll_layers=8
    ),
    "qwen3": replace(QWEN3, num_hidden_layers=2, aux_layer_ids=(0, 1)),
    "qwen3_moe": replace(QWEN3_MOE, num_hidden_layers=2, aux_layer_ids=(0, 1)),
}


class Chunk(NamedTuple):
    """Rows in the order they are given; `real` ones have their sequence's own token."""

    tokens: np.ndarray
    position: np.ndarray
    real: np.ndarray


class Functions(NamedTuple):
    """What forward gives for the sequences, and the compiled cache."""

    whole: TargetStates
    start: Callable[..., Any]
    extend: Callable[..., Any]


TOKENS = np.random.default_rng(1).integers(0, 64, (B, T))


@cache
def functions(name: str) -> Functions:
    target = make_target(TARGETS[name])
    params = jax.tree.map(jnp.asarray, params_of(TARGETS[name]))
    place = jnp.broadcast_to(jnp.arange(T), (B, T))
    whole = jax.jit(target.forward)(params, jnp.asarray(TOKENS), jnp.ones_like(place), place)
    prepared = jax.jit(target.prepare)(params)
    extend = jax.jit(target.extend)
    return Functions(
        jax.tree.map(np.asarray, whole),
        target.init_cache,
        lambda cache, rows: extend(prepared, cache, rows),
    )


def chunks(rng: np.random.Generator) -> Iterator[Chunk]:
    """Rows until every sequence has been through.

    Of each sequence some rows, or none: a few that are there already, then new ones, then tokens
    that are not its own and will be overwritten; among them padding, all in any order.
    """
    done = np.zeros(B, int)
    while np.any(done < T):
        chunk = Chunk(
            rng.integers(0, 64, (B, S)),
            rng.integers(CAPACITY, CAPACITY + 3, (B, S)),
            np.zeros((B, S), bool),
        )
        for b in range(B):
            count = rng.integers(0, S + 1)
            start = max(0, done[b] - rng.integers(0, 3))
            wrong = rng.integers(0, 3)
            slots = rng.permutation(S)[:count]
            for i, slot in enumerate(slots):
                position = start + i
                if position >= CAPACITY:
                    break
                chunk.position[b, slot] = position
                if i < count - wrong and position < T:
                    chunk.real[b, slot], chunk.tokens[b, slot] = True, TOKENS[b, position]
                    done[b] = max(done[b], position + 1)
                else:
                    done[b] = min(done[b], position)
        yield chunk


def in_pages(rows: Rows) -> Rows:
    """The same rows in a cache of pages that sequences own in no order."""
    count = CAPACITY // PAGE
    owned = np.random.default_rng(7).permutation(np.arange(1, 1 + B * count))
    return rows._replace(pages=jnp.asarray(owned.reshape(B, count)))


def flat(rows: Rows) -> Rows:
    """The same rows one under another, some that belong nowhere among them."""
    order = np.random.default_rng(8).permutation(B * S + 3)
    sequence, offset = np.where(order < B * S, order // S, B), order % S
    inside = np.minimum(sequence, B - 1)
    tokens, position = (np.asarray(x)[inside, offset] for x in (rows.tokens, rows.position))
    position = np.where(sequence < B, position, CAPACITY)
    places = Places(jnp.asarray(sequence), jnp.asarray(offset), rows.position)
    return Rows(jnp.asarray(tokens)[:, None], jnp.asarray(position)[:, None], rows.pages, places)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", TARGETS)
def test_ragged_rows_give_what_forward_gives(name: str, seed: int) -> None:
    check(name, seed, lambda rows: rows, (B, CAPACITY))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TARGETS)
def test_pages_hold_what_one_piece_holds(name: str, seed: int) -> None:
    pages = 1 + B * CAPACITY // PAGE
    check(name, seed, in_pages, (pages, PAGE))
    check(name, seed, lambda rows: flat(in_pages(rows)), (pages, PAGE))


def check(name: str, seed: int, lay: Callable[[Rows], Rows], sizes: tuple[int, int]) -> None:
    """Chunk after chunk, every real row's states are those of the whole sequence."""
    whole, start, extend = functions(name)
    cache, seen = start(*sizes), np.zeros((B, T), bool)
    for chunk in chunks(np.random.default_rng(seed)):
        rows = lay(Rows(jnp.asarray(chunk.tokens), jnp.asarray(chunk.position)))
        cache, states = extend(cache, rows)
        states = jax.tree.map(lambda x, rows=rows: np.asarray(to_blocks(rows, x)), states)
        b, slot = np.nonzero(chunk.real)
        position = chunk.position[b, slot]
        seen[b, position] = True
        for ours, wanted in zip(states, whole, strict=True):
            limit = 2e-5 * np.abs(wanted).max()
            np.testing.assert_allclose(ours[b, slot], wanted[b, position], rtol=0, atol=limit)
    assert seen.all()
