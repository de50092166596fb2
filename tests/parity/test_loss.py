"""The paper's loss and one optimizer step against PyTorch's, wherever `--golden` has them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.anchors import make_blocks
from dspark_jax.config import RECIPES, DraftConfig, LossConfig
from dspark_jax.draft_formats.speculators import config_from_json
from dspark_jax.draft_weights import NOT_TRAINED, params_from_tensors, tensors_from_params
from dspark_jax.objective import dspark_loss
from dspark_jax.train.optimizer import make_optimizer
from dspark_jax.train.settings import OptimizerSettings
from dspark_jax.types import Blocks, BlockScores

RELATIVE = 1e-5
ADAMW = OptimizerSettings(
    optimizer="adamw", learning_rate=1e-3, schedule="constant", warmup_share=0.0
)
MUON = OptimizerSettings(learning_rate=1e-3, schedule="constant", warmup_share=0.0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("paper_loss", "optimizer_step"):
        if name in metafunc.fixturenames:
            found = sorted(metafunc.config.option.golden.glob(f"draft/*/{name}.npz"))
            metafunc.parametrize(name, found, ids=lambda path: path.parent.name)


def read(folder: Path) -> tuple[dict[str, np.ndarray], DraftConfig]:
    text = (folder / "checkpoint/config.json").read_text()
    return dict(np.load(folder / "fixture.npz")), config_from_json(json.loads(text))


def assert_equal(name: str, ours: Any, theirs: np.ndarray) -> None:
    ours = np.asarray(ours).reshape(theirs.shape)
    error, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= RELATIVE * size, f"{name}: {error:.3g} of {size:.3g}"


def paper_blocks(arrays: Mapping[str, np.ndarray], config: DraftConfig) -> Blocks:
    def ints(name: str) -> jax.Array:
        return jnp.asarray(arrays[name], jnp.int32)

    anchor, valid = ints("mid/anchor_positions")[None], arrays["mid/anchor_valid"][None]
    rows = (ints("in/input_ids"), jnp.asarray(arrays["in/loss_mask"]), ints("in/document_ids") + 1)
    return make_blocks(
        anchor, jnp.asarray(valid), *rows, config, rule="paper", mask_cross_document=False
    )


def test_the_papers_loss_and_its_gradients_match(paper_loss: Path):
    arrays, config = read(paper_loss.parent)
    wanted = dict(np.load(paper_loss))
    blocks, K = paper_blocks(arrays, config), config.block_size
    assert_equal("eval_mask", blocks.label_mask.astype(float), wanted["eval_mask"])
    trained = np.asarray(blocks.label_mask).reshape(-1)
    np.testing.assert_array_equal(
        np.asarray(blocks.labels).reshape(-1)[trained], wanted["labels"].reshape(-1)[trained]
    )
    logits = jnp.asarray(arrays["mid/corrected_logits"])
    logits = logits.reshape(1, -1, K, logits.shape[-1])
    confidence = jnp.asarray(arrays["mid/confidence_logits"])[None]
    # The teacher's logits stand at the rows the slots read; where two slots share one, they agree.
    rows = np.asarray(blocks.anchor)[0, :, None] + np.arange(K)
    teacher = np.zeros((1, arrays["in/input_ids"].shape[1], logits.shape[-1]), np.float32)
    teacher[0, rows.reshape(-1)] = arrays["mid/targets"][0]
    loss = LossConfig(rule="paper", weights=RECIPES["paper"])
    head = jnp.eye(logits.shape[-1])

    def loss_of(logits: jax.Array, confidence: jax.Array) -> Any:
        scores = BlockScores(logits, None, confidence)
        tables = (head, None, jnp.asarray(teacher))
        return dspark_loss(lambda _, h: h, config, loss, scores, None, tables, blocks)

    both = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (total, outcome), (d_logits, d_confidence) = jax.jit(both)(logits, confidence)
    assert_equal("total", total, wanted["total"])
    assert_equal("ce", outcome.metrics["ce_loss_sum"], wanted["ce"])
    assert_equal("l1", outcome.metrics["l1_loss_sum"], wanted["l1"])
    assert_equal("confidence", outcome.metrics["confidence_loss_sum"], wanted["confidence"])
    assert_equal("d logits", d_logits, wanted["grad/corrected_logits"])
    assert_equal("d confidence", d_confidence, wanted["grad/confidence_logits"])


@pytest.mark.parametrize("settings", [ADAMW, MUON], ids=lambda s: s.optimizer)
def test_one_optimizer_step_matches(optimizer_step: Path, settings: OptimizerSettings):
    arrays, config = read(optimizer_step.parent)
    wanted = {
        name.removeprefix(f"{settings.optimizer}/"): value
        for name, value in np.load(optimizer_step).items()
        if name.startswith(f"{settings.optimizer}/")
    }
    weights = {k.removeprefix("w/"): v for k, v in arrays.items() if k.startswith("w/")}
    given = {k: v for k, v in weights.items() if k not in NOT_TRAINED}
    gradients = {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")}
    graphdef, params = nnx.split(params_from_tensors(config, given))
    gradient = nnx.state(params_from_tensors(config, gradients), nnx.Param)
    optimizer = make_optimizer(settings, steps=10)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    after = tensors_from_params(nnx.merge(graphdef, jax.tree.map(jnp.add, params, updates)))
    assert wanted.keys() == after.keys()
    for name, value in wanted.items():
        assert_equal(name, after[name], value)
