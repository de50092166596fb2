"""What is served on a mesh is what one device serves: the same greedy tokens, the same counters.

Of every answer each round's tokens, verified and accepted drafts are compared. None of the answers
here is decided by a near tie; one that were would differ rightly, and `train/divergence.py` would
name the choice.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dspark_jax.serve.batch import Batch
from dspark_jax.serve.messages import Delta, SamplingParams, Work
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.programs import Programs, Sizes
from dspark_jax.serve.sequence import Sequence
from dspark_jax.sharding import DATA, TENSOR, target_mesh
from tests.property.test_sharded_decoding import TARGETS, Case, V, pair

SLOTS, PAGE = 4, 4
GREEDY = SamplingParams(temperature=0.0, seed=0)
Shape = tuple[int, int]


class Rounds(NamedTuple):
    """An answer, round by round."""

    tokens: list[tuple[int, ...]]
    verified: list[int | None]
    accepted: list[int]


class FewSizes(Sizes):
    """Rounds of one group that verify everything or nothing."""

    @property
    def groups(self) -> tuple[int, ...]:
        return (self.slots,)

    def budgets(self, group: int) -> tuple[int, ...]:
        found = super().budgets(group)
        return found[0], found[-1]


class FewPrograms(Programs):
    """Without the rounds that edit logits, which nobody asks for here."""

    def shapes(self) -> Iterator[Any]:
        return (shape for shape in super().shapes() if not shape.edited)


def mesh_of(shape: Shape) -> Mesh:
    return target_mesh(jax.devices()[: shape[0] * shape[1]], shape[1])


def serve(programs: Programs, prompts: list[tuple[int, ...]], limit: int) -> list[Rounds]:
    """All answers; sequences come and go, share rounds and begin where others have ended."""
    sizes, heard = programs.sizes, {str(i): list[Delta]() for i in range(len(prompts))}
    pages = Pages(sizes.pages, sizes.page, caching=True)
    policy, metrics = Policy("fixed", sizes.verified), Metrics("test", sizes.verified)
    batch = Batch(programs, pages, policy, frozenset(), metrics, {})
    for i, prompt in enumerate(prompts):
        work = Work(str(i), prompt, limit - 3 * (i % 4), GREEDY)
        batch.add(Sequence(work, heard[str(i)].append, 0.0))
    while batch.busy:
        batch.turn()
    assert [said[-1].finish for said in heard.values()] == ["length"] * len(prompts)
    return [
        Rounds(*([getattr(d, name) for d in said] for name in Rounds._fields))
        for said in heard.values()
    ]


def small(name: str, fp8: bool, shape: Shape) -> Programs:
    """Random models of few layers; those of the decoding over a mesh."""
    mesh = mesh_of(shape)
    models = pair(Case(name, 0, "vanilla", True), mesh, fp8)
    drafted = models.draft.draft_length
    sizes = FewSizes(SLOTS, PAGE, 1 + SLOTS * 12, 12, drafted, V, (8,))
    return FewPrograms(*models, sizes, jnp.float32, mesh)


@cache
def small_answers(name: str, fp8: bool, shape: Shape) -> list[Rounds]:
    programs = small(name, fp8, shape)
    programs.compile(lambda done, total: None)
    rng = np.random.default_rng(1)
    prompts = [tuple(rng.integers(0, V, n).tolist()) for n in (1, 9, 4, 12, 2, 6)]
    return serve(programs, prompts, 30)


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


SMALL = [
    ("glm", False, (2, 2)),
    ("qwen3", False, (1, 4)),
    slow("glm", True, (2, 2)),
    slow("glm", False, (1, 2)),
    slow("glm", False, (1, 4)),
    slow("glm", True, (2, 4)),
    slow("qwen3", False, (1, 2)),
    slow("qwen3", False, (2, 2)),
    slow("qwen3", False, (4, 2)),
]


@pytest.mark.parametrize(("name", "fp8", "shape"), SMALL)
def test_many_devices_serve_what_one_does(name: str, fp8: bool, shape: Shape) -> None:
    one = small_answers(name, fp8, (1, 1))
    assert small_answers(name, fp8, shape) == one
    assert sum(sum(answer.accepted) for answer in one) > 5
    assert len({str(answer.tokens) for answer in one}) == len(one)


@pytest.mark.parametrize("name", list(TARGETS))
def test_heads_are_shared_and_pages_are_whole_in_every_group(name: str) -> None:
    state = small(name, False, (2, 4)).state
    for cache_, heads in ((state.target_cache, name == "qwen3"), (state.draft_cache, True)):
        specs = [axis for x in jax.tree.leaves(cache_) for axis in x.sharding.spec]
        assert DATA not in specs and (TENSOR in specs) == heads
