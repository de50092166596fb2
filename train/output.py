"""The folder of a run: one run at a time, and no run over another's results."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_jax.train.config_file import differences, write_config
from dspark_jax.train.settings import Command

RESULTS = ("checkpoints", "draft", "metrics.jsonl", "tensorboard", "wandb", "wandb_run")
REPORTS = ("report.json", "report.md", "loss.png", "acceptance.png", "confidence.png")


@contextmanager
def claimed(given: Command) -> Iterator[None]:
    """Take the output folder for this run, and hold it while inside.

    Raises ValueError when it cannot be made, when another process holds it, and when it holds a
    run of other settings, or any with `--no-resume`; `--fresh` removes that run's results instead.
    Regenerated answers stay, they are used again where they fit.
    """
    settings, output = given.settings, given.settings.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a+")
    except OSError as error:
        raise ValueError(f"output {output} cannot be made: {error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is training in {output}; wait for it or give another --output."
            ) from None
        config = output / "config.json"
        if given.fresh:
            for name in (*RESULTS, *REPORTS):
                remove(output / name)
        elif config.exists() and any((output / name).exists() for name in RESULTS):
            if not given.resume:
                raise ValueError(
                    f"{output} holds a run and --no-resume is given; leave that out to go on with "
                    "it, give another --output, or --fresh to start over."
                )
            found = differences(settings, config)
            if found:
                raise ValueError(
                    f"{output} holds a run of other settings: {'; '.join(found)}. Give the same "
                    "settings to go on, another --output, or --fresh to start over."
                )
        write_config(settings, config)
        yield


def remove(path: Path) -> None:
    """Delete a file or a folder that may not be there."""
    if path.is_dir():
        gone = path.with_name(path.name + ".deleted")
        os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)
