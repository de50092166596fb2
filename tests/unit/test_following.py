"""What process 0 calls is what the others run, call by call and number by number."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.serve.following import STOP, Leading, follow, message
from dspark_jax.serve.layout import serving_mesh
from dspark_jax.serve.lines import TOKEN_BYTES, Line, Lines, accept
from dspark_jax.serve.programs import Programs, Shape, Sizes
from dspark_jax.serve.settings import ServeSettings, Speculation, check

SIZES = Sizes(slots=4, page=8, pages=33, longest=8, verified=4, vocabulary=40, chunks=(4, 16))


class Recorder:
    """Programs that only remember what they were asked for."""

    told, columns = Programs.told, Programs.columns
    edits, shapes = Programs.edits, Programs.shapes
    behind, program, chooses = Programs.behind, Programs.program, Programs.chooses

    def __init__(self, stopping: bool = False) -> None:
        self.sizes, self.calls, self.stopping = SIZES, list[Any](), stopping
        self._models = (None, SimpleNamespace(draft_length=SIZES.verified))

    def round(self, *given: Any) -> None:
        self.calls.append(("round", jax.tree.map(np.array, given)))

    def prefill(self, tokens: Any, *given: Any) -> int:
        self.calls.append(("prefill", (np.array(tokens), *given)))
        return len(tokens)

    def catch_up(self, behind: Any) -> None:
        self.calls.append(("catch up", jax.tree.map(np.array, behind)))

    def clean(self, pages: Any) -> None:
        self.calls.append(("clean", pages))

    def reset(self) -> None:
        self.calls.append(("reset", ()))


def steps(recorder: Recorder) -> Any:
    return recorder


class Recorded(Lines):
    """Lines to nobody."""

    def __init__(self, told: BytesIO):
        super().__init__({})
        self.told = told

    def send(self, message: bytes) -> None:
        self.told.write(message)


def drawn(tree: Any, seed: int) -> Any:
    """Arrays of the same shapes and types, of any bytes that are numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.integers(0, 2, x.shape).astype(x.dtype), tree)


@pytest.mark.parametrize("stopping", [False, True])
def test_followers_make_every_call_with_the_same_arrays(stopping: bool) -> None:
    told, here, there = BytesIO(), Recorder(stopping), Recorder(stopping)
    leading = Leading(steps(here), Recorded(told))
    for seed, shape in enumerate(leading.shapes()):
        given = leading.told(shape.group, shape.pages)
        if leading.chooses(shape):
            given = given._replace(seconds=np.ones(1 + shape.budget, np.float32))
        given = drawn(given, seed)
        edits = drawn(leading.edits(shape.group), seed) if shape.edited else None
        leading.round(shape, given, edits)
    assert leading.prefill(np.arange(100, dtype=np.int32), 24, (3, 1, 2)) == SIZES.chunks[-1]
    leading.prefill(np.array([7], np.int32), 0, (9,))
    for group in SIZES.groups:
        leading.catch_up(drawn(leading.behind(group), group))
    leading.clean((5, 6))
    leading.clean(())
    leading.reset()
    leading.stop()
    told.seek(0)
    follow(steps(there), told.read)
    assert told.read() == b"" and len(there.calls) == len(here.calls) > 10
    assert jax.tree.structure(there.calls) == jax.tree.structure(here.calls)
    for ours, theirs in zip(*map(jax.tree.leaves, (there.calls, here.calls)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype


def test_a_round_without_edits_is_told_in_a_few_kilobytes() -> None:
    programs: Any = Recorder()
    shape = Shape(4, 20, 8, False)
    assert len(message(0, shape, programs.told(4, 8))) < 1000
    assert len(message(STOP)) < 64


def in_thread(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_only_who_knows_the_token_is_connected() -> None:
    token = b"t" * TOKEN_BYTES
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        address = listening.getsockname()
        found: dict[int, socket.socket] = {}
        waiting = in_thread(lambda: found.update(accept(listening, token, 2)))
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: nobody in particular\r\n\r\n")
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        others = [socket.create_connection(address) for _ in range(2)]
        for number, other in zip((2, 1), others, strict=True):
            other.sendall(token + number.to_bytes(4, "little"))
        waiting.join(20)
    assert sorted(found) == [1, 2]
    lines, ends = Lines(found), [Line(other) for other in others]
    for end in ends:
        end.ready()
    lines.wait()
    lines.send(b"said to all")
    assert [end.receive(11) for end in ends] == [b"said to all"] * 2
    lines.close()
    for line in found.values():
        line.shutdown(socket.SHUT_RDWR)
    with pytest.raises(EOFError, match="process 0 is gone"):
        ends[0].receive(1)


def test_a_process_that_ends_before_it_is_ready_is_named() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ConnectionError, match="process 3 ended while it got ready"):
        Lines({3: ours}).wait()
    ours.close()


def test_a_mesh_of_more_devices_than_there_are_is_refused() -> None:
    assert dict(serving_mesh(2, 4).shape) == {"data": 2, "tensor": 4}
    assert serving_mesh(1, 1).size == 1
    said = "--tensor-parallel-size 16 x --data-parallel-size 1 needs 16 devices but there are 8"
    with pytest.raises(ValueError, match=said):
        serving_mesh(1, 16)


@pytest.mark.parametrize("name", ["tensor_parallel_size", "data_parallel_size"])
def test_no_devices_are_no_mesh(name: str) -> None:
    given: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0 must be 1 or more"):
        check(ServeSettings(**given), Speculation())
