"""Ctrl-C and SIGTERM: a loop that watches ends after its step, anything else ends at once.

Where nobody watches the process ends inside the handler: an exception raised there may land in a
callback that drops it, and an interpreter that closes while XLA computes may crash.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SHOW_CURSOR = "\x1b[?25h"
"""Progress bars hide it."""


class Stopped(KeyboardInterrupt):
    """A wish to stop that a loop has granted."""


class Stop:
    """`wanted` once a signal has come; `where` and `command` say where the run is and goes on.

    `speaks` is False in all processes of a run but the first, which tells of a stop for all. Ends
    the process with exit code 0 where nobody watches, and with 130 at the second signal where one
    does.
    """

    def __init__(self) -> None:
        self.wanted = self.watched = False
        self.speaks = True
        self.where, self.command = "before anything was made", ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.watched:
            say(1, self.line())
            os._exit(0)
        if self.wanted:
            say(2, self.line())
            os._exit(130)
        self.wanted = True
        say(1, "stopping after this step; saving")

    def line(self) -> str:
        """What is kept, and what to type."""
        return f"stopped {self.where}; to go on: {self.command}"


def say(file: int, line: str) -> None:
    """Write a line as a signal handler may: past Python's buffers."""
    shown = SHOW_CURSOR if os.isatty(file) else ""
    os.write(file, f"{shown}\n{line}\n".encode())


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
