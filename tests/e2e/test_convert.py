"""The real command on the embedded draft: export, import, inspect, and training goes on from it."""

import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.config import DraftConfig
from dspark_jax.convert.__main__ import main
from dspark_jax.convert.files import write_tensors
from dspark_jax.convert.importing import training_flags
from dspark_jax.convert.run_record import target_tensors
from dspark_jax.convert.tensors import chosen_rows, copied
from dspark_jax.draft_files import read_tensors, whole
from dspark_jax.draft_formats.dense import DFLASH
from dspark_jax.draft_formats.formats import read
from dspark_jax.draft_formats.keys import Described, write
from dspark_jax.targets.families import read_config
from dspark_jax.train.__main__ import parse
from dspark_jax.train.presets import draft_config

ROOT = Path(__file__).resolve().parents[2]
DRAFT, TARGET = embedded("tiny-glm-dspark"), embedded("tiny-glm")
NAMED = ("--target-name", "org/tiny-glm")


def convert(*arguments: str | Path) -> str:
    """What the command says, run by its own parser in this process."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["convert", *map(str, arguments)]
    try:
        with redirect_stdout(said):
            assert main() == 0
    finally:
        sys.argv = before
    return said.getvalue()


def make_run(folder: Path) -> Path:
    """A run's output, as training leaves it."""
    folder.mkdir()
    (folder / "draft").symlink_to(DRAFT)
    settings = {"target": None, "data": None, "conversations": 1536, "steps": 400, "seed": 0}
    settings |= {"optimizer": {"optimizer": "muon", "learning_rate": 1e-3}}
    (folder / "config.json").write_text(json.dumps(settings))
    mode = {"answers": 24, "acceptance_length": 3.25, "tokens_per_second": 100.0}
    mode |= {"plain_tokens_per_second": 50.0, "speedup": 2.0}
    report = {"machine": "a laptop", "served": {"greedy": mode}}
    report |= {"validation": {"accept_len": 3.5, "position_accuracy": [0.5, None]}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_run_is_exported_with_its_card_and_settings(tmp_path: Path):
    run, output = make_run(tmp_path / "run"), tmp_path / "out"
    convert("export", "--checkpoint", run, "--output", output, *NAMED)
    assert {p.name for p in output.iterdir()} == {
        *("README.md", "calibration.json", "config.json", "model.safetensors", "run_config.json")
    }
    settings = json.loads((run / "config.json").read_text())
    assert json.loads((output / "run_config.json").read_text()) == settings
    card = (output / "README.md").read_text()
    count = sum(t.size for t in load_file(DRAFT / "model.safetensors").values())
    assert f"| trainable parameters | {count:,} |" in card
    assert "| optimizer.learning_rate | 0.001 |" in card and "| greedy | 24 | 3.25 |" in card
    assert '"num_speculative_tokens": 8' in card and f'"model": "{output}"' in card
    assert "vllm serve org/tiny-glm --speculative-config '{" in card
    described = json.loads((output / "config.json").read_text())
    ours = json.loads((DRAFT / "config.json").read_text())
    ours["speculators_config"]["verifier"]["name_or_path"] = "org/tiny-glm"
    assert described == ours


def test_the_target_of_a_run_gives_its_tables(tmp_path: Path):
    run, output = make_run(tmp_path / "run"), tmp_path / "out"
    convert("export", "--checkpoint", run, "--output", output, *NAMED, "--format", "deepspec")
    theirs, ours = load_file(output / "model.safetensors"), load_file(TARGET / "model.safetensors")
    embedding = ours["model.embed_tokens.weight"].astype(jnp.bfloat16)
    assert np.array_equal(theirs["embed_tokens.weight"], embedding)
    assert "sglang.launch_server" in (output / "README.md").read_text()
    run_again = tmp_path / "again"
    told = convert("import", "--source", output, "--output", run_again)
    assert "--warm-start" in told
    before, after = (
        load_file(DRAFT / "model.safetensors"),
        load_file(run_again / "model.safetensors"),
    )
    assert all(np.array_equal(after[name], before[name]) for name in before)
    screen = convert("inspect", run_again)
    assert len(screen.splitlines()) <= 24
    for said in ("imported from deepspec", "[1, 2, 3] by what enters", "[0, 1, 2] by output"):
        assert said in screen


def test_a_target_of_orbax_arrays_gives_the_same_tables(tmp_path: Path):
    run, saved = make_run(tmp_path / "run"), tmp_path / "target"
    convert("target", "--source", TARGET, "--output", saved)
    export = ("export", "--checkpoint", run, *NAMED, "--format", "deepspec")
    for target in (TARGET, saved):
        convert(*export, "--target", target, "--output", tmp_path / f"of-{target.name}")
    ours, theirs = (
        load_file(tmp_path / f"of-{name}" / "model.safetensors") for name in ("target", TARGET.name)
    )
    assert ours.keys() == theirs.keys() >= {"embed_tokens.weight", "lm_head.weight"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    head = target_tensors(saved)["lm_head.weight"]
    rows = chosen_rows(head, "head", [3, 500], np.dtype(jnp.bfloat16)).pieces()
    assert np.array_equal(np.concatenate(list(rows)), theirs["lm_head.weight"][np.array([3, 500])])


def make_dflash(folder: Path) -> DraftConfig:
    """The embedded draft without its heads, in the files of a DFlash draft."""
    config = read(json.loads((DRAFT / "config.json").read_text())).said.config
    made = replace(
        config,
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        sample_from_anchor=False,
    )
    tensors = load_file(DRAFT / "model.safetensors")
    bare = {n: t for n, t in tensors.items() if "_head" not in n}
    folder.mkdir()
    save_file(bare, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(write(DFLASH, Described(made))))
    return made


def test_a_dflash_draft_gets_heads_and_goes_on_in_training(tmp_path: Path):
    plain = make_dflash(tmp_path / "dflash")
    arguments = ("--source", tmp_path / "dflash", "--output", tmp_path / "run")
    told = convert("import", *arguments, "--markov-rank", "16")
    assert "drawn afresh: " in told and "markov_head.markov_w1.weight" in told
    config = read(json.loads((tmp_path / "run" / "config.json").read_text())).said.config
    assert (config.markov_rank, config.enable_confidence_head) == (16, True)
    assert config.aux_layer_ids == plain.aux_layer_ids and not config.sample_from_anchor
    screen = convert("inspect", tmp_path / "dflash")
    assert "drafts a round   7" in screen and "DFlash method" in screen


def test_the_flags_that_an_import_gives_are_those_of_its_draft():
    config = read(json.loads((DRAFT / "config.json").read_text())).said.config
    given = parse(training_flags(config))
    target = read_config(json.loads((TARGET / "config.json").read_text()))
    made = draft_config(given.settings.draft, target, 0)
    same = {"max_position_embeddings": 0, "sliding_window": 0}  # a target's, and no layer's
    assert made.__dict__ | same == config.__dict__ | same


@pytest.mark.slow
def test_training_goes_on_from_an_imported_draft(tmp_path: Path):
    make_dflash(tmp_path / "dflash")
    told = convert("import", "--source", tmp_path / "dflash", "--output", tmp_path / "run")
    words = told.split("to train on: ")[1].split()
    assert words[:3] == ["python", "-m", "dspark_jax.train"]
    given = [
        w.replace("TARGET", str(TARGET)).replace("OUTPUT", str(tmp_path / "on")) for w in words
    ]
    short = ["--steps", "2", "--conversations", "64", "--serve-prompts", "1", "--save-every", "2"]
    done = subprocess.run(
        [sys.executable, *given[1:], *short], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    exported = ("--checkpoint", tmp_path / "on", "--output", tmp_path / "out")
    convert("export", *exported, *NAMED)


def test_shards_have_an_index_and_are_read_again(tmp_path: Path):
    write_tensors(
        tmp_path, [copied(t) for t in stored_tensors(DRAFT).values()], shard_bytes=500_000
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    stored = stored_tensors(tmp_path)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    ours = stored_tensors(DRAFT)
    assert {n: whole(t).tobytes() for n, t in stored.items()} == {
        n: whole(t).tobytes() for n, t in ours.items()
    }
    read_tensors(tmp_path)


def test_help_is_quick():
    start = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "dspark_jax.convert", "export", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--allow-unservable" in done.stdout
    assert "jax._src" not in done.stderr and time.monotonic() - start < 10
