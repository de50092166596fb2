"""The folder of a run: one run at a time, and no run over another's results."""

import dataclasses
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from dspark_jax.hosts import from_first, together
from dspark_jax.train.config_file import differences, write_config
from dspark_jax.train.settings import Command, TrainSettings

RESULTS = ("checkpoints", "draft", "metrics.jsonl", "tensorboard", "wandb", "wandb_run")
REPORTS = ("report.json", "report.md", "loss.png", "acceptance.png", "confidence.png")
ANSWERS = ("recipe.json", "train.jsonl", "held_out.jsonl")
MAY_DIFFER = ("data", "target", "hidden_states", "mesh")
"""Settings that may change when a run goes on: of the files it is what they hold that is compared,
when they are read; devices change neither loss nor gradient."""

SEEN_SECONDS = 30.0
"""How long a network's file system may take to show what another host wrote."""


@contextmanager
def claimed(given: Command) -> Iterator[TrainSettings]:
    """Take the output folder for this run, and hold it while inside; yields the settings.

    Raises ValueError when it cannot be made, when another process holds it, and when it holds a
    run of other settings, or any with `--no-resume`. Nothing in it is changed before `begin`. Of
    several processes the first holds it, and all must see it.
    """
    output = given.settings.output
    with ExitStack() as held:
        mark = from_first(lambda: lock(output, held))
        together(lambda: check_seen(output, mark))
        from_first(lambda: check_same_run(given))
        yield given.settings


def lock(output: Path, held: ExitStack) -> str:
    """Make the folder and keep other runs out until `held` closes; the mark left in its lock."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((output / ".lock").open("a+"))
    except OSError as error:
        raise ValueError(f"output {output} cannot be made: {error}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"another process is training in {output}; wait for it or give another --output."
        ) from None
    if jax.process_count() == 1:
        file.seek(0)
        return file.read()  # nobody else looks: a refused run leaves the folder as it was
    mark = secrets.token_hex(8)
    file.truncate(0)
    file.write(mark)
    file.flush()
    return mark


def check_seen(output: Path, mark: str) -> None:
    """Raise ValueError unless this process sees the folder that the first one has locked."""
    end = time.monotonic() + SEEN_SECONDS
    while True:
        with suppress(OSError):
            if (output / ".lock").read_text() == mark:
                return
        if time.monotonic() > end:
            raise ValueError(
                f"output {output} is not the folder that process 0 writes to; give one on a file "
                "system that all hosts share."
            )
        time.sleep(0.1)


@contextmanager
def untouched(given: Command) -> Iterator[TrainSettings]:
    """For `--inspect-data`: settings whose output folder is no run's; it takes the answers.

    That is the given one while no run is in it, else a temporary one that begins with its answers.
    """
    settings = given.settings
    if settings.data is not None:
        yield settings
    elif not holds_run(settings.output):
        with claimed(given):
            yield settings
    else:
        with TemporaryDirectory() as folder:
            answers = Path(folder, "data")
            answers.mkdir()
            for name in ANSWERS:
                with suppress(FileNotFoundError):
                    shutil.copy(settings.output / "data" / name, answers)
            yield dataclasses.replace(settings, output=Path(folder))


def begin(given: Command) -> None:
    """Write config.json of a new run; with `--fresh`, first delete the results that are there.

    Regenerated answers stay, they are used again where they fit. A run that goes on keeps its
    config.json until its checkpoint is found to fit.
    """
    output = given.settings.output
    if given.fresh:
        for name in (*RESULTS, *REPORTS):
            remove(output / name)
    if not holds_run(output):
        write_config(given.settings, output / "config.json")


def holds_run(output: Path) -> bool:
    """Whether a run has begun in a folder."""
    found = any((output / name).exists() for name in RESULTS)
    return found and (output / "config.json").exists()


def check_same_run(given: Command) -> None:
    """Raise ValueError unless a run in the output folder can go on with these settings."""
    output = given.settings.output
    if given.fresh or not holds_run(output):
        return
    if not given.resume:
        raise ValueError(
            f"{output} holds a run and --no-resume is given; leave that out to go on with "
            "it, give another --output, or --fresh to start over."
        )
    lines = differences(given.settings, output / "config.json")
    found = [line for line in lines if line.split(" ")[0].split(".")[0] not in MAY_DIFFER]
    if found:
        raise ValueError(
            f"{output} holds a run of other settings: {'; '.join(found)}. Give the same "
            "settings to go on, another --output, or --fresh to start over."
        )


def remove(path: Path) -> None:
    """Rename, then delete, so that a kill leaves no half of it under its name; links are cut."""
    gone = path.with_name(path.name + ".deleted")
    delete(gone)
    with suppress(FileNotFoundError):
        os.replace(path, gone)
    delete(gone)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
