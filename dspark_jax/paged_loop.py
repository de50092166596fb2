"""A server's decode round: sequences in slots, caches in pages, as many verified rows as chosen.

As `loop.decode_step`, with what a server needs beside it: every round serves any of the slots, the
drafts to verify are chosen by confidence within a budget, and requests differ in how they draw.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dspark_jax.acceptance import accept
from dspark_jax.cache import to_blocks
from dspark_jax.generation import sample
from dspark_jax.loop import DRAFT_SALT, VERIFY_SALT, Weights
from dspark_jax.sampling import salted
from dspark_jax.schedule import pack, verify_lengths, worth_verifying
from dspark_jax.truncation import Edits, Truncation, edit, truncate
from dspark_jax.types import Draft, Places, Proposal, Rows, Target, Verdict

MOST_LOGPROBS = 20
"""As many of the likeliest tokens can be reported beside an emitted one."""

BEYOND = 1 << 30
"""A position past every cache: nothing is written there."""


HELD = 16
"""Rows of a slot that the draft's context may be behind."""


class SlotState(NamedTuple):
    """What stays on the device between rounds: every slot's last token and length, all pages.

    `held` are the target's states of the last rows, row p at p mod HELD, where plain rounds left
    them: a draft that is not asked need not hear of them one by one.
    """

    anchor: Int[Array, "slots"]
    length: Int[Array, "slots"]
    held: Float[Array, "slots HELD A*D"]
    target_cache: Any
    draft_cache: Any


class Control(NamedTuple):
    """What the host says of a round's N sequences; all data, so nothing compiles anew.

    A `slot` beyond the last is nobody. A `fresh` sequence begins with `anchor` after `length` rows
    that its pages hold. `cap` bounds the drafts verified. `draft_temperature` 0 drafts greedily,
    any other drafts at `temperature`, by which the drafts are judged. A draft's chance to be
    accepted is taken to be `sigmoid(slope * confidence + intercept)`, slot by slot.
    """

    slot: Int[Array, "N"]
    fresh: Bool[Array, "N"]
    anchor: Int[Array, "N"]
    length: Int[Array, "N"]
    pages: Int[Array, "N P"]
    cap: Int[Array, "N"]
    key: UInt32[Array, "N 2"]
    temperature: Float[Array, "N"]
    draft_temperature: Float[Array, "N"]
    slope: Float[Array, "N G"]
    intercept: Float[Array, "N G"]
    truncation: Truncation
    seconds: Float[Array, "rows"] | None = None
    """What rounds of so many verified rows take, where the program chooses among them."""


class Logprobs(NamedTuple):
    """Of every emitted token: log-probability under the raw logits, rank from 1, likeliest ones."""

    logprob: Float[Array, "N S"]
    rank: Int[Array, "N S"]
    top_token: Int[Array, "N S top"]
    top_logprob: Float[Array, "N S top"]


class Result(NamedTuple):
    """A round's tokens: `accepted` drafts of `verified`, then the bonus; nothing else is real.

    `confidence` is the proposal's and `chance` what it was taken for, of every slot, verified or
    not. `finite` is False where the target's logits were not numbers: the tokens mean nothing then.
    """

    tokens: Int[Array, "N S"]
    accepted: Int[Array, "N"]
    verified: Int[Array, "N"]
    confidence: Float[Array, "N G"]
    chance: Float[Array, "N G"]
    finite: Bool[Array, "N"]
    logprobs: Logprobs | None


def init_slots(
    target: Target, draft: Draft, slots: int, pages: int, size: int, dtype: Any
) -> SlotState:
    """Empty slots, and `pages` pages of `size` rows (page 0 is nobody's, see `types.Rows`)."""
    none = jnp.zeros(slots, jnp.int32)
    caches = (x.init_cache(pages, size, dtype) for x in (target, draft))
    width = len(target.config.aux_layer_ids) * target.config.hidden_size
    return SlotState(none, none, jnp.zeros((slots, HELD, width), dtype), *caches)


def prefill_pages(
    target: Target, draft: Draft, weights: Weights, state: SlotState, rows: Rows
) -> SlotState:
    """Run prompt rows [1 C] of one sequence through both caches; nothing is sampled."""
    cache, states = target.extend(weights.target, state.target_cache, rows)
    given = (states.aux_hidden, rows.position, rows.pages)
    draft_cache = draft.extend_context(weights.draft, state.draft_cache, *given)
    return state._replace(target_cache=cache, draft_cache=draft_cache)


