"""The real command on the embedded target: a short run, what it leaves, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytestmark = pytest.mark.optimised

ROOT = Path(__file__).resolve().parents[2]
CALM = ("--learning-rate", "6e-3", "--muon-momentum", "0.95")
CALM += ("--loss-weights", "ce", "0.1", "tv", "0.9", "kl_div", "1")
"""Steps that do not enlarge the last bits by which states differ."""
LONGEST = 256
"""More tokens than any conversation of the short run has."""
SHORT = [
    *("--steps", "12", "--conversations", "64", "--answer-tokens", "48", "--serve-prompts", "3"),
    *("--max-anchors", "16", "--sequence-length", "256"),
]


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dspark_jax.train", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one short run."""
    output = tmp_path_factory.mktemp("run")
    done = train("--output", output, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint {output}/draft" in done.stdout
    assert "next       python -m dspark_jax.train" in done.stdout
    return output


def test_the_report_has_the_promised_keys_and_a_true_acceptance_length(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert len(report["validation"]["position_accuracy"]) == 8
    for part in report["served"].values():
        accepted = (part["acceptance_length"] - 1) * part["rounds"]
        assert sum(part["position_survival"]) * part["rounds"] == pytest.approx(accepted)
        # Every round gives its accepted drafts and one more token, which the last one may not need.
        answered = sum(len(p["answer_token_ids"]) for p in part["prompts"])
        spare = sum(p["rounds"] for p in part["prompts"]) + accepted - answered
        assert -1e-6 <= spare <= len(part["prompts"]) + 1e-6
        assert part["tokens_per_second"] > 0 and part["plain_tokens_per_second"] > 0
        assert part["speedup"] == pytest.approx(
            part["tokens_per_second"] / part["plain_tokens_per_second"]
        )
        assert all(p["prompt_token_ids"] and p["answer_token_ids"] for p in part["prompts"])
        lengths = part["by_verify_length"]
        assert list(lengths) == ["2", "4", "8"]
        assert lengths["8"]["acceptance_length"] == part["acceptance_length"]
        assert all(1 <= lengths[n]["acceptance_length"] <= 1 + int(n) for n in lengths)


def test_greedy_answers_are_those_of_plain_decoding(finished: Path) -> None:
    greedy = json.loads((finished / "report.json").read_text())["served"]["greedy"]
    assert greedy["identical_to_plain"] is True
    assert all(d["near_tie"] for d in greedy["one_token_program_divergences"])
    for length in ("2", "4"):
        parted = greedy["by_verify_length"][length]["whole_block_divergences"]
        assert all(d["near_tie"] for d in parted)


def test_a_run_says_how_well_its_draft_is_calibrated(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    found, served = report["calibration"], report["served"].values()
    assert json.loads((finished / "draft/calibration.json").read_text()) == found
    assert found["rounds"] == sum(part["rounds"] for part in served)
    before, after = (np.mean(found["survival_error"][name]) for name in ("before", "after"))
    assert len(found["temperatures"]) == 8 and after <= before
    assert "| error before |" in (finished / "report.md").read_text()


def test_everything_a_run_promises_is_in_its_folder(finished: Path) -> None:
    for name in ("report.md", "loss.png", "acceptance.png", "confidence.png", "config.json"):
        assert (finished / name).stat().st_size > 100, name
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 10, 12]
    assert records[-1]["validation"]["mean_accepted_length"] >= 1
    assert (finished / "draft/model.safetensors").exists()
    assert (finished / "checkpoints/12").is_dir()


def test_the_regenerated_data_is_data_a_user_could_pass(finished: Path, tmp_path: Path) -> None:
    done = train(
        *("--data", finished / "data/train.jsonl", "--output", tmp_path / "again", *SHORT),
        *("--warm-start", finished / "draft", "--markov-head-type", "vanilla"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drawn afresh: nothing" in done.stdout


@pytest.mark.slow
def test_hidden_states_from_files_train_the_same_draft_as_in_process(
    finished: Path, tmp_path: Path
) -> None:
    import jax

    from dspark_jax.checkpoints.folder import embedded
    from dspark_jax.target_folder import load_target
    from dspark_jax.targets.families import make_target
    from dspark_jax.train.conversations import read_conversations, tokenise_all
    from dspark_jax.train.presets import PRESETS

    data = finished / "data/held_out.jsonl"
    ids = PRESETS["tiny"].draft.aux_layer_ids
    loaded = load_target(embedded("tiny-glm"), ids)
    forward = jax.jit(make_target(loaded.config).forward)
    rows = tokenise_all(loaded.tokenizer, read_conversations(data), data)
    (tmp_path / "states").mkdir()
    for i, row in enumerate(rows):
        count = len(row.tokens)
        tokens = np.pad(row.tokens, (0, LONGEST - count))[None]
        position = np.arange(LONGEST)[None]
        states = forward(loaded.params, tokens, (position < count).astype(np.int32), position)
        aux = np.asarray(states.aux_hidden)[0, :count].reshape(count, len(ids), -1)
        last = np.asarray(states.final_hidden)[0, :count, None]
        hidden = np.concatenate([aux, last], axis=1)
        save_file(
            {"token_ids": row.tokens, "hidden_states": hidden},
            tmp_path / "states" / f"hs_{i}.safetensors",
        )
    other = train(
        *("--data", data, "--output", tmp_path / "other", *SHORT),
        *("--hidden-states", tmp_path / "states", "--aux-layer-ids", "0", "1", "4"),
    )
    assert other.returncode == 2 and "differ from the target's" in other.stderr
    losses, validations = [], []
    for extra in ((), ("--hidden-states", tmp_path / "states")):
        output = tmp_path / f"run{len(extra)}"
        done = train("--data", data, "--output", output, *SHORT, *CALM, *extra)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
        validations.append(json.loads((output / "report.json").read_text())["validation"])
    np.testing.assert_allclose(*([x for x in run if x] for run in losses), rtol=1e-3)
    for name, value in validations[0].items():
        np.testing.assert_allclose(validations[1][name], value, rtol=1e-2, err_msg=name)
