"""Checkpoints survive kills, full disks and damaged files; what cannot be read is not used."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.train.checkpoints import Checkpoints


class State(NamedTuple):
    params: dict[str, jax.Array]
    step: jax.Array


def state(step: int) -> State:
    key = jax.random.key(step)
    return State({"a": jax.random.normal(key, (60, 70)), "b": jnp.arange(5.0)}, jnp.int32(step))


def filled(folder: Path, scores: list[float | None], keep: int = 2) -> list[str]:
    """A folder with a checkpoint per score, at steps 1, 2, …; what was said while writing."""
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep, said.append)
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, state(step), {"position": step}, score)
    checkpoints.close()
    return said


def reopened(folder: Path) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    return Checkpoints(folder, 2, said.append), said


def assert_is(found: Any, step: int) -> None:
    assert (found.step, found.about["position"]) == (step, step)
    jax.tree.map(np.testing.assert_array_equal, found.state, state(step))


def test_the_latest_and_the_best_are_kept(tmp_path: Path):
    filled(tmp_path, [1.0, 3.0, 2.0, None, 1.5, 2.5])
    checkpoints, said = reopened(tmp_path)
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2 and not said
    assert_is(checkpoints.restore_latest(state(0)), 6)
    assert_is(checkpoints.restore(2, state(0)), 2)


def test_a_saved_state_goes_on_to_be_changed_while_it_is_written(tmp_path: Path):
    grow = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints, _ = reopened(tmp_path)
    moving = {"x": jnp.zeros((500, 500))}
    checkpoints.save(1, moving, {}, None)
    for _ in range(50):
        moving = grow(moving)
    checkpoints.finish()
    found = checkpoints.restore_latest(moving)
    assert found is not None and not np.asarray(found.state["x"]).any()


def damages(folder: Path) -> list[tuple[Path, str]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    return [(path, how) for path in files for how in ("half", "empty", "flipped")]


def damage(path: Path, how: str) -> None:
    data, middle = bytearray(path.read_bytes()), path.stat().st_size // 2
    if how == "flipped":
        data[middle] ^= 0xFF
        path.write_bytes(data)
    else:
        path.write_bytes(data[: middle if how == "half" else 0])


def test_whatever_file_is_damaged_the_newest_whole_checkpoint_is_found(tmp_path: Path):
    filled(tmp_path / "good", [1.0, 2.0])
    skipped = 0
    for path, how in damages(tmp_path / "good/2"):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        damage(tmp_path / "bad" / path.relative_to(tmp_path / "good"), how)
        checkpoints, said = reopened(tmp_path / "bad")
        found = checkpoints.restore_latest(state(0))
        assert found is not None
        assert_is(found, 2 if not said else 1)
        if said:
            skipped += 1
            assert said[0].startswith("checkpoint 2 cannot be read and is skipped: ")
            assert checkpoints.steps() == [1] and (tmp_path / "bad/2.broken").is_dir()
            checkpoints.save(2, state(2), {"position": 2}, 2.0)  # its place is free again
            checkpoints.close()
            assert_is(reopened(tmp_path / "bad")[0].restore_latest(state(0)), 2)
        shutil.rmtree(tmp_path / "bad")
    assert skipped >= 8


def halve(folder: Path) -> None:
    for path, how in damages(folder):
        if how == "half":
            damage(path, how)


def test_when_all_are_damaged_nothing_is_renamed_and_nothing_starts_over(tmp_path: Path):
    filled(tmp_path, [1.0, 2.0])
    for step in (1, 2):
        halve(tmp_path / str(step) / "state")
    checkpoints, said = reopened(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint in .* can be read .2: .*; 1: ") as raised:
        checkpoints.restore_latest(state(0))
    assert "start over with --fresh" in str(raised.value)
    assert checkpoints.steps() == [1, 2] and not said


def test_a_damaged_best_checkpoint_gives_way_to_the_next(tmp_path: Path):
    filled(tmp_path, [2.0, 3.0, 1.0, 0.5], keep=4)
    halve(tmp_path / "2" / "state")
    checkpoints, said = reopened(tmp_path)
    found = checkpoints.restore_best(state(0), 4)
    assert_is(found, 1)
    assert said[0].startswith("checkpoint 2 cannot be read and is skipped: ")


def test_what_belongs_to_another_run_is_refused_and_stays(tmp_path: Path):
    filled(tmp_path, [1.0, 2.0])
    checkpoints, said = reopened(tmp_path)
    wider = State({"a": jnp.zeros((60, 71)), "b": jnp.arange(5.0)}, jnp.int32(0))
    with pytest.raises(ValueError, match="checkpoint 2 .* state of other shapes"):
        checkpoints.restore_latest(wider)

    def other(about: dict[str, Any]) -> None:
        raise ValueError(f"another run was at {about['position']}")

    with pytest.raises(ValueError, match="another run was at 2"):
        checkpoints.restore_latest(state(0), other)
    assert checkpoints.steps() == [1, 2] and not said


def test_an_incomplete_checkpoint_is_skipped_with_a_line_that_says_so(tmp_path: Path):
    filled(tmp_path, [1.0])
    (tmp_path / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "5.deleted").mkdir()
    checkpoints, said = reopened(tmp_path)
    assert said == ["checkpoint 7 is incomplete (the run ended while writing it); skipped"]
    assert_is(checkpoints.restore_latest(state(0)), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


FULL_DISK = """
import resource, signal, sys, jax.numpy as jnp
from pathlib import Path
from dspark_jax.train.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), 2, print)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.save(2, {"x": jnp.arange(9000.0)}, {"position": 2}, 2.0)
    checkpoints.finish()
except ValueError as error:
    print(error)
"""


def test_a_full_disk_says_so_and_leaves_the_last_good_checkpoint(tmp_path: Path):
    """A process of its own fails: what it still writes after its error is over when it ends."""
    filled(tmp_path, [1.0])
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    message = done.stdout.splitlines()
    assert len(message) == 1, done.stdout
    assert message[0].startswith(f"checkpoint 2 could not be written to {tmp_path}")
    assert "the last good one is 1" in message[0]
    checkpoints, _ = reopened(tmp_path)
    assert_is(checkpoints.restore_latest(state(0)), 1)


WRITER = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from dspark_jax.train.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), 2, print)
like = {"x": jnp.zeros((300, 300)), "step": jnp.int32(0)}
found = checkpoints.restore_latest(like)
state = like if found is None else found.state
assert (state["x"] == state["step"]).all()
print("from", 0 if found is None else found.step, flush=True)
for step in range(1 + int(state["step"]), 10**6):
    state = {"x": state["x"] + 1, "step": state["step"] + 1}
    checkpoints.save(step, state, {}, float(step % 7))
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_goes_on_from_a_whole_checkpoint(tmp_path: Path):
    rng, reached = np.random.default_rng(0), 0
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            while not line.startswith("from"):
                assert "incomplete" in line or "skipped" not in line, line
                line = child.stdout.readline()
            started = int(line.split()[1])
            assert started >= reached
            try:
                child.wait(timeout=rng.uniform(0.3, 2.0))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
        steps = [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]
        reached = max(steps, default=0)
    assert reached > 8
