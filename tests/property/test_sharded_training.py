"""However a step's rows and weights are spread or split, loss and gradient are those of one device.

Runs on the eight fake devices of conftest.py, target and draft as the trainer runs them.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import MeshConfig
from dspark_jax.draft import init_draft_params
from dspark_jax.sharding import make_mesh, tree_shardings
from dspark_jax.target_folder import TargetFiles, find_target, read_target
from dspark_jax.targets.families import make_target
from dspark_jax.train.checks import check_batch
from dspark_jax.train.devices import make_meshes
from dspark_jax.train.hidden_states import in_process
from dspark_jax.train.presets import PRESETS, draft_config
from dspark_jax.train.trainer import (
    Job,
    init_state,
    make_gradient,
    make_job,
    make_step,
    on_mesh,
)
from dspark_jax.types import Batch

ROWS, T = 8, 64
SETTINGS = replace(PRESETS["tiny"], batch_rows=ROWS, sequence_length=T, max_anchors=6)
MESHES = [MeshConfig(8, 1), MeshConfig(1, 8), MeshConfig(2, 4), MeshConfig(2, 4, 2)]


@pytest.fixture(scope="module")
def found() -> TargetFiles:
    return find_target(embedded("tiny-glm"), SETTINGS.draft.aux_layer_ids)


def job_on(found: TargetFiles, mesh: MeshConfig, **changes: Any) -> Job:
    settings = replace(SETTINGS, mesh=mesh, **changes)
    config, meshes = draft_config(settings.draft, found.config, 0), make_meshes(settings)
    target = make_target(found.config, meshes.target)
    loaded = read_target(found, meshes.target, settings.compute_dtype, lambda done, total: None)
    given = (config, target, in_process(target), meshes, loaded, np.arange(512))
    return make_job(settings, *given)


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(1, 500, (ROWS, T)).astype(np.int32)
    row = np.arange(T)
    segment = np.broadcast_to(1 + (row >= 40), (ROWS, T)).astype(np.int32)
    position = np.broadcast_to(np.where(row >= 40, row - 40, row), (ROWS, T)).astype(np.int32)
    # Rows with unequally many trained tokens: a mean of the rows' means would be another number.
    trained = (position > 5) & (np.arange(ROWS)[:, None] * 8 + 8 > row)
    rows = (tokens, trained, segment, position)
    return Batch(*(jnp.asarray(x) for x in rows))


@pytest.fixture(scope="module")
def alone(found: TargetFiles) -> Any:
    """Gradient and metrics on one device, in one part."""
    return evaluate(job_on(found, MeshConfig(1, 1)))


def evaluate(job: Job) -> Any:
    params = init_draft_params(job.config, 0)
    params = jax.device_put(params, tree_shardings(job.mesh, params))
    given = (job.target_params, job.frozen, *on_mesh(job, (batch(), None)))
    return jax.device_get(jax.jit(make_gradient(job))(params, jax.random.key(1), *given))


def assert_same(ours: Any, theirs: Any) -> None:
    def compare(a: Any, b: Any) -> None:
        size = np.abs(b).max()
        assert np.abs(a - b).max() <= 2e-5 * size + 1e-9

    jax.tree.map(compare, ours, theirs)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_changes_neither_loss_nor_gradient(found: TargetFiles, alone: Any, mesh: MeshConfig):
    assert_same(evaluate(job_on(found, mesh)), alone)


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"gradient_checkpointing": True}], ids=str)
def test_parts_and_recomputation_change_neither(
    found: TargetFiles, alone: Any, changes: dict[str, Any]
):
    gradient, metrics = evaluate(job_on(found, MeshConfig(1, 1), **changes))
    wanted, totals = alone
    assert_same(gradient, wanted)
    for name in ("loss", "tv_loss", "confidence_loss", "accept_len"):
        ratio = metrics[f"{name}_sum"] / metrics[f"{name}_total"]
        assert ratio == pytest.approx(totals[f"{name}_sum"] / totals[f"{name}_total"], rel=1e-5)


def test_weights_and_optimizer_state_are_spread_over_the_devices(found: TargetFiles):
    job = job_on(found, MeshConfig(1, 8))
    state = init_state(job, init_draft_params(job.config, 0))
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state)]
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    held = sum(a * b for a, b in zip(shares, sizes, strict=True)) / sum(sizes)
    assert held < 0.14  # an eighth, and the few small arrays that every device holds
    given = (job.target_params, job.frozen, *on_mesh(job, (batch(), None)))
    before = jax.tree.map(lambda x: x.sharding, state)
    after, _ = make_step(job)(state, *given)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), after, before
    )


def test_bfloat16_activations_train_float32_weights(found: TargetFiles, alone: Any):
    gradient, metrics = evaluate(job_on(found, MeshConfig(1, 1), compute_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert metrics["loss_sum"] == pytest.approx(alone[1]["loss_sum"], rel=0.02)


def test_what_does_not_fit_the_mesh_is_refused():
    with pytest.raises(ValueError, match="needs 16 but there are 8"):
        make_mesh(MeshConfig(4, 4))
    with pytest.raises(ValueError, match="batch_rows 6 cannot be shared by 1 part.* 8 device"):
        check_batch(replace(SETTINGS, batch_rows=6), make_mesh(MeshConfig(8, 1)))
    assert make_mesh(MeshConfig(), 6).size == 6 and make_mesh(MeshConfig(None, 2), 4).size == 4
    with pytest.raises(ValueError, match="use a multiple of 24"):
        check_batch(replace(SETTINGS, accumulate=3), make_mesh(MeshConfig(8, 1)))