class Drafted(NamedTuple):
    """A round's blocks, before it is known how much of them is verified."""

    anchor: Int[Array, "N"]
    length: Int[Array, "N"]
    active: Bool[Array, "N"]
    keys: Key[Array, "N"]
    proposal: Proposal
    chance: Float[Array, "N G"]
    cap: Int[Array, "N"]


def serve_round(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: SlotState,
    control: Control,
    edits: Edits | None,
    budget: int,
) -> tuple[SlotState, Result]:
    """One round of N sequences with `budget` verified rows, anchors included.

    With `edits`, which hold for the first row of a sequence (their `cap` must be 0), the tokens'
    log-probabilities are reported too.
    """
    drafted = draft_round(draft, weights, state, control)
    return verify_round(target, draft, weights, state, control, edits, drafted, budget)


def stopping_round(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: SlotState,
    control: Control,
    edits: Edits | None,
    budgets: tuple[int, ...],
) -> tuple[SlotState, Result]:
    """As `serve_round`, with as many verified rows as Algorithm 1 chooses for these very blocks.

    Rounded up to the next of `budgets`, which ascend: each has its own shapes.
    """
    assert control.seconds is not None
    drafted = draft_round(draft, weights, state, control)
    with jax.named_scope("schedule"):
        active = jnp.sum(drafted.active, dtype=jnp.int32)
        wanted = worth_verifying(drafted.chance, drafted.cap, active, control.seconds)
        chosen = jnp.searchsorted(jnp.array(budgets), active + wanted)
    verify = partial(verify_round, target, draft, weights, state, control, edits, drafted)
    return jax.lax.switch(chosen, [partial(verify, budget) for budget in budgets])


def draft_round(draft: Draft, weights: Weights, state: SlotState, control: Control) -> Drafted:
    """A block of every sequence, and the chances of its drafts."""
    anchor, length = _enter(state, control)
    active = control.slot < len(state.anchor)
    keys = jax.random.wrap_key_data(control.key)
    keys = jax.vmap(jax.random.fold_in)(keys, length)
    with jax.named_scope("draft"):
        proposal = draft.draft_block(
            weights.draft,
            weights.frozen,
            state.draft_cache,
            length,
            anchor,
            salted(keys, DRAFT_SALT),
            jnp.where(control.draft_temperature == 0, 0.0, control.temperature),
            control.pages,
        )
    chance = jax.nn.sigmoid(control.slope * proposal.confidence + control.intercept)
    cap = jnp.where(active, jnp.clip(control.cap, 0, draft.draft_length), 0)
    return Drafted(anchor, length, active, keys, proposal, chance, cap)


def verify_round(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: SlotState,
    control: Control,
    edits: Edits | None,
    drafted: Drafted,
    budget: int,
) -> tuple[SlotState, Result]:
    """The rest of a round: `budget` rows of its blocks verified, what is kept of them committed."""
    anchor, length, active, keys, proposal, chance, cap = drafted
    with jax.named_scope("schedule"):
        allowed = jnp.maximum(budget - jnp.sum(active), 0)
        verify_length = verify_lengths(chance, cap, allowed)
        places, position = pack(
            active, length, verify_length, (budget, draft.draft_length + 1), BEYOND
        )
        rows = Rows(_tokens(anchor, proposal, places), position, control.pages, places)
    with jax.named_scope("verify"):
        target_cache, states = target.extend(weights.target, state.target_cache, rows)
        logits = target.logits(weights.target, states.final_hidden)
        logits, finite = _numbers(to_blocks(rows, logits))
    with jax.named_scope("accept"):
        drawn = _drawn(logits, control, edits)
        verdict = accept(
            drawn_proposal(proposal, control),
            drawn,
            weights.frozen.target_id,
            verify_length,
            control.temperature,
            salted(keys, VERIFY_SALT),
            draft.mesh,
        )
    with jax.named_scope("commit"):
        position, pages = _kept(rows, verdict, control.pages)
        given = (states.aux_hidden, position, pages)
        draft_cache = draft.extend_context(weights.draft, state.draft_cache, *given)
        state = SlotState(
            state.anchor.at[control.slot].set(verdict.bonus, mode="drop"),
            state.length.at[control.slot].set(length + verdict.accepted + 1, mode="drop"),
            state.held,
            target_cache,
            draft_cache,
        )
    slot = jnp.arange(proposal.tokens.shape[1] + 1)
    drafts = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(slot == verdict.accepted[:, None], verdict.bonus[:, None], drafts)
    told = None if edits is None else _logprobs(logits, tokens)
    said = (proposal.confidence, chance)
    return state, Result(tokens, verdict.accepted, verify_length, *said, finite, told)


