"""Our draft against the PyTorch one: every array of every folder `--golden`/draft/*/fixture.npz.

Sizes come from each folder's checkpoint/config.json, inputs and weights from its arrays.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.anchors import eligible_anchors, make_blocks, teacher_rows
from dspark_jax.chunked import Trained, corrected_logits
from dspark_jax.config import DraftConfig, LossConfig
from dspark_jax.draft_formats.speculators import config_from_json, config_to_json
from dspark_jax.draft_layer import before_anchor, block_mask, within
from dspark_jax.draft_weights import (
    NOT_TRAINED,
    parameter_table,
    params_from_tensors,
    tensors_from_params,
)
from dspark_jax.drafter import (
    NO_WINDOW,
    Drafter,
    base_logits,
    block_positions,
    block_states,
    score_blocks,
)
from dspark_jax.layers import rms_norm
from dspark_jax.objective import batch_loss
from dspark_jax.types import Batch, Blocks, BlockScores, Frozen, TargetStates

RELATIVE = 1e-5
"""Allowed difference, as a fraction of the array's largest magnitude."""
ABSOLUTE = 1e-7
"""Allowed where the whole array is zero."""

LOSSES = {
    "loss_kl_div": LossConfig(weights=(("kl_div", 1.0),)),
    "loss_rkl": LossConfig(weights=(("rkl", 1.0),)),
    "loss_jsd": LossConfig(weights=(("jsd", 1.0),)),
    "loss_nla": LossConfig(weights=(("nla", 1.0),)),
    "loss_lk_hybrid": LossConfig(weights=(("lk_hybrid", 1.0),)),
    "loss_mixed": LossConfig(weights=(("ce", 0.2), ("kl_div", 0.3), ("tv", 0.5))),
    "dpace": LossConfig(weights=(("ce", 1.0),), position_weights="dpace"),
}
"""Loss settings by variant; every other variant was trained with the default."""

CHECKPOINT_ONLY = {"deepspec"}
"""Another format's file of weights that a fixture holds already."""

INPUTS = (
    "document_ids",
    "hidden_states",
    "input_ids",
    "loss_mask",
    "position_ids",
    "verifier_last_hidden_states",
)
FORWARD, STEP = ("in/", "w/", "mid/"), ("out/", "metric/", "grad/")

Arrays = Mapping[str, np.ndarray]


class Case(NamedTuple):
    """A fixture's model and inputs in our types, and all its arrays."""

    arrays: Arrays
    config: DraftConfig
    drafter: Drafter
    frozen: Frozen
    batch: Batch
    aux_hidden: jax.Array
    blocks: Blocks


