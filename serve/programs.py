"""Every program the engine runs, compiled before the first request: nothing compiles after that."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.loop import Weights
from dspark_jax.paged_loop import (
    SlotState,
    init_slots,
    plain_round,
    prefill_pages,
    serve_round,
    stopping_round,
)
from dspark_jax.paged_upkeep import Behind, catch_up, scrub
from dspark_jax.paged_words import (
    Column,
    Heard,
    Told,
    control_of,
    told_columns,
    views,
    width,
    words_of,
)
from dspark_jax.serve.layout import shardings_of, state_shardings, whole
from dspark_jax.sharding import target_mesh
from dspark_jax.truncation import Edits
from dspark_jax.types import Draft, Rows, Target

SHORTEST_CONTEXT, NARROWING = 256, 4
"""Attention over all that a sequence could hold is for those that hold it: every context is this
many times narrower than the next, as long as it holds so many rows."""


@dataclass(frozen=True)
class Sizes:
    """What the programs are compiled for."""

    slots: int
    """Sequences decoded at the same time."""
    page: int
    pages: int
    """Of `page` rows each; page 0 is nobody's."""
    longest: int
    """Pages of a sequence, at most."""
    verified: int
    """Drafts of a sequence verified in a round, at most; 0 is plain decoding."""
    vocabulary: int
    chunks: tuple[int, ...]
    """Prompt rows read at a time, ascending."""

    @property
    def contexts(self) -> tuple[int, ...]:
        """Pages that a round's attention covers: what most answers need, and the longest."""
        found = [self.longest]
        while found[0] * self.page >= SHORTEST_CONTEXT * NARROWING:
            found.insert(0, -(-found[0] // NARROWING))
        return tuple(found)

    @property
    def groups(self) -> tuple[int, ...]:
        """How many sequences a round may serve: powers of two up to the slots."""
        powers = [1 << i for i in range(self.slots.bit_length()) if 1 << i < self.slots]
        return (*powers, self.slots)

    def budgets(self, group: int) -> tuple[int, ...]:
        """Verified rows of a round of `group` sequences; the first drafts nothing.

        Two rows of a sequence cost nearly what four do, and every budget is a program to compile.
        """
        width = self.verified + 1
        if width == 1:
            return (group,)
        parts = [group * m for m in (1, 4, 16) if m == 1 or 4 * m < 3 * width]
        return (*parts, group * width)


class Shape(NamedTuple):
    """A round's program: sequences, verified rows, pages of a sequence, and whether logits are
    edited and reported."""

    group: int
    budget: int
    pages: int
    edited: bool


@runtime_checkable
class Steps(Protocol):
    """What the engine asks of the device: of `Programs`, or of all processes (`following.py`)."""

    sizes: Sizes

    def round(self, shape: Shape, told: Told, edits: Edits | None) -> Any:
        """Dispatch a round; its `Heard` is on its way."""
        ...

    def prefill(self, tokens: np.ndarray, start: int, pages: tuple[int, ...]) -> int:
        """Dispatch the next prompt rows, which stand at `start`; returns how many were taken."""
        ...

    def catch_up(self, behind: Behind) -> None:
        """Dispatch telling the draft what plain rounds have held."""
        ...

    def clean(self, pages: tuple[int, ...]) -> None:
        """Dispatch writing zeros into some pages."""
        ...

    def reset(self) -> None:
        """Begin with empty caches again, after a step failed and took the state with it."""
        ...

    def shapes(self) -> Iterator[Shape]:
        """Of all rounds. Edited ones, which are few, verify everything or nothing."""
        ...

    def program(self, shape: Shape) -> Shape:
        """The program that runs rounds of this shape: a stopping one runs those of all budgets."""
        ...

    def chooses(self, program: Shape) -> bool:
        """Whether it wants to know what rounds take: `seconds` of every count of rows."""
        ...

    def told(self, group: int, pages: int) -> Told:
        """A round in which nobody takes part, to be filled in."""
        ...

    def columns(self, pages: int) -> tuple[Column, ...]:
        """What lies where in the words that rounds over so many pages are told."""
        ...

    def edits(self, group: int) -> Edits:
        """Edits that change nothing, to be filled in."""
        ...

    def behind(self, group: int) -> Behind:
        """Nobody is, to be filled in."""
        ...


class Programs:
    """The compiled programs over one pair of models and the mesh that its weights lie on.

    Each changes `state`, which is theirs.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        weights: Weights,
        sizes: Sizes,
        dtype: Any,
        mesh: Mesh | None = None,
        stopping: bool = False,
    ):
        """With `stopping` the rounds that draft choose their own budgets, by Algorithm 1."""
        mesh = mesh or target_mesh(jax.devices()[:1], 1)
        self.sizes, self.weights, self.stopping = sizes, weights, stopping
        self._models = (target, draft)
        self._rounds: dict[Shape, Any] = {}
        self._chunks: dict[int, Any] = {}
        self._catching: dict[int, Any] = {}
        self._scrub: Any = None
        make = partial(init_slots, *self._models, sizes.slots, sizes.pages, sizes.page)
        shapes = jax.eval_shape(partial(make, jnp.dtype(dtype)))
        self._whole, self._lie = whole(mesh), state_shardings(mesh, target.config, shapes)
        # Zeros by shape: the caches' own beginning lies as caches that are not in pages do.
        zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self._empty = jax.jit(zeros, out_shardings=self._lie).lower().compile()
        self.state = self._empty()

    def shapes(self) -> Iterator[Shape]:
        """As `Steps` says."""
        sizes = self.sizes
        for group in sizes.groups:
            budgets = sizes.budgets(group)
            for pages in sizes.contexts:
                plain = (Shape(group, budget, pages, False) for budget in budgets)
                yield from dict.fromkeys(map(self.program, plain))
            ends = {budgets[0], budgets[-1]}
            yield from (Shape(group, budget, sizes.longest, True) for budget in ends)

    def program(self, shape: Shape) -> Shape:
        """As `Steps` says."""
        if not self.stopping or shape.edited or shape.budget == shape.group:
            return shape
        return shape._replace(budget=self.sizes.budgets(shape.group)[-1])

    def chooses(self, program: Shape) -> bool:
        """As `Steps` says."""
        return self.stopping and not program.edited and program.budget > program.group

    @property
    def count(self) -> int:
        """How many programs there are."""
        return len(self._rounds) + len(self._chunks) + len(self._catching) + 2

    def compile(self, progress: Callable[[int, int], None]) -> None:
        """Compile all of them, side by side; `progress(done, total)` follows."""
        jobs: dict[Any, Callable[[], Any]] = {
            shape: partial(self._compile_round, shape) for shape in self.shapes()
        }
        jobs |= {chunk: partial(self._compile_chunk, chunk) for chunk in self.sizes.chunks}
        jobs |= {("behind", group): partial(self._compile_behind, group) for group in self._drafted}
        jobs["scrub"] = partial(self._lower, scrub, self._lie, self.state, self._padded(()))
        progress(0, len(jobs))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = {key: pool.submit(job) for key, job in jobs.items()}
            for done, _ in enumerate(as_completed(compiled.values()), 1):
                progress(done, len(jobs))
        made = {key: future.result() for key, future in compiled.items()}
        self._scrub = made.pop("scrub")
        self._catching = {group: made.pop(("behind", group)) for group in self._drafted}
        self._chunks = {chunk: made.pop(chunk) for chunk in self.sizes.chunks}
        self._rounds = made

    def round(self, shape: Shape, told: Told, edits: Edits | None) -> Any:
        """As `Steps` says."""
        given = (self.weights, self.state, told, edits)
        self.state, result = self._rounds[shape](*given)
        return result

    def prefill(self, tokens: np.ndarray, start: int, pages: tuple[int, ...]) -> int:
        """As `Steps` says."""
        chunks = self.sizes.chunks
        size = next((c for c in chunks if c >= len(tokens)), chunks[-1])
        taken = min(size, len(tokens))
        padded = np.zeros(size, np.int32)
        padded[:taken] = tokens[:taken]
        beyond = self.sizes.longest * self.sizes.page
        position = np.where(np.arange(size) < taken, start + np.arange(size), beyond)
        rows = self._rows(padded, position.astype(np.int32), pages)
        self.state = self._chunks[size](self.weights, self.state, rows)
        return taken

    def catch_up(self, behind: Behind) -> None:
        """As `Steps` says."""
        self.state = self._catching[len(behind.slot)](self.weights, self.state, behind)

    def clean(self, pages: tuple[int, ...]) -> None:
        """As `Steps` says."""
        self.state = self._scrub(self.state, self._padded(pages))

    def reset(self) -> None:
        """As `Steps` says."""
        self.state = self._empty()

    def told(self, group: int, pages: int) -> Told:
        """As `Steps` says."""
        columns = self.columns(pages)
        words = np.zeros((group, width(columns)), np.int32)
        known = views(columns, words)
        known["slot"][:] = self.sizes.slots
        known["top_p"][:], known["slope"][:] = 1, 1
        told: Any = words
        return Told(told)

    def columns(self, pages: int) -> tuple[Column, ...]:
        """As `Steps` says."""
        return told_columns(self._models[1].draft_length, pages)

    def edits(self, group: int) -> Edits:
        """As `Steps` says."""
        size = self.sizes.vocabulary
        arrays: dict[str, Any] = {
            "allowed": np.full((group, -(-size // 32)), 0xFFFFFFFF, np.uint32),
            "bias": np.zeros((group, size), np.float32),
            "seen": np.zeros((group, size), bool),
            "repetition": np.ones(group, np.float32),
            "penalty": np.zeros((group, size), np.float32),
        }
        return Edits(**arrays)

    def behind(self, group: int) -> Behind:
        """As `Steps` says."""
        nobody, none = np.full(group, self.sizes.slots, np.int32), np.zeros(group, np.int32)
        given: Any = (nobody, none, np.zeros((group, self.sizes.longest), np.int32))
        return Behind(*given)

    @property
    def _drafted(self) -> tuple[int, ...]:
        """The groups that may be drafted for."""
        return self.sizes.groups if self.sizes.verified else ()

    def _compile_behind(self, group: int) -> Any:
        return self._lower(catch_up, self._lie, self.weights, self.state, self.behind(group))

    def _compile_round(self, shape: Shape) -> Any:
        told = self.told(shape.group, shape.pages)
        edits = self.edits(shape.group) if shape.edited else None
        given = (self.weights, self.state, told, edits)
        outs = (self._lie, self._whole)
        if shape.budget == shape.group:
            return self._lower(partial(_words, plain_round), outs, *given)
        if self.chooses(shape):
            timed = told._replace(seconds=np.ones(1 + shape.budget, np.float32))
            budgets = self.sizes.budgets(shape.group)[1:]
            chosen = (self.weights, self.state, timed, edits)
            stopping = partial(stopping_round, budgets=budgets)
            return self._lower(partial(_words, stopping), outs, *chosen)
        drafting = partial(serve_round, budget=shape.budget)
        return self._lower(partial(_words, drafting), outs, *given)

    def _compile_chunk(self, chunk: int) -> Any:
        rows = self._rows(np.zeros(chunk, np.int32), np.zeros(chunk, np.int32), ())
        return self._lower(prefill_pages, self._lie, self.weights, self.state, rows)

    def _lower(self, function: Callable[..., Any], outs: Any, *given: Any) -> Any:
        """Compiled for arrays that lie as these do; what the host gives is whole on all devices."""

        def lie(x: Any) -> Any:
            held = isinstance(x, Weights | SlotState)
            return shardings_of(x) if held else self._whole

        step = jax.jit(
            partial(function, *self._models),
            in_shardings=tuple(lie(x) for x in given),
            out_shardings=outs,
            donate_argnums=next(i for i, x in enumerate(given) if isinstance(x, SlotState)),
        )
        return step.lower(*given).compile()

    def _rows(self, tokens: np.ndarray, position: np.ndarray, pages: tuple[int, ...]) -> Rows:
        one: Any = (tokens[None], position[None], self._padded(pages)[None])
        return Rows(*one)

    def _padded(self, pages: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(self.sizes.longest, np.int32)
        padded[: len(pages)] = pages
        return padded


def _words(
    play: Callable[..., Any],
    target: Target,
    draft: Draft,
    weights: Weights,
    state: SlotState,
    told: Told,
    edits: Edits | None,
) -> tuple[SlotState, Heard]:
    """A round that is told and tells words."""
    control = control_of(told, draft.draft_length)
    state, result = play(target, draft, weights, state, control, edits)
    return state, words_of(result)
