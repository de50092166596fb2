"""What a run needs of its devices is counted before they hold anything."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import MeshConfig
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.plan.builtin import TARGETS
from dspark_jax.sharding import target_mesh
from dspark_jax.target_folder import TargetFiles, find_target, read_target
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.targets.mesh import family
from dspark_jax.train.devices import (
    check_memory,
    device_bytes,
    make_meshes,
    needed_bytes,
    share_bytes,
    target_shapes,
)
from dspark_jax.train.hidden_states import in_process
from dspark_jax.train.presets import PRESETS, draft_config
from dspark_jax.train.trainer import Job, frozen_tables, init_state

SETTINGS = replace(PRESETS["tiny"], batch_rows=8)


@pytest.mark.slow
def test_the_bytes_counted_are_those_a_device_then_holds():
    settings = replace(SETTINGS, compute_dtype="bfloat16", mesh=MeshConfig(2, 4))
    found = find_target(embedded("tiny-glm"), settings.draft.aux_layer_ids)
    config, meshes = draft_config(settings.draft, found.config, 0), make_meshes(settings)
    needed = needed_bytes(settings, found, config, meshes)
    loaded = read_target(found, meshes.target, "bfloat16", lambda done, total: None)
    assert needed["target"] == held(loaded.params)
    target = make_target(found.config, meshes.target)
    frozen = frozen_tables(target, config, meshes.draft, loaded.params, np.arange(512))
    draft = dspark_draft(config, meshes.target)
    parts = (config, target, draft, in_process(target), meshes, loaded.params, frozen)
    job = Job(settings, *parts)
    state = init_state(job, init_draft_params(config, 0))
    assert needed["draft and its gradient"] == 2 * held(state.params)
    assert needed["optimizer state"] == held(state.opt_state)


def held(tree: object) -> int:
    """Bytes on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_longer_context_and_more_rows_need_more():
    found = find_target(embedded("tiny-glm"), SETTINGS.draft.aux_layer_ids)
    config = draft_config(SETTINGS.draft, found.config, 0)

    def activations(**changes: object) -> int:
        settings = replace(SETTINGS, mesh=MeshConfig(1, 1), **changes)
        return needed_bytes(settings, found, config, make_meshes(settings))["activations"]

    least = activations()
    assert activations(batch_rows=16) == 2 * least == 4 * activations(accumulate=2)
    assert activations(sequence_length=1024) > least > activations(compute_dtype="bfloat16")


def test_fp8_weights_are_counted_as_fp8():
    described = TARGETS["glm-5.2"]
    found = TargetFiles(Path(), read_config(described), described, None, ())
    mesh = target_mesh(jax.devices()[:1], 1)

    def counted(described: Mapping[str, Any]) -> int:
        shapes = target_shapes(found._replace(described=described), mesh, "bfloat16")
        return share_bytes(mesh, shapes, family(found.config))

    assert counted(described) == pytest.approx(746e9, rel=2e-3)
    assert counted({**described, "quantization_config": None}) > 1.4e12


def test_what_does_not_fit_is_refused_with_both_numbers():
    needed = {"target": 30 * 10**9, "activations": 2 * 10**9}
    check_memory(needed, 32 * 10**9)
    check_memory(needed, None)
    with pytest.raises(ValueError, match=r"at least 32.00 GB.*target 30.00 GB.*has 16.00 GB; spr"):
        check_memory(needed, 16 * 10**9)
    assert device_bytes(make_meshes(SETTINGS).draft) is None  # a CPU does not say