def fixture_folders(golden: Path) -> list[Path]:
    return sorted(path.parent for path in golden.glob("draft/*/fixture.npz"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        folders = fixture_folders(metafunc.config.option.golden)
        metafunc.parametrize("folder", folders, ids=lambda folder: folder.name)


@lru_cache(maxsize=1)
def load(folder: Path) -> Case:
    arrays = dict(np.load(folder / "fixture.npz"))
    config = config_from_json(json.loads((folder / "checkpoint/config.json").read_text()))
    weights = under("w/", arrays)
    batch = Batch(
        tokens=ints(arrays["in/input_ids"]),
        loss_mask=jnp.asarray(arrays["in/loss_mask"]),
        segment=ints(arrays["in/document_ids"]) + 1,
        position=ints(arrays["in/position_ids"]),
    )
    anchor = ints(arrays["mid/anchor_positions"])[None]
    valid = jnp.asarray(arrays["mid/anchor_valid"])[None]
    rows = (batch.tokens, batch.loss_mask, batch.segment)
    blocks = make_blocks(anchor, valid, *rows, config, mask_cross_document=False)
    return Case(
        arrays,
        config,
        params_from_tensors(config, weights),
        Frozen(
            embed=jnp.asarray(weights["embed_tokens.weight"]),
            lm_head=jnp.asarray(weights["lm_head.weight"].T),
            target_id=jnp.arange(config.draft_vocab_size) + ints(weights.get("d2t", np.array(0))),
        ),
        batch,
        jnp.asarray(arrays["in/hidden_states"]),
        blocks,
    )


def ints(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.int32)


def under(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays whose name begins with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def named(prefixes: tuple[str, ...], arrays: Arrays) -> set[str]:
    return {name for name in arrays if name.startswith(prefixes)}


def input_names(config: DraftConfig) -> set[str]:
    """What the model is fed: batch, anchors and weights."""
    absent = {"d2t", "t2d"} if config.draft_vocab_size == config.vocab_size else set()
    weights = {row.name for row in parameter_table(config)} | (NOT_TRAINED - absent)
    anchors = {"mid/anchor_positions", "mid/anchor_valid"}
    return anchors | {f"in/{name}" for name in INPUTS} | {f"w/{name}" for name in weights}


def dense_masks(case: Case) -> list[jax.Array]:
    """The additive masks [1, 1, slots, context + slots] of full and of sliding layers."""
    config, anchor = case.config, case.blocks.anchor
    kinds = sorted(set(zip(config.layer_types, config.windows, config.causal, strict=True)))
    masks = []
    for _, window, causal in kinds:
        seen = before_anchor(case.batch.segment, anchor)
        seen = within(seen, anchor, NO_WINDOW if window is None else window)[0]
        own = np.kron(np.eye(anchor.shape[1], dtype=bool), block_mask(config.block_size, causal))
        whole = jnp.concatenate([jnp.repeat(seen, config.block_size, axis=0), own], axis=1)
        masks.append(jnp.where(whole, 0.0, -jnp.inf)[None, None])
    return masks


def rope_tables(case: Case) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of context and slots, each angle twice (element j turns with j + d/2)."""
    position, anchor = case.batch.position, case.blocks.anchor
    starts = jnp.take_along_axis(position, anchor, axis=1)
    slots = block_positions(starts, case.config.block_size).reshape(1, -1)
    angle = case.drafter.angles(jnp.concatenate([position, slots], axis=1))
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def teacher(case: Case) -> tuple[Any, Any]:
    """(unembed, tables): the target's final norm and head, as the loss calls them."""
    tables = {
        name: jnp.asarray(case.arrays[f"w/verifier_{name}.weight"]) for name in ("norm", "lm_head")
    }
    eps = case.config.rms_norm_eps

    def unembed(tables: dict[str, jax.Array], hidden: jax.Array) -> jax.Array:
        return rms_norm(hidden, tables["norm"], eps) @ tables["lm_head"].T

    return unembed, tables


def last_hidden(case: Case) -> jax.Array:
    return jnp.asarray(case.arrays["in/verifier_last_hidden_states"])


def teacher_logits(case: Case) -> jax.Array:
    """The target's logits at the rows the slots predict from."""
    unembed, tables = teacher(case)
    rows = teacher_rows(case.blocks.anchor, case.config, last_hidden(case).shape[1])[0]
    return unembed(tables, last_hidden(case)[:, rows])


def logits_of(case: Case, scores: BlockScores) -> jax.Array:
    head = case.drafter.markov_head
    factor = None if head is None else head.markov_w2.kernel[...]
    return corrected_logits(Trained(scores.hidden, scores.markov, factor), case.frozen.lm_head)


def forward(case: Case) -> dict[str, jax.Array]:
    """Our version of every `mid/` array that is not an input."""
    given = (case.drafter, case.frozen, case.batch, case.aux_hidden, case.blocks)
    states, scores = block_states(*given), score_blocks(*given)
    cos, sin = rope_tables(case)
    slots = {
        "hidden": states.hidden,
        "base_logits": base_logits(case.frozen, states.hidden),
        "corrected_logits": logits_of(case, scores),
        "targets": teacher_logits(case),
        "aligned_loss_mask": case.blocks.label_mask,
    } | {f"layer{i}_out": x for i, x in enumerate(states.layers)}
    ours = {name: x.reshape(1, -1, *x.shape[3:]) for name, x in slots.items()}
    ours |= {f"attn_mask_{i}": mask for i, mask in enumerate(dense_masks(case))}
    if scores.confidence is not None:
        ours["confidence_logits"] = scores.confidence[0]
    rows = block_positions(case.blocks.anchor, case.config.block_size)
    return ours | {
        "anchored_block_indices": rows.reshape(-1),
        "ctx_after_fc_hidden_norm": case.drafter.fuse(case.aux_hidden),
        "rope_cos": cos,
        "rope_sin": sin,
    }


def training_step(case: Case, setting: LossConfig) -> dict[str, Any]:
    """Our `out/`, `metric/` and `grad/` arrays."""
    graphdef, params = nnx.split(case.drafter)
    unembed, tables = teacher(case)

    def loss_of(params: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        states = TargetStates(case.aux_hidden, last_hidden(case))
        given = (case.frozen, tables, case.batch, states, case.blocks)
        drafter = nnx.merge(graphdef, params)
        loss, outcome = batch_loss(unembed, case.config, setting, drafter, *given)
        return loss, outcome.metrics

    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    named_grads = tensors_from_params(nnx.merge(graphdef, grads))
    return (
        {"out/loss": loss}
        | {f"metric/{name}": value for name, value in metrics.items()}
        | {f"grad/{name}": value for name, value in named_grads.items()}
    )


def differences(ours: Mapping[str, Any], theirs: Arrays) -> list[str]:
    """One line for every array that is not the same."""
    return [line for name in ours if (line := difference(name, ours[name], theirs[name]))]


def difference(name: str, ours: Any, theirs: np.ndarray) -> str | None:
    ours = np.asarray(ours)
    if ours.shape != theirs.shape:
        return f"{name}: shape {ours.shape}, expected {theirs.shape}"
    if theirs.dtype.kind != "f":
        return None if np.array_equal(ours, theirs) else f"{name}: not equal"
    finite = np.isfinite(theirs)
    if not np.array_equal(ours[~finite], theirs[~finite]):
        return f"{name}: not equal where infinite"
    size = np.abs(theirs[finite]).max(initial=0.0)
    limit = RELATIVE * size if size else ABSOLUTE
    error = np.abs(ours[finite] - theirs[finite]).max(initial=0.0)
    return None if error <= limit else f"{name}: differs by {error:.3g}, allowed {limit:.3g}"


def test_there_is_something_to_check(golden: Path):
    assert fixture_folders(golden), f"no draft/*/fixture.npz in {golden}"


def test_no_checkpoint_has_lost_its_fixture(golden: Path):
    folders = {path.parent for path in golden.glob("draft/*/checkpoint")}
    lost = {path.name for path in folders - set(fixture_folders(golden))}
    assert lost <= CHECKPOINT_ONLY


def test_forward_pass_matches(folder: Path):
    case = load(folder)
    ours = {f"mid/{name}": value for name, value in forward(case).items()}
    assert set(case.arrays) - named(STEP, case.arrays) == set(ours) | input_names(case.config)
    assert not differences(ours, case.arrays)


def test_training_step_matches(folder: Path):
    case = load(folder)
    ours = training_step(case, LOSSES.get(folder.name, LossConfig()))
    assert set(case.arrays) - named(FORWARD, case.arrays) == set(ours)
    assert not differences(ours, case.arrays)


def test_given_anchors_are_ones_we_could_draw(folder: Path):
    case = load(folder)
    eligible = eligible_anchors(case.batch.loss_mask, case.config)[0]
    anchor, valid = case.blocks.anchor[0], case.blocks.valid[0]
    assert valid.sum() == min(len(anchor), eligible.sum())
    assert eligible[anchor[valid]].all() and (jnp.diff(anchor[valid]) > 0).all()
    assert not anchor[~valid].any()


def test_vocabulary_maps_agree(folder: Path):
    case = load(folder)
    if "w/t2d" in case.arrays:
        chosen = np.zeros(case.config.vocab_size, bool)
        chosen[case.frozen.target_id] = True
        assert np.array_equal(chosen, case.arrays["w/t2d"])


def test_config_is_written_as_it_was_read(folder: Path):
    described = json.loads((folder / "checkpoint/config.json").read_text())
    verifier = described["speculators_config"]["verifier"]
    ours = config_to_json(
        config_from_json(described),
        verifier["name_or_path"],
        verifier["architectures"],
        described["dtype"],
    )
    # These two say which Python wrote the file; we ship no config.py and use no transformers.
    assert ours == {
        k: v for k, v in described.items() if k not in ("auto_map", "transformers_version")
    }
