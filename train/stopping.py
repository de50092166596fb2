"""Ctrl-C and SIGTERM: a loop that watches ends after its step, anything else ends at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A wish to stop that came where no loop watches for it."""


class Stop:
    """`wanted` once a signal has come; `where` and `command` say where the run is and goes on.

    Raises Stopped where nobody watches, and KeyboardInterrupt at the second signal where one does.
    """

    def __init__(self) -> None:
        self.wanted = self.watched = False
        self.where, self.command = "before anything was made", ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.watched:
            self.wanted = True
            raise Stopped
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def line(self) -> str:
        """What is kept, and what to type."""
        return f"stopped {self.where}; to go on: {self.command}"


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch both signals while inside; inside another one, its Stop serves."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    if isinstance(before[0], Stop):
        yield before[0]
        return
    stop = Stop()
    for number in signals:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def stopping() -> Iterator[Stop]:
    """Watch while inside: the first signal only sets `wanted`, which the loop looks at."""
    with stoppable() as stop:
        before, stop.watched = stop.watched, True
        try:
            yield stop
        finally:
            stop.watched = before
