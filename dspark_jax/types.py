"""The arrays that cross a module border.

Dimension key: B sequences · T tokens · N anchors per row · G drafts per round (`draft_length`) ·
K slots of a block (`block_size`; G = K when `sample_from_anchor`, else K - 1) · S = G + 1 verify
width · V target vocabulary · Vd draft vocabulary · D hidden · A aux layers · L draft layers ·
H query heads · d head dim · r Markov rank · C context capacity.

NamedTuples rather than checked dataclasses: they survive `tree.map` to shardings and `eval_shape`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key


class Batch(NamedTuple):
    """Packed rows. `segment` is 0 on padding and 1, 2, … per document; positions restart."""

    tokens: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    segment: Int[Array, "B T"]
    position: Int[Array, "B T"]


class TargetStates(NamedTuple):
    """What a draft reads of its target; both before the target's final norm."""

    aux_hidden: Float[Array, "B T AD"]
    final_hidden: Float[Array, "B T D"]


class Places(NamedTuple):
    """Where flat rows belong: row t is number `offset[t]` of the rows of sequence `sequence[t]`.

    A row of sequence N or more belongs nowhere. `position` is that of every place, at least C
    where no row stands.
    """

    sequence: Int[Array, "R"]
    offset: Int[Array, "R"]
    position: Int[Array, "N S"]


class Rows(NamedTuple):
    """Tokens to run through a target with a cache; a row with `position` >= C is padding.

    A cache of pages has arrays [pages, size …] for [B, C …]: `pages` lists those of every sequence
    in order, 0 where there is none, and C is P * size. Page 0 is nobody's: it is read as zeros and
    never written. With `places` rows are flat, [R 1], and attend side by side with those of their
    sequence, of which `pages` has N.
    """

    tokens: Int[Array, "B S"]
    position: Int[Array, "B S"]
    pages: Int[Array, "N P"] | None = None
    places: Places | None = None


class Frozen(NamedTuple):
    """The target's tables that a draft shares and never trains.

    `lm_head` holds the columns of the draft vocabulary; `target_id[v]` is the target id of draft
    id v, ascending (`target_id = v + d2t[v]` in the published checkpoints).
    """

    embed: Float[Array, "V D"]
    lm_head: Float[Array, "D Vd"]
    target_id: Int[Array, "Vd"]


class Blocks(NamedTuple):
    """Training blocks: where they start, the tokens of their slots and what supervises them.

    `tokens[b, n, k]` is the real token at `anchor + k` (clamped at the row's end), `labels` the one
    that slot k predicts; `label_mask` is 1 where slot k is trained.
    """

    anchor: Int[Array, "B N"]
    valid: Bool[Array, "B N"]
    tokens: Int[Array, "B N K"]
    labels: Int[Array, "B N K"]
    label_mask: Bool[Array, "B N K"]


class BlockScores(NamedTuple):
    """Teacher-forced outputs; the logits are made of them chunk by chunk (`chunked.py`).

    `markov` is what the Markov head's last factor is applied to; `confidence` is before the
    sigmoid. Either is None without its head.
    """

    hidden: Float[Array, "B N K D"]
    markov: Float[Array, "B N K r"] | None
    confidence: Float[Array, "B N K"] | None


class DraftCache(NamedTuple):
    """Per draft layer, keys and values of the fused target states; never of draft tokens."""

    k: tuple[Float[Array, "B Hk C d"], ...]
    v: tuple[Float[Array, "B Hk C d"], ...]


class Recipe(NamedTuple):
    """Logits [B G Vd] that are not kept: `base + mixed @ w2`, once more where a row is needed.

    `log_q` are the log-probabilities of the drafted tokens at the temperature they were drawn at,
    `lse` the logarithms of the sums of exp(logits / temperature); temperature 1 where it was 0.
    """

    base: Float[Array, "B G Vd"]
    mixed: Float[Array, "B G r"]
    w2: Float[Array, "r Vd"]
    log_q: Float[Array, "B G"]
    lse: Float[Array, "B G"]


class Candidates(NamedTuple):
    """Logits of the `entry`s of the draft vocabulary that a slot's token was drawn among."""

    entry: Int[Array, "B G k"]
    logits: Float[Array, "B G k"]


class Proposal(NamedTuple):
    """One drafted block. `tokens` are target ids; `logits` are over the draft vocabulary.

    `confidence` is before the sigmoid, as the head gives it. A draft without that head gives the
    log-odds of the likeliest token of the distribution that a slot's was drawn from.
    """

    tokens: Int[Array, "B G"]
    logits: Any
    """float32 [B G Vd], the `Recipe` for them, or those of `Candidates` alone."""
    confidence: Float[Array, "B G"]
    certain: Bool[Array, "B"] | None = None
    """Blocks that were drawn from single tokens, not from the logits; None: no block was."""


class Verdict(NamedTuple):
    """`accepted` drafts (0..G) and the token the target adds; acceptance length = accepted + 1."""

    accepted: Int[Array, "B"]
    bonus: Int[Array, "B"]


class Target(NamedTuple):
    """What drafting, verifying and training need of a model; every function is jit-able.

    Over the model's parameters:
    `forward(params, tokens, segment, position) -> TargetStates`: whole packed rows, no cache.
    `trace(params, tokens, segment, position) -> (TargetStates, choices)`: the same with what every
    layer chose, to explain a divergence.
    `unembed(params, hidden) -> logits`: final norm and head, float32.
    `frozen(params, target_id) -> Frozen`: the tables a draft shares.

    Over `prepare(params)`, the weights laid out for decoding, made once:
    `init_cache(batch, capacity, dtype) -> cache`.
    `extend(prepared, cache, rows) -> (cache, TargetStates)`: rows after their caches.
    `logits(prepared, hidden) -> logits`: as `unembed`.
    """

    config: Any
    forward: Callable[..., TargetStates]
    trace: Callable[..., Any]
    unembed: Callable[..., Any]
    frozen: Callable[..., Frozen]
    prepare: Callable[..., Any]
    init_cache: Callable[..., Any]
    extend: Callable[..., tuple[Any, TargetStates]]
    logits: Callable[..., Any]


class Draft(NamedTuple):
    """What the decode loop needs of a draft; every function is jit-able.

    `prepare(params) -> prepared`: the weights laid out for decoding, made once.
    `init_cache(batch, capacity, dtype) -> cache`.
    `extend_context(prepared, cache, aux_hidden, position, pages=None) -> cache`.
    `draft_block(prepared, frozen, cache, length, anchor, keys, temperature, pages=None) ->
    Proposal`. `pages` [B P] is as in `Rows`.
    """

    draft_length: int
    prepare: Callable[..., Any]
    init_cache: Callable[..., Any]
    extend_context: Callable[..., Any]
    draft_block: Callable[..., Proposal]
    mesh: Mesh | None = None
    """The devices that draft together, if several do."""
    candidates: int | None = None
    """Tokens that a slot's is drawn among; None: the whole vocabulary."""


class DecodeState(NamedTuple):
    """All that a decode round reads and replaces: the documentation of the loop.

    `anchor` is the last emitted token, not yet seen by the target; it will sit at position
    `length`. Rows of both caches at or past `length` are stale and get overwritten.
    """

    anchor: Int[Array, "B"]
    length: Int[Array, "B"]
    active: Bool[Array, "B"]
    keys: Key[Array, "B"]
    draft_cache: Any
    target_cache: Any
