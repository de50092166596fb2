"""A progress bar in the units people care about; plain lines where there is no terminal."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY_SECONDS = 10.0


class Bar:
    """One bar: `show(done, total, values)` with the values named at its making.

    `amount` writes what is done and the total.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        names: tuple[str, ...],
        amount: Callable[[int], str] = str,
    ):
        self.console, self.title, self.names, self.amount = console, title, names, amount
        self.started, self.printed = time.monotonic(), float("-inf")
        self.first: tuple[float, int] | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[place]}", style="progress.download"),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(title, place="", values="")

    def __enter__(self) -> "Bar":
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, trace)

    def seconds(self) -> float:
        """Time since the bar was made."""
        return time.monotonic() - self.started

    def show(self, done: int, total: int, values: Mapping[str, float | int]) -> None:
        """Move the bar; `values` may hold more than is shown."""
        text = "  ".join(f"{name} {values[name]:,.4g}" for name in self.names if name in values)
        place = f"{self.amount(done)}/{self.amount(total)}"
        self.progress.update(self.task, completed=done, total=total, place=place, values=text)
        late = time.monotonic() - self.printed > PLAIN_EVERY_SECONDS
        if not self.console.is_terminal and (late or done >= total):
            self.printed = time.monotonic()
            self.console.print(f"{self.title} {place}  {text}  {self.left(done, total)}")

    def left(self, done: int, total: int) -> str:
        """The time left by the pace since the first call, which had to compile."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        seconds, made = now - self.first[0], done - self.first[1]
        return f"{seconds * (total - done) / made:.0f} s left" if made > 0 else ""
