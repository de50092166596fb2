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
SHAPE = json.loads((TINY / "config.json").read_text())
LAYERS, VOCABULARY, WIDTH = (
    SHAPE[name] for name in ("num_hidden_layers", "vocab_size", "hidden_size")
)
GOOD = json.dumps(
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
)
ODD_LINE_ENDS = GOOD.replace('"b"', '"b\u2028b\u0085b"')
LONG_QUESTION = GOOD.replace('"a"', f'"{"a " * 400}"')
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
        ([GOOD, '{"text": "no turns"}'], "line 2 has neither"),
        ([GOOD, '{"conversations": [{"from": "robot", "value": "x"}]}'], "role 'robot'"),
        ([GOOD, '{"conversations": [{"from": ["x"], "value": "y"}]}'], "line 2 has a turn"),
        ([GOOD, '{"messages": [{"role": "assistant", "content": "y"}]}'], "held-out conversations"),
        ([ODD_LINE_ENDS, "{broken"], "line 2 is not JSON"),
        ([QUESTION, QUESTION], "has a trainable token"),
        ([QUESTION] * 9 + [GOOD], "training conversations"),
        ([GOOD] * 9 + [QUESTION], "held-out conversations"),
        ([GOOD, LONG_QUESTION], "raise --prompt-tokens"),
        ([GOOD], "leaves none to train on"),
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


@pytest.mark.parametrize("ids", [("3", "1"), ("1", str(LAYERS + 1)), ("1", "1")])
def test_aux_layers_outside_the_target_or_out_of_order_are_refused(
    tmp_path: Path, ids: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, "--aux-layer-ids", *ids)
    assert f"aux_layer_ids [{', '.join(ids)}]" in message and f"{LAYERS} layers" in message


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = changed_target(tmp_path, vocab_size=VOCABULARY - 48)
    message = refusal(tmp_path, "--target", folder)
    assert f"{VOCABULARY} tokens" in message and f"{VOCABULARY - 48} rows" in message


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
    assert f"hidden_size 128 does not match target hidden_size {WIDTH}" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--aux-layer-ids", "0", "2", "4"), "aux_hidden_state_layer_ids"),
        (("--no-sample-from-anchor",), "sample_from_anchor"),
        (("--rope-theta", "5000"), "rope_parameters"),
        (("--head-dim", "24"), "head_dim"),
    ],
)
def test_a_warm_start_that_would_mean_something_else_is_refused(
    tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    message = refusal(tmp_path, "--warm-start", DRAFT, *flags)
    assert said in message and "but this run asks for" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", "0"), "steps is 0"),
        (("--learning-rate", "-1"), "learning_rate is -1.0"),
        (("--muon-momentum", "2"), "muon_momentum is 2.0"),
        (("--target", "/nonexistent"), "neither a folder nor a hub id"),
        (("--warm-start", str(TINY)), "describes no draft"),
        (("--preset", "glm-5.2"), "--target that they are meant for"),
        (("--max-anchors", "0"), "max_anchors is 0"),
        (("--loss-decay", "0"), "loss_decay is 0"),
        (("--held-out-share", "1"), "held_out_share 1.0"),
        (("--draft-vocab-size", "0"), "draft_vocab_size 0"),
        (("--num-key-value-heads", "3"), "3 key-value heads"),
        (("--head-dim", "31"), "head_dim be even"),
        (("--num-layers", "0"), "num_hidden_layers is 0"),
        (("--markov-rank", "-1"), "markov_rank is -1"),
        (("--sequence-length", "8"), "leaves no room"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    assert said in refusal(tmp_path, *flags)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_group": 8}, "n_group"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_parameters": None}, "rope_theta"),
    ],
)
def test_a_target_of_other_mathematics_is_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    assert said in refusal(tmp_path, "--target", changed_target(tmp_path, **changes))


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = changed_target(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer of" in refusal(tmp_path, "--target", folder)


def test_a_refused_run_leaves_the_output_of_an_earlier_one_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("earlier")
    refusal(tmp_path, "--data", tmp_path / "nowhere.jsonl")
    assert (tmp_path / "out" / "config.json").read_text() == "earlier"


def test_a_misspelt_flag_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dspark_jax.train", "--stesp", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--steps" in done.stdout + done.stderr