def plain_round(
    target: Target,
    draft: Draft,
    weights: Weights,
    state: SlotState,
    control: Control,
    edits: Edits | None,
) -> tuple[SlotState, Result]:
    """A round that drafts nothing: one token of every sequence, whose states are held.

    Before HELD more are, and before the next round that drafts, the draft has to catch up
    (`paged_upkeep.py`).
    """
    anchor, length = _enter(state, control)
    active = control.slot < len(state.anchor)
    keys = jax.random.wrap_key_data(control.key)
    with jax.named_scope("verify"):
        # A row alone would be written by copying the whole cache: it gets one of padding beside it.
        beside = ((0, 0), (0, 1 if len(anchor) == 1 else 0))
        position = jnp.where(active, length, BEYOND)[:, None]
        position = jnp.pad(position, beside, constant_values=BEYOND)
        rows = Rows(jnp.pad(anchor[:, None], beside), position, control.pages)
        target_cache, states = target.extend(weights.target, state.target_cache, rows)
        logits = target.logits(weights.target, states.final_hidden[:, :1])
        logits, finite = _numbers(logits)
    drawn = _drawn(logits, control, edits)
    token = sample(drawn[:, 0], control.temperature, keys, length)
    place = (control.slot, length % HELD)
    state = SlotState(
        state.anchor.at[control.slot].set(token, mode="drop"),
        state.length.at[control.slot].set(length + 1, mode="drop"),
        state.held.at[place].set(states.aux_hidden[: len(anchor), 0], mode="drop"),
        target_cache,
        state.draft_cache,
    )
    none, tokens = jnp.zeros_like(token), token[:, None]
    unsaid = jnp.zeros((len(token), 0))
    told = None if edits is None else _logprobs(logits, tokens)
    return state, Result(tokens, none, none, unsaid, unsaid, finite, told)


def drawn_proposal(proposal: Proposal, control: Control) -> Proposal:
    """The proposal with the distribution its tokens were drawn from.

    A block drafted greedily for a request that samples was drawn from one token alone, and is kept
    with the target's probability of it.
    """
    certain = (control.temperature > 0) & (control.draft_temperature == 0)
    return proposal._replace(certain=certain)


def _enter(state: SlotState, control: Control) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """(anchor, length) of the round's sequences: what their slots hold, or their beginning."""
    held = jnp.minimum(control.slot, len(state.anchor) - 1)
    anchor = jnp.where(control.fresh, control.anchor, state.anchor[held])
    length = jnp.where(control.fresh, control.length, state.length[held])
    return anchor, length


def _tokens(anchor: Int[Array, "N"], proposal: Proposal, places: Places) -> Int[Array, "R 1"]:
    """The token of every flat row; that of a row without a sequence is anyone's."""
    tokens = jnp.concatenate([anchor[:, None], proposal.tokens], axis=1)
    sequence = jnp.minimum(places.sequence, len(anchor) - 1)
    return tokens[sequence, jnp.minimum(places.offset, tokens.shape[1] - 1)][:, None]


def _kept(
    rows: Rows, verdict: Verdict, pages: Int[Array, "N P"]
) -> tuple[Int[Array, "R 1"], Int[Array, "R P"]]:
    """Positions of the anchors and accepted drafts, out of range elsewhere; every row's pages."""
    assert rows.places is not None
    sequence = jnp.minimum(rows.places.sequence, len(pages) - 1)
    kept = rows.places.offset <= verdict.accepted[sequence]
    return jnp.where(kept[:, None], rows.position, BEYOND), pages[sequence]


def _numbers(
    logits: Float[Array, "N S V"],
) -> tuple[Float[Array, "N S V"], Bool[Array, "N"]]:
    """The logits, zeros for a sequence that has others than numbers, and which have none."""
    finite = jnp.all(jnp.isfinite(logits), axis=(1, 2))
    return jnp.where(finite[:, None, None], logits, 0.0), finite


def _drawn(
    logits: Float[Array, "N S V"], control: Control, edits: Edits | None
) -> Float[Array, "N S V"]:
    """The logits that tokens are drawn from."""
    if edits is not None:
        logits = logits.at[:, 0].set(edit(logits[:, 0], edits))
    return truncate(logits, control.temperature, control.truncation)


def _logprobs(logits: Float[Array, "N S V"], tokens: Int[Array, "N S"]) -> Logprobs:
    known = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(known, tokens[..., None], axis=-1)
    rank = 1 + jnp.sum(known > chosen, axis=-1, dtype=jnp.int32)
    top, token = jax.lax.top_k(known, min(MOST_LOGPROBS, known.shape[-1]))
    return Logprobs(chosen[..., 0], rank, token, top)
