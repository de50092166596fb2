"""A small server for tests: random models, their compiled rounds, and the pages of sequences.

The drafts are scripted on top of a real drafter, so that every length is accepted now and then,
while the drafter's cache and confidences are its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dspark_jax.config import Qwen3Config, TargetConfig
from dspark_jax.draft import dspark_draft, init_draft_params
from dspark_jax.loop import Weights
from dspark_jax.paged_loop import (
    Control,
    Result,
    SlotState,
    init_slots,
    plain_round,
    prefill_pages,
    serve_round,
)
from dspark_jax.paged_upkeep import Behind, catch_up, page_axes, scrub
from dspark_jax.targets.families import init_params, make_target
from dspark_jax.truncation import Edits, Truncation
from dspark_jax.types import Draft, Proposal, Rows, Target
from tests.property.test_greedy_equals_plain import DRAFT, GLM, V

G = DRAFT.draft_length
SLOTS, GROUP, PAGE, OWNED, PAGES = 6, 4, 4, 12, 56
"""`GROUP` of `SLOTS` sequences take part in a round; a sequence has up to `OWNED` pages."""
CHUNK, TOKENS = 10, 24
PLAIN, TIGHT, FULL = GROUP, GROUP + 5, GROUP * (G + 1)
"""Budgets: no drafts, a few, all."""
HELD_BACK = 0
"""No drafts either, but the draft does not hear of the rows before `Server.tell`."""
QWEN3 = Qwen3Config(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=20,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    norm_topk_prob=True,
    aux_layer_ids=(1, 2),
)
SHORT_GLM = replace(GLM, num_hidden_layers=3, indexer_types=("full", "shared", "full"))
TARGETS: dict[str, tuple[TargetConfig, int, float]] = {
    "glm": (replace(SHORT_GLM, aux_layer_ids=(1, 3)), 1, 0.3),
    "qwen3": (QWEN3, 3, 0.8),
}
"""With the seed and width of weights whose answers do not soon repeat."""
PROMPTS = tuple(
    tuple(np.random.default_rng(n).integers(0, V, 1 + (3 * n) % CHUNK).tolist()) for n in range(9)
)


class Script(NamedTuple):
    """Parameters of a draft that knows the answers, and at which positions and slots it errs.

    Sequences are told apart by their first page.
    """

    draft: Any
    token: Array
    wrong: Array
    wrong_slot: Array


class Models(NamedTuple):
    """A target, a scripted draft and every program over them."""

    target: Target
    draft: Draft
    weights: Weights
    rounds: dict[int, Callable[..., tuple[SlotState, Result]]]
    prefill: Callable[..., SlotState]
    catch_up: Callable[..., SlotState]
    scrub: Callable[..., SlotState]


def scripted(draft: Draft) -> Draft:
    """The same drafter, with other tokens."""

    def draft_block(script: Script, frozen: Any, cache: Any, *given: Any) -> Proposal:
        proposal = draft.draft_block(script.draft, frozen, cache, *given)
        length, pages = given[0], given[-1]
        place = jnp.minimum(length[:, None] + 1 + jnp.arange(G), script.token.shape[1] - 1)
        first = pages[:, :1]
        wrong = script.wrong[first, place] | script.wrong_slot
        return proposal._replace(tokens=(script.token[first, place] + wrong) % V)

    def extend_context(script: Script, *given: Any) -> Any:
        return draft.extend_context(script.draft, *given)

    return draft._replace(draft_block=draft_block, extend_context=extend_context)


def drawn(make: Callable[[], Any], seed: int, width: float) -> Any:
    """Parameters of these shapes, drawn without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> Array:
        norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(norm + width * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make))


