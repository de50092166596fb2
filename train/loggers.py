"""Where a run's numbers go: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]


class Logger(Protocol):
    """One more place for numbers."""

    def log(self, step: int, values: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, output: Path, settings: Mapping[str, Any], name: str, from_step: int):
        from tensorboardX import SummaryWriter

        # Records a stopped run left beyond its last checkpoint are purged by TensorBoard itself.
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=from_step)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run, offline where WANDB_MODE says so; a resumed run goes on in it."""

    def __init__(self, output: Path, settings: Mapping[str, Any], name: str, from_step: int):
        import wandb

        kept = output / "wandb_run"
        known = kept.read_text().strip() if kept.exists() else None
        self.run = wandb.init(
            project="dspark-jax",
            name=name,
            id=known,
            resume="allow",
            dir=str(output),
            config=dict(settings),
        )
        kept.write_text(self.run.id + "\n")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


KINDS = {"tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WandB, "wandb")}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError when a logger cannot work, before anything expensive."""
    from importlib.util import find_spec

    for name in names:
        package = KINDS[name][1]
        if find_spec(package) is None:
            raise ValueError(
                f"--loggers {name} needs the package {package}, which is not installed; "
                f"pip install -e '.[{name}]'."
            )
    if "wandb" in names:
        check_wandb()


def check_wandb() -> None:
    """Raise ValueError when Weights & Biases would ask for a key, or one has the wrong form.

    Whether the server takes the key is not asked; without a network a key counts as one.
    """
    import wandb

    advice = "run `wandb login`, or set WANDB_MODE=offline to keep the numbers on this machine"
    try:
        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        known = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:  # a key, or an environment variable, of no use
        said = " ".join(str(error).split())
        raise ValueError(f"--loggers wandb cannot be used: {said} To mend it, {advice}.") from error
    if not known:
        raise ValueError(f"--loggers wandb finds no API key; {advice}.")


class MetricsLog:
    """metrics.jsonl, and the loggers asked for. A record is flat, its step among its values."""

    def __init__(
        self, output: Path, names: Sequence[str], settings: Mapping[str, Any], from_step: int
    ):
        self.path = output / "metrics.jsonl"
        kept = [r for r in read_records(self.path) if r["step"] <= from_step]
        partial = self.path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.path)
        self.file = self.path.open("a")
        made = (KINDS[name][0] for name in names)
        self.loggers: list[Logger] = [
            make(output, settings, output.name, from_step + 1) for make in made
        ]

    def write(self, record: Record) -> None:
        """One record of training."""
        print(json.dumps(record), file=self.file, flush=True)
        self._send(record["step"], "train", record)

    def write_validation(self, step: int, table: Mapping[str, Any]) -> None:
        """The table of a checkpoint."""
        print(json.dumps({"step": step, "validation": table}), file=self.file, flush=True)
        self._send(step, "validation", table)

    def _send(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, float)}
        for logger in self.loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        self.file.close()
        for logger in self.loggers:
            logger.close()


class NoLog:
    """For all processes of a run but the first, which writes for them."""

    def write(self, record: Record) -> None: ...

    def write_validation(self, step: int, table: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def read_records(path: Path) -> list[Record]:
    """The whole lines of a metrics.jsonl; a run that was killed may have left half a one."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
