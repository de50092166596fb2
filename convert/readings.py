"""The ways a draft's files may be read: as configured, and under each of the likely mistakes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dspark_jax.config import DraftConfig

Vocabulary = Literal["offsets", "ids", "t2d", "first"]
THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 8e6, 1e7)
"""Bases of rotary positions that models have."""
WINDOWS = (128, 512, 1024, 2048, 4096)
"""Windows that drafts have."""


@dataclass(frozen=True)
class Reading:
    """How a draft is run: its settings, and what no setting says."""

    config: DraftConfig
    last_normed: bool = False
    """Whether the state that leaves the target's last layer goes through the target's norm."""
    normed: bool = True
    """Whether the draft's own last norm is applied."""
    interleaved: bool = False
    """Whether rotary pairs are neighbours."""
    vocabulary: Vocabulary = "offsets"
    without: tuple[str, ...] = ()
    """Parts that are switched off: `layer I`, `Markov head`, `context`."""


class Change(NamedTuple):
    """One likely mistake: its kind, what is read otherwise, and the reading that does so."""

    kind: str
    what: str
    reading: Reading


class Known(NamedTuple):
    """What the likely mistakes depend on, beside the draft's own settings.

    `vocabularies` are the maps that its files allow, `masks` tokens that could fill its slots,
    `written_window` what config.json says of a window whatever its layers are.
    """

    depth: int
    thetas: tuple[float, ...]
    masks: tuple[int, ...]
    vocabularies: tuple[Vocabulary, ...]
    written_window: int | None
    longest_context: int


def alternatives(start: Reading, known: Known) -> Iterator[Change]:
    """Every reading that differs from `start` in one thing."""
    yield from _layout(start)
    yield from _layer_ids(start, known)
    yield from _norms(start, known)
    yield from _windows(start, known)
    yield from _rope(start, known)
    yield from _tokens(start, known)


def parts(start: Reading) -> Iterator[Change]:
    """The reading without one of the draft's parts, each of which should make it worse."""
    for layer in range(start.config.num_hidden_layers):
        if start.config.num_hidden_layers > 1:
            yield _without(start, f"layer {layer}")
    if start.config.markov_rank:
        yield _without(start, "Markov head")


def blind(start: Reading) -> Reading:
    """The reading without the target's states: what a draft gets by chance and by habit."""
    return _without(start, "context").reading


def untold(start: Reading, known: Known) -> Iterator[str]:
    """What cannot be told of this draft by this text, and why."""
    config = start.config
    if config.draft_vocab_size == config.vocab_size:
        yield "vocabulary map: the draft proposes the target's whole vocabulary, so it has none"
    if known.depth not in config.aux_layer_ids:
        yield f"norm of the target's last state: the draft does not read state {known.depth}"
    tried = tuple(w for w in _tried(start, known) if w >= known.longest_context)
    if tried:
        yield (
            f"window of {', '.join(map(str, tried))}: the longest context judged has "
            f"{known.longest_context} tokens; give longer --prompts or --answer-tokens"
        )
    yield "windows of other sizes: only those are tried that drafts usually have"


def _without(start: Reading, part: str) -> Change:
    return Change("part", f"without {part}", replace(start, without=(*start.without, part)))


def _configured(start: Reading, kind: str, what: str, **settings: object) -> Change:
    config = replace(start.config, **settings)  # pyright: ignore[reportArgumentType]
    return Change(kind, what, replace(start, config=config))


def _layout(start: Reading) -> Iterator[Change]:
    if start.config.block_size > 1:
        other = not start.config.sample_from_anchor
        what = f"sample_from_anchor {str(other).lower()}"
        yield _configured(start, "layout", what, sample_from_anchor=other)


def _layer_ids(start: Reading, known: Known) -> Iterator[Change]:
    ids = start.config.aux_layer_ids
    for shift in (-1, 1):
        moved = tuple(j + shift for j in ids)
        if min(moved) >= 0 and max(moved) <= known.depth:
            what = f"aux layers {list(moved)} ({shift:+d})"
            yield _configured(start, "layer ids", what, aux_layer_ids=moved)
    if list(ids) != sorted(ids):
        what = f"aux layers {sorted(ids)} (ascending)"
        yield _configured(start, "layer ids", what, aux_layer_ids=tuple(sorted(ids)))


def _norms(start: Reading, known: Known) -> Iterator[Change]:
    if known.depth in start.config.aux_layer_ids:
        other = not start.last_normed
        how = "normed" if other else "not normed"
        what = f"aux layer {known.depth} {how} by the target"
        yield Change("final norm", what, replace(start, last_normed=other))
    how = "without" if start.normed else "with"
    yield Change("draft's norm", f"{how} the draft's norm", replace(start, normed=not start.normed))


def _tried(start: Reading, known: Known) -> Sequence[int]:
    written = () if known.written_window is None else (known.written_window,)
    own = tuple(w for w in start.config.windows if w is not None)
    return tuple(sorted({*WINDOWS, *written, *own}))


def _windows(start: Reading, known: Known) -> Iterator[Change]:
    config, count = start.config, start.config.num_hidden_layers
    if any(config.windows):
        full = ("full_attention",) * count
        yield _configured(start, "window", "no window", layer_types=full)
        other = not config.sliding_window_non_causal
        what = "windows not causal" if other else "windows causal"
        yield _configured(start, "causality", what, sliding_window_non_causal=other)
    sliding = ("sliding_attention",) * count
    for window in _tried(start, known):
        same = config.layer_types == sliding and config.sliding_window == window
        if window < known.longest_context and not same:
            made = {"layer_types": sliding, "sliding_window": window}
            yield _configured(start, "window", f"window {window}", **made)
            if not any(config.windows):
                free = {**made, "sliding_window_non_causal": True}
                yield _configured(start, "window", f"window {window}, not causal", **free)


def _rope(start: Reading, known: Known) -> Iterator[Change]:
    for theta in sorted({*THETAS, *known.thetas} - {start.config.rope_theta}):
        yield _configured(start, "RoPE theta", f"RoPE theta {theta:g}", rope_theta=theta)
    how = "half-split" if start.interleaved else "interleaved"
    other = replace(start, interleaved=not start.interleaved)
    yield Change("RoPE pairing", f"{how} RoPE", other)


def _tokens(start: Reading, known: Known) -> Iterator[Change]:
    for token in known.masks:
        if token != start.config.mask_token_id:
            yield _configured(start, "mask token", f"mask token {token}", mask_token_id=token)
    for name in known.vocabularies:
        if name != start.vocabulary:
            yield Change("vocabulary map", MAPS[name], replace(start, vocabulary=name))


MAPS: dict[Vocabulary, str] = {
    "offsets": "d2t as offsets",
    "ids": "d2t as target ids",
    "t2d": "map of t2d",
    "first": "draft ids as target ids",
}