@lru_cache
def models(name: str) -> Models:
    config, seed, width = TARGETS[name]
    target, draft = make_target(config), scripted(dspark_draft(DRAFT))
    params = drawn(lambda: init_params(config, 0), seed, width)
    drafter = drawn(lambda: init_draft_params(DRAFT, 0), 2, 0.3)

    def prepared() -> Weights:
        nobody = jnp.zeros((PAGES, PAGE * OWNED + G + 1), jnp.int32)
        right = jnp.zeros(G, jnp.int32)
        script = Script(dspark_draft(DRAFT).prepare(drafter), nobody, nobody, right)
        return Weights(target.prepare(params), script, target.frozen(params))

    both = target, draft
    rounds = {
        budget: jax.jit(partial(_round, partial(serve_round, *both), budget))
        for budget in (TIGHT, FULL)
    }
    rounds[HELD_BACK] = jax.jit(partial(plain_round, *both))
    rounds[PLAIN] = jax.jit(partial(_heard_round, *both))
    return Models(
        *both,
        jax.jit(prepared)(),
        rounds,
        jax.jit(partial(prefill_pages, *both)),
        jax.jit(partial(catch_up, *both)),
        jax.jit(partial(scrub, *both)),
    )


def _round(serve: Callable[..., Any], budget: int, *given: Any) -> Any:
    return serve(*given, budget)


def _heard_round(
    target: Target, draft: Draft, weights: Weights, state: SlotState, control: Control, edits: Edits
) -> tuple[SlotState, Result]:
    """A plain round, and the draft hears of it at once."""
    state, result = plain_round(target, draft, weights, state, control, edits)
    behind = Behind(control.slot, jnp.ones_like(control.slot), control.pages)
    return catch_up(target, draft, weights, state, behind), result


def no_edits() -> Edits:
    """Edits that change nothing, with which the log-probabilities are told."""
    nothing: Any = (
        np.full((GROUP, 1), 0xFFFFFFFF, np.uint32),
        np.zeros((GROUP, V), np.float32),
        np.zeros((GROUP, V), bool),
        np.ones(GROUP, np.float32),
        np.zeros((GROUP, V), np.float32),
    )
    return Edits(*nothing)


class Server:
    """Slots and pages of a model; it counts nothing and checks nothing."""

    def __init__(self, name: str, stale_seed: int | None = None):
        self.name, self.models = name, models(name)
        self.weights = self.models.weights
        target, draft = self.models.target, self.models.draft
        self.state = init_slots(target, draft, SLOTS, PAGES, PAGE, jnp.float32)
        if stale_seed is not None:
            self.change(partial(stale, np.random.default_rng(stale_seed)), np.arange(1, PAGES))

    def script(self, script: Script) -> None:
        self.weights = self.weights._replace(draft=script)

    def change(
        self, value: Callable[[Array], Any], pages: Sequence[int] | np.ndarray, only: Any = None
    ) -> None:
        """Write `value(rows)` into some pages of both caches, or of the one named."""
        chosen = np.asarray(pages)

        def put(x: Array, axis: int) -> Array:
            index = (slice(None),) * axis + (chosen,)
            return x.at[index].set(value(x[index]))

        target_axes, draft_axes = self.axes()
        changed = {
            "target": jax.tree.map(put, self.state.target_cache, target_axes),
            "draft": jax.tree.map(put, self.state.draft_cache, draft_axes),
        }
        named = {f"{k}_cache": x for k, x in changed.items() if only in (None, k)}
        self.state = self.state._replace(**named)

    def axes(self) -> tuple[Any, Any]:
        return page_axes(self.models.target.init_cache), page_axes(self.models.draft.init_cache)

    def pages(self, chosen: Any) -> list[np.ndarray]:
        """What some pages hold, in every array of both caches."""
        caches = (self.state.target_cache, self.state.draft_cache)
        found = jax.tree.map(lambda x, axis: np.moveaxis(x, axis, 0)[chosen], caches, self.axes())
        return jax.tree.leaves(found)

    def read(self, prompt: tuple[int, ...], pages: np.ndarray) -> None:
        """Everything but the prompt's last token."""
        tokens, position = np.zeros((1, CHUNK), np.int32), np.full((1, CHUNK), PAGE * OWNED)
        size = len(prompt) - 1
        tokens[0, :size], position[0, :size] = prompt[:-1], np.arange(size)
        rows = Rows(jnp.asarray(tokens), jnp.asarray(position, jnp.int32), jnp.asarray(pages[None]))
        self.state = self.models.prefill(self.weights, self.state, rows)

    def round(self, budget: int, members: Sequence["Member | None"], cap: Any = G) -> Result:
        """Serve these, row by row; None is nobody."""
        padded = [*members, *(GROUP - len(members)) * [None]]
        nobody = Member(-1, SLOTS, np.zeros(OWNED, np.int32), (0,))
        rows = [nobody if x is None else x for x in padded]
        zeros = np.zeros(GROUP, np.float32)
        control: dict[str, Any] = {
            "slot": np.array([x.slot for x in rows], np.int32),
            "fresh": np.array([x.fresh for x in rows]),
            "anchor": np.array([x.prompt[-1] for x in rows], np.int32),
            "length": np.array([len(x.prompt) - 1 for x in rows], np.int32),
            "pages": np.stack([x.pages for x in rows]),
            "cap": np.broadcast_to(np.asarray(cap, np.int32), GROUP),
            "key": np.zeros((GROUP, 2), np.uint32),
            "temperature": zeros,
            "draft_temperature": zeros,
            "slope": np.ones((GROUP, G), np.float32),
            "intercept": np.zeros((GROUP, G), np.float32),
            "truncation": Truncation(
                *map(jnp.asarray, (zeros, np.zeros(GROUP, np.int32), zeros + 1))
            ),
        }
        given = (
            self.weights,
            self.state,
            Control(**jax.tree.map(jnp.asarray, control)),
            no_edits(),
        )
        self.state, result = self.models.rounds[budget](*given)
        for x in rows:
            x.fresh = False
        return jax.tree.map(np.asarray, result)

    def tell(self, members: Sequence["Member"], rows: Sequence[int]) -> None:
        """The draft hears of the last rows that were held back."""
        room = GROUP - len(members)
        slots = [*(x.slot for x in members), *room * [SLOTS]]
        pages = [*(x.pages for x in members), *room * [np.zeros(OWNED, np.int32)]]
        given = np.array(slots), np.array([*rows, *room * [0]]), np.stack(pages)
        behind = Behind(*(jnp.asarray(x, jnp.int32) for x in given))
        self.state = self.models.catch_up(self.weights, self.state, behind)


