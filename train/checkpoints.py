"""Orbax checkpoints of a run: written in the background, whole or not at all, read back checked.

A checkpoint is a folder `checkpoints/STEP` with the training state and a JSON object beside it (the
position in the data, what the data and target were, the validation score). Orbax writes it under a
temporary name and renames it; what a killed run leaves is never taken for a checkpoint. Of several
processes each writes and reads what its devices hold, and process 0 says what lies in the folder.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dspark_jax.checkpoints.checksums import checksums
from dspark_jax.hosts import from_first, said_by_all

Say = Callable[[str], None]
UNFINISHED = ".orbax-checkpoint-tmp"
BROKEN = ".broken"
DELETED = ".deleted"
FAULTS = (OSError, MemoryError, jax.errors.JaxRuntimeError)
"""What says nothing about the checkpoint that was being read."""


class Restored(NamedTuple):
    """A checkpoint read back: its step, state, and the JSON object beside it."""

    step: int
    state: Any
    about: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint whose files are not what was written."""


class Checkpoints:
    """The checkpoints of one run. Of the finished ones the `keep` latest stay, and the best."""

    def __init__(self, folder: Path, keep: int, say: Say):
        self.folder, self.keep, self.say = folder.resolve(), keep, say
        from_first(self._tidy)
        self.manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
        )
        self.scores = {step: self._score(step) for step in self.steps()}

    def _tidy(self) -> None:
        """Delete what a killed run left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob(f"*{UNFINISHED}*")):
            step = path.name.split(".")[0]
            self.say(f"checkpoint {step} is incomplete (the run ended while writing it); skipped")
            shutil.rmtree(path)
        for path in self.folder.glob(f"*{DELETED}"):
            shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return from_first(
            lambda: sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
        )

    def best(self) -> int | None:
        """The step with the highest validation score; None when none was validated."""
        scored = {step: score for step, score in self.scores.items() if score is not None}
        return max(scored, key=lambda step: (scored[step], step)) if scored else None

    def save(self, step: int, state: Any, about: dict[str, Any], score: float | None) -> None:
        """Begin to write a checkpoint, once the one before it is finished and kept ones are chosen.

        Raises ValueError when either cannot be written; finished ones stay.
        """
        self.finish()
        about = about | {"score": score, "checksums": checksums(state), "shapes": shapes(state)}
        about = about | {"seal": seal(about)}
        given = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about)}
        args = ocp.args.Composite(**given)
        self._guarded(step, lambda: self.manager.save(step, args=args, force=True))
        self.scores[step] = score

    def finish(self) -> None:
        """Wait for the checkpoint being written, then delete those that need not stay."""
        writing = max(self.scores, default=0)
        self._guarded(writing, self.manager.wait_until_finished)
        steps = self.steps()
        stay = {*steps[-self.keep :], self.best()}
        for step in set(steps) - stay:
            self._remove(step)

    def restore_latest(
        self, like: Any, check: Callable[[dict[str, Any]], None] = lambda about: None
    ) -> Restored | None:
        """The newest checkpoint that can be read, in the shapes and shardings of `like`.

        `check(about)` raises when a checkpoint belongs to another run; nothing is set aside then.
        Damaged ones newer than the one found are set aside, with a line that says so. Raises
        ValueError when there are checkpoints and all are damaged, OSError when the disk fails.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self.restore(step, like, check)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            for other, reason in damaged.items():
                self._set_aside(other, reason)
            return found
        if damaged:
            told = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {self.folder} can be read ({told}); put back a copy, or start "
                "over with --fresh."
            )
        return None

    def restore_best(self, like: Any, last: int) -> Restored | None:
        """The checkpoint with the best score; None when that is `last`, the state at hand."""
        while (best := self.best()) not in (None, last):
            assert best is not None
            try:
                return self.restore(best, like)
            except DamagedError as error:
                self._set_aside(best, str(error))
        return None

    def restore(
        self, step: int, like: Any, check: Callable[[dict[str, Any]], None] = lambda about: None
    ) -> Restored:
        """One checkpoint; raises DamagedError, ValueError when it is another run's, or OSError."""
        about = self._about(step)
        check(about)
        if about["shapes"] != shapes(like):
            raise ValueError(
                f"checkpoint {step} in {self.folder} holds a state of other shapes than this run's "
                "(the target or the package changed); give another --output, or start over with "
                "--fresh."
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state, reason = None, ""
        try:
            state = self.manager.restore(step, args=args).state
        except Exception as error:  # whatever reads a damaged file raises what it likes
            if isinstance(error, FAULTS) and not isinstance(error, FileNotFoundError):
                raise
            reason = _first_line(error)
        reasons = [said for said in said_by_all(reason) if said]
        if reasons:
            raise DamagedError(reasons[0])
        if checksums(state) != about["checksums"]:
            raise DamagedError("its numbers are not those that were saved")
        return Restored(step, state, about)

    def _about(self, step: int) -> dict[str, Any]:
        about, reason = from_first(lambda: self._read_about(step))
        if about is None:
            raise DamagedError(reason)
        return about

    def _read_about(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """What was saved beside a state, or why it is not that."""
        path = self.folder / str(step) / "about" / "metadata"
        try:
            about = json.loads(path.read_text())
            whole = about.pop("seal") == seal(about)
        except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
            return None, _first_line(error)
        return (about, "") if whole else (None, "what is written beside it is not what was saved")

    def _set_aside(self, step: int, reason: str) -> None:
        self.say(f"checkpoint {step} cannot be read and is skipped: {reason}")

        def move() -> None:
            aside = self.folder / f"{step}{BROKEN}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

        from_first(move)
        self.scores.pop(step, None)
        self.manager.reload()

    def close(self) -> None:
        """Finish and let go of the background threads."""
        self.finish()
        self.manager.close()

    def _remove(self, step: int) -> None:
        """Rename, then delete: what a kill leaves half deleted is no checkpoint any more."""

        def delete() -> None:
            gone = self.folder / f"{step}{DELETED}"
            (self.folder / str(step)).rename(gone)
            shutil.rmtree(gone)

        from_first(delete)
        self.scores.pop(step, None)
        self.manager.reload()

    def _score(self, step: int) -> float | None:
        try:
            return self._about(step)["score"]
        except (DamagedError, OSError):
            return None  # restore_latest says what is wrong with it

    def _guarded(self, step: int, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore raise many types for a full disk
            self.scores.pop(step, None)
            last = sorted(self.scores)[-1:] or ["none"]
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"checkpoint {step} could not be written to {self.folder}: {reason}; the last good "
                f"one is {last[0]}. Once that is mended, the same command (without --fresh) goes "
                "on from it."
            ) from error


def seal(about: dict[str, Any]) -> str:
    """A digest of what is written beside a state."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def shapes(state: Any) -> str:
    """A digest of a state's structure, shapes and types."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    told = [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
