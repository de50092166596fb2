"""The doctor names what was broken in a copy of a good draft, and finds nothing in the good one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file, save_file

from dspark_jax.anchors import make_blocks
from dspark_jax.checkpoints.folder import embedded
from dspark_jax.convert import doctor
from dspark_jax.convert.__main__ import main
from dspark_jax.convert.doctor import check_pair, diagnosis_of, judged, report
from dspark_jax.convert.evidence import PROMPTS, Evidence, gather, load
from dspark_jax.convert.patient import open_patient, survived
from dspark_jax.convert.source import read_object
from dspark_jax.convert.verdict import Diagnosis
from dspark_jax.draft import draft_graphdef
from dspark_jax.drafter import score_blocks
from dspark_jax.layers import rms_norm
from dspark_jax.targets.families import read_config
from dspark_jax.types import Batch

ROOT = Path(__file__).resolve().parents[2]
DRAFT, TARGET = embedded("tiny-glm-dspark"), embedded("tiny-glm")
LAYER = "transformer_layer_config"
Tensors = dict[str, Any]


@cache
def evidence() -> Evidence:
    """The embedded target's answers, made once for all drafts."""
    return gather(load(TARGET, range(5), 1, "float32"), PROMPTS, 256, 64, 8, 8)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the good draft with changed keys and tensors."""

    def make(change: Callable[[Tensors], None] = lambda tensors: None, **keys: Any) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(DRAFT, folder)
        described = json.loads((folder / "config.json").read_text())
        for name, value in keys.items():
            described[name] = described[name] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(described))
        stored = load_file(folder / "model.safetensors")
        tensors = {name: np.array(value.astype(jnp.float32)) for name, value in stored.items()}
        change(tensors)
        kept = {
            n: jnp.asarray(v, jnp.bfloat16 if v.dtype == np.float32 else None)
            for n, v in tensors.items()
        }
        save_file(kept, folder / "model.safetensors")
        return folder

    return make


def examined(folder: Path) -> tuple[Diagnosis, dict[str, Any]]:
    """The diagnosis, and what is said of it."""
    patient = open_patient(str(folder))
    diagnosis = diagnosis_of(patient, evidence())
    said = report(patient, evidence(), diagnosis)
    assert judged(patient, diagnosis)[1] == (0 if said["fits"] else 1)
    return diagnosis, said


def named(folder: Path, *kinds: str) -> str:
    """The fixes of a draft of which exactly these mistakes are found."""
    _, said = examined(folder)
    assert (said["mistakes"], said["fits"]) == (list(kinds), False)
    assert all(kind in said["verdict"] for kind in kinds)
    return "; ".join(said["fixes"])


def test_a_reading_is_scored_as_training_scores_its_configuration():
    patient, given = open_patient(str(DRAFT)), evidence()
    text, reading = given.text, patient.as_configured()
    seen = text.segment.astype(bool)
    position = jnp.broadcast_to(jnp.arange(seen.shape[1]), seen.shape)
    blocks = make_blocks(text.anchor, text.valid, text.tokens, seen, text.segment, patient.config)
    drafter = nnx.merge(draft_graphdef(patient.config), patient.params, copy=True)
    batch = Batch(text.tokens, seen, text.segment, position)
    aux = given.states[:, :, 1:4].reshape(*seen.shape, -1)
    scores = score_blocks(drafter, given.frozen, batch, aux, blocks)
    logits = scores.hidden @ given.frozen.lm_head
    assert scores.markov is not None and drafter.markov_head is not None
    logits += scores.markov @ drafter.markov_head.markov_w2.kernel[...]
    right = np.asarray(logits.argmax(-1) == blocks.labels).cumprod(axis=-1).astype(bool)
    ours = survived(patient, given, reading)
    assert np.array_equal(ours, right & np.asarray(text.valid)[..., None])


def test_the_command_finds_nothing_in_the_good_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    result = tmp_path / "result.json"
    arguments = ["convert", "doctor", "--draft", str(DRAFT), "--target", str(TARGET)]
    arguments += ["--answer-tokens", "48", "--blocks", "8", "--json", str(result)]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    told = capsys.readouterr().out
    assert "verdict: it fits; acceptance length " in told and "better" in told
    assert "not told: vocabulary map" in told and "not told: window of 128" in told
    said = json.loads(result.read_text())
    assert said["fits"] and not said["mistakes"] and not said["faults"]
    standings = {r["reading"]: r["standing"] for r in said["readings"]}
    assert standings["as configured"] == "configured"
    assert standings["without the target's states"] == "worse"
    length = {r["reading"]: r["acceptance_length"] for r in said["readings"]}
    assert length["as configured"] > 2.8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt-tokens", "0"), "--prompt-tokens is 0; give at least 1"),
        (("--answer-tokens", "0"), "--answer-tokens is 0; give at least 1"),
        (("--answer-tokens", "3"), "--answer-tokens 3 is shorter than a block of 8"),
        (("--blocks", "0"), "--blocks is 0; give at least 1"),
        (("--blocks", "-3"), "--blocks is -3; give at least 1"),
        (("--json", "nowhere/result.json"), "--json nowhere/result.json has no folder"),
        (("--json", "."), "--json . is a folder"),
    ],
)
def test_flags_are_refused_before_anything_runs(
    flags: tuple[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(doctor, "load", None)
    arguments = ["convert", "doctor", "--draft", str(DRAFT), "--target", str(TARGET), *flags]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 2
    assert said in capsys.readouterr().err


def test_layer_ids_below_the_first_are_refused(broken: Callable[..., Path]):
    folder = broken(aux_hidden_state_layer_ids=[-1, 1, 2])
    target = read_config(read_object(TARGET / "config.json"))
    with pytest.raises(ValueError, match=r"reads aux layers \[-1, 1, 2\] .* one too low"):
        check_pair(open_patient(str(folder)), target, TARGET)


def test_the_other_layout_is_named(broken: Callable[..., Path]):
    fixes = named(broken(sample_from_anchor=False), "layout")
    assert "set sample_from_anchor to True (it is False)" in fixes


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 3, 4]])
def test_shifted_layer_ids_are_named(broken: Callable[..., Path], ids: list[int]):
    fixes = named(broken(aux_hidden_state_layer_ids=ids), "layer ids")
    assert f"set aux_hidden_state_layer_ids to [1, 2, 3] (it is {ids})" in fixes


def test_another_rope_theta_is_named(broken: Callable[..., Path]):
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    fixes = named(broken(**{LAYER: {"rope_parameters": rope}}), "RoPE theta")
    assert f"set {LAYER}.rope_parameters.rope_theta to 10000.0" in fixes


def test_interleaved_rotary_pairs_are_named(broken: Callable[..., Path]):
    order = np.argsort(np.r_[0:96:2, 1:96:2])

    def interleave(tensors: Tensors) -> None:
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            value = tensors[f"layers.0.self_attn.{name}.weight"]
            heads = value.reshape(-1, 96, *value.shape[1:])[:, order]
            tensors[f"layers.0.self_attn.{name}.weight"] = heads.reshape(value.shape).copy()

    assert "q_proj and k_proj" in named(broken(interleave), "RoPE pairing")


def test_a_final_norm_that_was_applied_in_training_is_named(broken: Callable[..., Path]):
    """The third state is replaced by what leaves the last layer, normed, as transformers gives it.

    The layer that fuses the states is fitted to give nearly what it gave before.
    """
    given = evidence()
    real = np.asarray(given.text.segment).astype(bool)
    normed = rms_norm(given.states[:, :, 4], given.last_norm, given.loaded.config.rms_norm_eps)
    first, second, third = (np.asarray(given.states[:, :, j])[real] for j in (1, 2, 3))
    inputs = np.concatenate([first, second, np.asarray(normed)[real]], axis=1)

    def refit(tensors: Tensors) -> None:
        wanted = np.concatenate([first, second, third], axis=1) @ tensors["fc.weight"].T
        ridge = 1e-3 * len(inputs) * np.eye(inputs.shape[1], dtype=np.float32)
        fitted = np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted)
        tensors["fc.weight"] = np.ascontiguousarray(fitted.T)

    fixes = named(broken(refit, aux_hidden_state_layer_ids=[1, 2, 4]), "final norm")
    assert "through the target's final norm" in fixes


def test_a_window_that_the_draft_was_not_trained_with_is_named(broken: Callable[..., Path]):
    sliding = {
        "layer_types": ["sliding_attention"],
        "sliding_window": 4,
        "use_sliding_window": True,
    }
    folder = broken(**{LAYER: sliding}, sliding_window_non_causal=True)
    assert "layer_types to ['full_attention']" in named(folder, "window")


def reduce_vocabulary(tensors: Tensors) -> None:
    """Keep the tokens of the answers and every third other one, as an exported draft holds them."""
    given = evidence()
    used = np.unique(np.asarray(given.text.tokens))
    kept = np.union1d(used, np.arange(2, 512, 3))[: 512 - 8]
    head = np.asarray(given.frozen.lm_head).T
    tensors["lm_head.weight"] = np.ascontiguousarray(head[kept])
    w2 = "markov_head.markov_w2.weight"
    tensors[w2] = np.ascontiguousarray(tensors[w2][kept])
    tensors["d2t"] = (kept - np.arange(len(kept))).astype(np.int32)
    tensors["t2d"] = np.isin(np.arange(512), kept)
    assert len(kept) < 500


def reduced_size() -> int:
    tensors = {"markov_head.markov_w2.weight": np.zeros((512, 1), np.float32)}
    reduce_vocabulary(tensors)
    return len(tensors["d2t"])


def test_a_reduced_vocabulary_is_told(broken: Callable[..., Path]):
    diagnosis, said = examined(broken(reduce_vocabulary, draft_vocab_size=reduced_size()))
    assert said["fits"] and diagnosis.configured.acceptance_length > 2.8
    assert not any("vocabulary map" in line for line in said["not_told"])
    tried = [t.change.what for t in diagnosis.tried if t.change.kind == "vocabulary map"]
    assert tried == ["draft ids as target ids"]


@pytest.mark.parametrize("mistake", ["ids", "zeros", "absent"])
def test_another_vocabulary_map_is_named(broken: Callable[..., Path], mistake: str):
    def change(tensors: Tensors) -> None:
        reduce_vocabulary(tensors)
        if mistake == "ids":
            tensors["d2t"] += np.arange(len(tensors["d2t"]), dtype=np.int32)
            del tensors["t2d"]
        elif mistake == "zeros":
            tensors["d2t"][:] = 0
        else:
            del tensors["d2t"]

    found = named(broken(change, draft_vocab_size=reduced_size()), "vocabulary map")
    assert ("subtract the index" if mistake == "ids" else "not the map of t2d") in found


def test_zeroed_weights_of_a_layer_are_named(broken: Callable[..., Path]):
    def zero(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith("layers.0."):
                tensors[name][:] = 0

    _, said = examined(broken(zero))
    assert not said["fits"] and "damaged" in said["verdict"]
    assert "layers.0.mlp.down_proj.weight is zero everywhere" in said["faults"]


def test_a_draft_that_never_learnt_is_unusable(broken: Callable[..., Path]):
    noise = np.random.default_rng(0)

    def forget(tensors: Tensors) -> None:
        for name, value in tensors.items():
            if value.ndim == 2:
                tensors[name] = noise.normal(0, 0.02, value.shape).astype(np.float32)

    _, said = examined(broken(forget))
    assert not said["fits"] and "unusable" in said["verdict"] and not said["mistakes"]


def test_two_mistakes_are_named_one_upon_the_other(broken: Callable[..., Path]):
    rope = {"rope_theta": 8e6, "rope_type": "default"}
    folder = broken(aux_hidden_state_layer_ids=[2, 3, 4], **{LAYER: {"rope_parameters": rope}})
    _, said = examined(folder)
    assert sorted(said["mistakes"]) == ["RoPE theta", "layer ids"]


def test_a_wrong_mask_token_is_named(broken: Callable[..., Path]):
    assert "mask_token_id to 4" in named(broken(mask_token_id=300), "mask token")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_window_that_config_json_lost_is_named(tmp_path: Path):
    """A draft trained with a window of 8, of which only the size is still written."""
    flags = ["--layer-types", "sliding_attention", "--sliding-window", "8", "--num-layers", "1"]
    flags += ["--steps", "160", "--conversations", "384", "--serve-prompts", "1"]
    command = [sys.executable, "-m", "dspark_jax.train", "--output", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "draft"
    assert examined(folder)[1]["fits"]
    described = json.loads((folder / "config.json").read_text())
    described[LAYER] |= {"layer_types": ["full_attention"], "use_sliding_window": False}
    (folder / "config.json").write_text(json.dumps(described))
    assert "layer_types to ['sliding_attention']" in named(folder, "window")