class Member:
    """A sequence that is served: where it stands, and what it has said."""

    def __init__(self, number: int, slot: int, pages: np.ndarray, prompt: tuple[int, ...]):
        self.number, self.slot, self.prompt = number, slot, prompt
        self.pages = np.zeros(OWNED, np.int32)
        self.pages[: len(pages)] = pages
        self.fresh, self.tokens = True, list[int]()

    def hear(self, result: Result, row: int) -> None:
        self.tokens += result.tokens[row, : result.accepted[row] + 1].tolist()


def stale(rng: np.random.Generator, rows: Array) -> np.ndarray:
    return rng.normal(size=rows.shape).astype(np.float32)


@lru_cache
def plain_answers(name: str) -> np.ndarray:
    """What plain rounds say to every prompt, one sequence at a time in pages in order."""
    answers = []
    for n, prompt in enumerate(PROMPTS):
        server, member = Server(name), Member(n, 0, np.arange(1, OWNED + 1), prompt)
        server.read(prompt, member.pages)
        for _ in range(TOKENS):
            member.hear(server.round(PLAIN, [member]), 0)
        answers.append(member.tokens)
    return np.array(answers)


def script_of(
    name: str, members: Sequence[Member], error_rate: float = 0.3, seed: int = 1
) -> Script:
    """A draft that knows what these will say and is wrong at random positions."""
    blank = models(name).weights.draft
    token = np.zeros(blank.token.shape, np.int32)
    for member in members:
        start = len(member.prompt)
        token[member.pages[0], start : start + TOKENS] = plain_answers(name)[member.number]
    wrong = np.random.default_rng(seed).random(token.shape) < error_rate
    return blank._replace(token=jnp.asarray(token), wrong=jnp.asarray(wrong.astype(np.int32)))


def pages_needed(prompt: tuple[int, ...]) -> int:
    """Pages that hold a prompt, its answer and the drafts after it."""
    return -(-(len(prompt) + TOKENS + G) // PAGE)
