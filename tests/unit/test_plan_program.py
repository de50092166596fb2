"""The steps that are planned for: which weights they hold, and what of them is others' memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh

from dspark_jax.fp8 import BlockScaled
from dspark_jax.plan.floor import held_bytes, target_needs
from dspark_jax.plan.memory import held_weights, tree_bytes
from dspark_jax.plan.models import Models, find_models
from dspark_jax.plan.program import decode_program, plain_program
from dspark_jax.sharding import target_mesh
from dspark_jax.targets.weights import entries

TINY = Path("dspark_jax/assets/tiny-glm")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return target_mesh(jax.devices()[:1], 1)


@pytest.fixture(scope="module")
def tied() -> Models:
    """Two layers: only the tables matter."""
    models = find_models("qwen3-0.6b")
    target = replace(models.target, num_hidden_layers=2, aux_layer_ids=(1,))
    return models._replace(target=target, draft=replace(models.draft, aux_layer_ids=(1,)))


def test_a_reduced_vocabulary_has_its_own_head(mesh: Mesh):
    models = find_models(str(TINY), str(TINY.with_name("tiny-glm-dspark")))
    draft = replace(models.draft, draft_vocab_size=100)
    program = decode_program(models.target, None, draft, mesh, 2, 64)
    frozen = program.weights.frozen
    assert frozen.lm_head.shape == (models.target.hidden_size, 100)
    assert frozen.target_id.shape == (100,)
    assert tree_bytes(program.shared) == tree_bytes(frozen.embed)


def test_a_tied_head_of_a_draft_is_a_copy(tied: Models, mesh: Mesh):
    program = decode_program(tied.target, None, tied.draft, mesh, 2, 64)
    frozen = program.weights.frozen
    assert tree_bytes(frozen.lm_head) == tree_bytes(frozen.embed) == 2 * 151936 * 1024
    assert tree_bytes(program.shared) == tree_bytes(frozen.embed)


def test_a_tied_table_is_read_whole(mesh: Mesh):
    models = find_models("qwen3-0.6b")
    tensors = ((e.name, e.shape) for e in entries(models.target))
    needs = target_needs(tensors, models.target, None)
    program = plain_program(models.target, None, mesh, 1, 64)
    floor = sum(held_bytes(held_weights(program.weights), needs, 1))
    assert floor == tree_bytes(program.weights) == pytest.approx(1.192e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["plain", "speculative"])
def test_a_small_fp8_target_is_held_as_loading_leaves_it(mesh: Mesh, kind: str, tmp_path: Path):
    described = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"quantization_config": FP8}))
    models = find_models(str(tmp_path))
    assert models.block == (16, 16)

    def held(mesh: Any) -> bool:
        if kind == "plain":
            weights = plain_program(models.target, models.block, mesh, 2, 64).weights
        else:
            made = decode_program(models.target, models.block, models.draft, mesh, 2, 64)
            weights = made.weights.target
        leaves = jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, BlockScaled))
        return any(isinstance(leaf, BlockScaled) for leaf in leaves)

    assert not held(mesh) and held(target_mesh(jax.devices()[:2], 1))
