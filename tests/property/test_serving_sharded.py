"""What is served on a mesh is what one device serves: the same greedy tokens, the same counters.

Of every answer each round's tokens, verified and accepted drafts are compared. None of the answers
here is decided by a near tie; one that were would differ rightly, and `train/divergence.py` would
name the choice.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.flax import save_file

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.checkpoints.quantisation import STORED_FP8
from dspark_jax.checkpoints.read import read
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.fp8 import BlockScaled, quantise
from dspark_jax.serve.batch import Batch
from dspark_jax.serve.messages import Delta, SamplingParams, Work
from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.models import Loaded, Named, find, load
from dspark_jax.serve.pages import Pages
from dspark_jax.serve.policy import Policy
from dspark_jax.serve.programs import Programs, Sizes
from dspark_jax.serve.rating import Head
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
    """Rounds of one group that verify everything."""

    @property
    def groups(self) -> tuple[int, ...]:
        return (self.slots,)

    def budgets(self, group: int) -> tuple[int, ...]:
        return super().budgets(group)[-1:]


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
    batch = Batch(programs, pages, policy, frozenset(), metrics, {}, Head(np.ones(sizes.verified)))
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


@cache
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
    slow("glm", True, (2, 4)),
    slow("qwen3", False, (1, 4)),
    slow("qwen3", False, (2, 2)),
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


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Named:
    """tiny-glm as it would be published in FP8, with its draft, which is told of no other."""
    target, draft = (tmp_path_factory.mktemp("fp8") / name for name in ("target", "draft"))
    shutil.copytree(embedded("tiny-glm"), target)
    shutil.copytree(embedded("tiny-glm-dspark"), draft)
    tensors = {}
    for name, stored in stored_tensors(target).items():
        tensors[name] = jnp.asarray(read(stored, (slice(None),) * len(stored.shape)))
        if STORED_FP8.search(name):
            scaled = quantise(tensors[name], (32, 32))
            tensors[name], tensors[f"{name}_scale_inv"] = scaled.values, scaled.scales
    save_file(tensors, target / "model.safetensors")
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    rewrite(target / "config.json", fp8)
    rewrite(draft / "config.json", {"target_sha256": None})
    return Named(target, draft)


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ASKED = (
    'def read_text(path):\n    """Read a file."""',
    "import os\n",
    "class Tree:\n    def __init__(self, root=None):\n",
    'def total(values):\n    """Their sum."""\n',
    "for i, line in enumerate(lines):\n",
)


@cache
def tiny_answers(named: Named, shape: Shape) -> tuple[Loaded, list[Rounds]]:
    """What tiny-glm and its shipped draft say, in answers longer than its sparse attention sees."""
    loaded = load(named, mesh_of(shape), "float32", lambda done, total: None)
    sizes = FewSizes(SLOTS, 16, 1 + SLOTS * 12, 12, loaded.draft.draft_length, 512, (32,))
    given = (loaded.target, loaded.draft, loaded.weights, sizes, jnp.float32, loaded.mesh)
    programs = FewPrograms(*given)
    programs.compile(lambda done, total: None)
    prompts = [tuple(loaded.files.tokenizer(text)["input_ids"]) for text in ASKED]
    return loaded, serve(programs, prompts, 120)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("fp8", "shape"), [(False, (4, 2)), (True, (2, 2))], ids=["float", "fp8"])
def test_tiny_glm_and_its_fp8_form_are_served_alike_on_any_mesh(
    fp8: bool, shape: Shape, quantised: Named
) -> None:
    named = quantised if fp8 else find(None, None, True)
    one = tiny_answers(named, (1, 1))[1]
    loaded, many = tiny_answers(named, shape)
    assert any(map(is_scaled, jax.tree.leaves(loaded.weights, is_leaf=is_scaled))) == fp8
    assert many == one
    assert sum(sum(answer.accepted) for answer in one) > 50


def is_scaled(x: Any) -> bool:
    return isinstance(x, BlockScaled)
