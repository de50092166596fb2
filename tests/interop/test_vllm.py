"""vLLM's own loader judges fresh exports: nothing left over or unwritten, numbers equal to ours.

`tests/interop/set-up` makes the environment; DSPARK_JAX_INTEROP names its folder if it is not
.interop of the checkout. Without it these tests are skipped.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig, Qwen3Config
from dspark_jax.convert.exporting import export_draft
from dspark_jax.convert.settings import Export
from dspark_jax.draft_files import read_tensors, target_ids, whole
from dspark_jax.draft_formats.formats import FormatName
from dspark_jax.draft_formats.speculators import config_to_json
from dspark_jax.draft_weights import parameter_table, params_from_tensors
from dspark_jax.drafter import base_logits
from dspark_jax.targets.families import init_params, write_config
from dspark_jax.targets.weights import tensors_from_params
from dspark_jax.types import Frozen

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("DSPARK_JAX_INTEROP", ROOT / ".interop"))
PYTHON = FOLDER / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no vLLM in {FOLDER}: tests/interop/set-up makes it"
)

TARGET = Qwen3Config(
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
FULL = DraftConfig(
    vocab_size=80,
    draft_vocab_size=80,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    aux_layer_ids=(1, 3, 5),
    mask_token_id=79,
    block_size=5,
    markov_rank=8,
    rope_theta=8e6,
)
CONFIGS = {
    "full": FULL,
    "reduced": replace(FULL, draft_vocab_size=48),
    "1+N": replace(FULL, draft_vocab_size=48, sample_from_anchor=False),
    "windows": replace(
        FULL, layer_types=("full_attention", "sliding_attention"), sliding_window=16
    ),
    "no confidence": replace(FULL, enable_confidence_head=False),
    "plain confidence": replace(FULL, confidence_head_with_markov=False),
}
FORMATS = get_args(FormatName)


class Judged(NamedTuple):
    """An export, what vLLM made of it, and what its heads computed."""

    folder: Path
    config: DraftConfig
    verdict: dict[str, Any]
    arrays: dict[str, np.ndarray]


def make_run(config: DraftConfig, folder: Path) -> Path:
    """A draft as the trainer leaves it, with numbers drawn at random."""
    rng = np.random.default_rng(len(folder.name))
    tensors = {
        row.name: jnp.asarray(rng.standard_normal(row.shape), jnp.bfloat16)
        for row in parameter_table(config)
    }
    if config.draft_vocab_size < config.vocab_size:
        ids = np.sort(rng.permutation(config.vocab_size)[: config.draft_vocab_size])
        tensors["d2t"] = jnp.asarray(ids - np.arange(len(ids)), jnp.int32)
    folder.mkdir(parents=True)
    described = config_to_json(config, "target", ["Qwen3ForCausalLM"], "bfloat16")
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_target(folder: Path) -> Path:
    """A random Qwen3 that the drafts belong to."""
    folder.mkdir()
    tensors = tensors_from_params(TARGET, init_params(TARGET, 0))
    save_file({n: jnp.asarray(x) for n, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(write_config(TARGET, 1, 0)))
    return folder


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    """What the heads are given."""
    rng = np.random.default_rng(0)
    hidden, aux = (rng.standard_normal((5, n)).astype(np.float32) for n in (32, 96))
    return {"hidden": hidden, "aux": aux, "tokens": np.array([3, 7, 1, 0, 79])}


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, np.ndarray]
) -> dict[tuple[str, FormatName], Judged]:
    """Every kind of draft in every format, judged by one process: importing vLLM takes seconds."""
    place = tmp_path_factory.mktemp("interop")
    target = make_target(place / "target")
    np.savez(place / "inputs.npz", **inputs)  # pyright: ignore[reportArgumentType]
    exports = {}
    for name, config in CONFIGS.items():
        run = make_run(config, place / "runs" / name)
        for one in FORMATS:
            output = place / "exports" / f"{name} {one}"
            export_draft(Export(run, output, "org/target", one, target=str(target)))
            exports[name, one] = output
    (place / "out").mkdir()
    command = [PYTHON, Path(__file__).with_name("judge.py"), *exports.values()]
    command += ["--target", target, "--inputs", place / "inputs.npz", "--output", place / "out"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        key: Judged(
            folder,
            CONFIGS[key[0]],
            json.loads((place / "out" / f"{number}.json").read_text()),
            dict(np.load(saved)) if (saved := place / "out" / f"{number}.npz").exists() else {},
        )
        for number, (key, folder) in enumerate(exports.items())
    }


each = pytest.mark.parametrize("name", CONFIGS)
in_every_format = pytest.mark.parametrize("one", FORMATS)


@each
@in_every_format
def test_vllm_loads_every_parameter_and_reads_the_settings_as_they_are(
    name: str, one: FormatName, judged: dict[tuple[str, FormatName], Judged]
):
    config, verdict = judged[name, one].config, judged[name, one].verdict
    assert "failed" not in verdict, verdict
    assert verdict["architecture"] == "Qwen3DSparkModel"
    assert verdict["unwritten"] == []
    assert verdict["num_speculative_tokens"] == config.draft_length
    assert verdict["told_tokens"] in (None, config.draft_length)
    assert verdict["sample_from_anchor"] is config.sample_from_anchor
    assert tuple(verdict["aux_layers"]) == config.aux_layer_ids
    assert verdict["mask_token"] == config.mask_token_id
    assert tuple(verdict["causal"]) == config.causal
    assert verdict["rope_theta"] == config.rope_theta
    assert verdict["confidence_head"] is config.enable_confidence_head


@each
@in_every_format
def test_vllm_computes_our_numbers(
    name: str,
    one: FormatName,
    judged: dict[tuple[str, FormatName], Judged],
    inputs: dict[str, np.ndarray],
):
    export = judged[name, one]
    ours = numbers(export.folder, export.config, inputs)
    assert export.arrays.keys() == ours.keys()
    for key, value in export.arrays.items():
        np.testing.assert_allclose(value, ours[key], rtol=1e-5, atol=1e-5, err_msg=key)


def numbers(
    folder: Path, config: DraftConfig, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What our own modules make of an export's files."""
    tensors, stored = read_tensors(folder), stored_tensors(folder)
    drafter = params_from_tensors(config, tensors)
    hidden, aux, tokens = (jnp.asarray(inputs[name]) for name in ("hidden", "aux", "tokens"))
    assert drafter.markov_head is not None
    _, bias, embedding = drafter.markov_head.step(drafter.markov_head.start(hidden), tokens, hidden)
    result = {"fc": drafter.fc(aux), "embedding": embedding, "bias": bias}
    if drafter.confidence_head is not None:
        result["confidence"] = jax.nn.sigmoid(drafter.confidence_head(hidden, embedding))
    if "lm_head.weight" in stored:
        head = jnp.asarray(whole(stored["lm_head.weight"]), jnp.float32).T
        result["logits"] = base_logits(Frozen(head, head, tokens), hidden)
    if "d2t" in tensors:
        result["target_id"] = jnp.asarray(target_ids(folder, tensors, config))
    return {key: np.asarray(value) for key, value in result.items()}
