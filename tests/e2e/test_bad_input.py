"""What a user gets wrong ends in one sentence and exit code 2, before anything expensive."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "dspark_jax/assets/tiny-glm"
DRAFT = ROOT / "dspark_jax/assets/tiny-glm-dspark"
GOOD = json.dumps(
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
)
QUESTION = json.dumps({"conversations": [{"from": "human", "value": "a"}]})


def refusal(tmp_path: Path, *arguments: str | Path) -> str:
    """The one sentence of a run that must refuse."""
    command = [sys.executable, "-m", "dspark_jax.train", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def changed_target(tmp_path: Path, **changes: object) -> Path:
    """A copy of the embedded target with another config.json."""
    folder = tmp_path / "target"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, "{broken"], "line 2 is not JSON"),
        ([GOOD, '{"text": "no turns"}'], "line 2 has no list"),
        ([GOOD, '{"conversations": [{"from": "robot", "value": "x"}]}'], "role 'robot'"),
        ([QUESTION, QUESTION], "has a trainable token"),
        ([GOOD], "leaves none to hold out"),
        ([], "holds no conversation"),
    ],
)
def test_data_that_cannot_be_used_is_named_with_file_and_line(
    tmp_path: Path, lines: list[str], said: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    message = refusal(tmp_path, "--data", data)
    assert said in message and str(data) in message


def test_missing_data_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path, "--data", tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("ids", [("3", "1"), ("1", "7"), ("1", "1")])
def test_aux_layers_outside_the_target_or_out_of_order_are_refused(
    tmp_path: Path, ids: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, "--aux-layer-ids", *ids)
    assert "aux_layer_ids" in message and "6" in message


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = changed_target(tmp_path, vocab_size=2000)
    message = refusal(tmp_path, "--target", folder)
    assert "2048 tokens" in message and "2000 rows" in message


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = changed_target(tmp_path, model_type="llama")
    assert "'llama' is not supported" in refusal(tmp_path, "--target", folder)


def test_a_target_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    folder = changed_target(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refusal(tmp_path, "--target", folder)


def test_a_draft_for_another_target_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    shutil.copytree(DRAFT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["transformer_layer_config"]["hidden_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path, "--warm-start", folder)
    assert "hidden_size 128 does not match target hidden_size 192" in message


def test_a_misspelt_flag_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dspark_jax.train", "--stesp", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--steps" in done.stdout + done.stderr
