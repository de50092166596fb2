"""Several processes serve as one: process 0 decides and tells, the others run the same programs.

Nothing that the host decides differs between processes, so their devices meet in every collective.
A message is a head and the arrays of the call, which have the shapes that the programs were
compiled for: a few kB a round, and where logits are edited some bytes for every token known.
"""

import os
import signal
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from dspark_jax.paged_upkeep import Behind
from dspark_jax.paged_words import Told
from dspark_jax.serve.lines import Line, Lines
from dspark_jax.serve.programs import Shape, Steps
from dspark_jax.truncation import Edits

HEAD = struct.Struct("<B4iQ")
"""Which call, its numbers, and how many bytes of arrays follow."""
ROUND, PREFILL, CATCH_UP, CLEAN, RESET, STOP = range(6)


def message(call: int, numbers: Iterable[int] = (), arrays: Any = ()) -> bytes:
    """A call as it is sent."""
    body = b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(arrays))
    return HEAD.pack(call, *(*numbers, 0, 0, 0, 0)[:4], len(body)) + body


class Leading:
    """`Programs` in process 0: every call is told to the others, then runs here as there.

    Waits until the others are ready.
    """

    def __init__(self, programs: Steps, lines: Lines):
        self.sizes, self.shapes = programs.sizes, programs.shapes
        self.told, self.edits, self.behind = programs.told, programs.edits, programs.behind
        self.program, self.chooses = programs.program, programs.chooses
        self.columns = programs.columns
        self._programs, self._lines = programs, lines
        lines.wait()

    def round(self, shape: Shape, told: Told, edits: Edits | None) -> Any:
        self._send(message(ROUND, shape, (told, edits)))
        return self._programs.round(shape, told, edits)

    def prefill(self, tokens: np.ndarray, start: int, pages: tuple[int, ...]) -> int:
        tokens = tokens[: self.sizes.chunks[-1]]
        arrays = (np.asarray(tokens, np.int32), np.asarray(pages, np.int32))
        self._send(message(PREFILL, (start, len(tokens)), arrays))
        return self._programs.prefill(tokens, start, pages)

    def catch_up(self, behind: Behind) -> None:
        self._send(message(CATCH_UP, (len(behind.slot),), behind))
        self._programs.catch_up(behind)

    def clean(self, pages: tuple[int, ...]) -> None:
        self._send(message(CLEAN, (), np.asarray(pages, np.int32)))
        self._programs.clean(pages)

    def reset(self) -> None:
        self._send(message(RESET))
        self._programs.reset()

    def stop(self) -> None:
        """The last call: the others end, and are not missed."""
        self._lines.close()
        self._send(message(STOP))

    def _send(self, message: bytes) -> None:
        self._lines.send(message)


def follow(programs: Steps, receive: Callable[[int], bytes]) -> None:
    """Make process 0's calls until it says stop; `receive(n)` waits for n bytes."""
    while True:
        call, *numbers, size = HEAD.unpack(receive(HEAD.size))
        body = receive(size)
        if call == STOP:
            return
        if call == ROUND:
            _round(programs, Shape(*numbers[:3], bool(numbers[3])), body)
        elif call == PREFILL:
            start, count, *_ = numbers
            given = np.frombuffer(body, np.int32)
            programs.prefill(given[:count], start, tuple(given[count:].tolist()))
        elif call == CATCH_UP:
            empty = programs.behind(numbers[0])
            programs.catch_up(jax.tree.map(partial(_take, memoryview(body), [0]), empty))
        elif call == CLEAN:
            programs.clean(tuple(np.frombuffer(body, np.int32).tolist()))
        else:
            assert call == RESET, call
            programs.reset()


def _round(programs: Steps, shape: Shape, body: bytes) -> None:
    """The arrays lie one after another, in the order of the empty ones."""
    edits = programs.edits(shape.group) if shape.edited else None
    told = programs.told(shape.group, shape.pages)
    if programs.chooses(shape):
        told = told._replace(seconds=np.ones(1 + shape.budget, np.float32))
    told, edits = jax.tree.map(partial(_take, memoryview(body), [0]), (told, edits))
    programs.round(shape, told, edits)


def _take(body: memoryview, place: list[int], like: np.ndarray) -> np.ndarray:
    found = np.frombuffer(body, like.dtype, like.size, place[0]).reshape(like.shape)
    place[0] += like.nbytes
    return found.copy()  # aligned, whatever lies before it


def followed(programs: Steps, line: Line) -> int:
    """Follow until process 0 says stop, whatever signals come: they are its to judge. Exit code.

    Where process 0 is lost jax ends this process too, a moment later and with a trace of C++.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    line.ready()
    try:
        follow(programs, line.receive)
        return 0
    except EOFError as error:
        os.write(2, f"error: {error}.\n".encode())
        os._exit(1)
