"""Hidden states from files: broken ones are skipped and counted, too many end the run."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.target_folder import read_json
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.train.conversations import Row
from dspark_jax.train.hidden_states import Files, StoredStates, check_header
from dspark_jax.train.packing import pack

A, D, ROWS = 2, 4, 10
SHAPE = read_json(embedded("tiny-glm") / "config.json", "target")


def rows() -> list[Row]:
    return [Row(np.arange(i, i + 6, dtype=np.int32), np.arange(6) > 1) for i in range(ROWS)]


def written(folder: Path, broken: dict[int, str]) -> Files:
    for i, row in enumerate(rows()):
        how = broken.get(i)
        states = np.full((6, A + 1, D), i + 1, np.float32)
        if how == "NaN":
            states[3, 1, 2] = np.nan
        elif how == "shape":
            states = states[:, :A]
        path = folder / f"hs_{i}.safetensors"
        save_file({"token_ids": row.tokens, "hidden_states": states}, path)
        if how == "cut":
            path.write_bytes(path.read_bytes()[:40])
        elif how == "missing":
            path.unlink()
    return Files(folder, A, D)


def stored(folder: Path, broken: dict[int, str], share: float) -> tuple[StoredStates, list[str]]:
    said: list[str] = []
    return StoredStates(written(folder, broken), rows(), share, said.append), said


def test_states_stand_where_their_tokens_do(tmp_path: Path):
    states, _ = stored(tmp_path, {}, 0.0)
    packed, fetched = states.fetch(next(iter(pack(rows(), 32, 2, 0))))
    here = packed.document >= 0
    assert (fetched.final_hidden[here] == packed.document[here][:, None] + 1).all()
    assert not np.asarray(fetched.final_hidden)[~here].any()
    assert fetched.aux_hidden.shape == (2, 32, A * D)


@pytest.mark.parametrize("how", ["NaN", "shape", "cut", "missing"])
def test_a_broken_file_is_not_trained_on_and_counted(how: str, tmp_path: Path):
    states, said = stored(tmp_path, {4: how}, 0.1)
    for number, row in enumerate(rows()):  # as `check` does at the start of a run
        try:
            check_header(states.files, number, row)
        except ValueError as error:
            states.skip(number, error)
    trained = set()
    for before in pack(rows(), 32, 2, None):
        packed, fetched = states.fetch(before)
        trained |= set(packed.document[np.asarray(packed.batch.loss_mask)].tolist())
        assert np.isfinite(fetched.aux_hidden).all()
    assert trained == set(range(ROWS)) - {4}
    assert len(said) == 1 and f"{tmp_path}/hs_4" in said[0] and "(1 of 10 so far)" in said[0]


def test_too_many_broken_files_end_the_run(tmp_path: Path):
    states, _ = stored(tmp_path, {1: "NaN", 2: "NaN"}, 0.1)
    with pytest.raises(ValueError, match="2 of 10 files are broken, more than bad_states 10%"):
        for packed in pack(rows(), 32, 2, None):
            states.fetch(packed)


def test_no_usable_file_at_all_is_said_even_when_all_may_be_broken(tmp_path: Path):
    states, said = stored(tmp_path, dict.fromkeys(range(ROWS), "missing"), 1.0)
    target = make_target(read_config(SHAPE, aux_layer_ids=(1, 2)))
    with pytest.raises(ValueError, match=f"none of 10 hidden-state files in {tmp_path} can be"):
        states.check(target, None)
    assert len(said) == ROWS
