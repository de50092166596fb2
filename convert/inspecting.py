"""`inspect`: what a draft checkpoint is, in one screen."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from dspark_jax.config import DraftConfig
from dspark_jax.convert.engines import ENGINES, obstacles
from dspark_jax.convert.settings import Inspect
from dspark_jax.convert.source import Opened, checked, open_checkpoint
from dspark_jax.convert.tensors import CODES, finite_pieces
from dspark_jax.draft_files import whole
from dspark_jax.draft_formats.formats import DFLASH_KINDS, FormatName, Reading, look
from dspark_jax.draft_weights import NOT_TRAINED, TABLES

FORMATS: dict[str, FormatName] = {
    "speculators": "speculators",
    "deepspec": "deepspec",
    "specforge": "specforge",
}


def inspect_draft(given: Inspect) -> str:
    """One screen of text; ValueError when the folder holds no draft at all."""
    opened = open_checkpoint(given.folder)
    reading = look(opened.described)
    rows = [*facts(opened, reading), ("served by", served_by(opened, reading))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    found = list(suspicions(opened, reading))
    lines += ["", f"suspicious: {len(found)}" if found else "nothing suspicious"]
    return "\n".join([*lines, *(f"- {line}" for line in found)])


def facts(opened: Opened, reading: Reading) -> Iterator[tuple[str, str]]:
    """Name and value of every line."""
    said, config = reading.said, reading.said.config
    trained = [t for name, t in opened.stored.items() if name not in NOT_TRAINED]
    kinds = sorted({CODES[t.dtype] for t in trained})
    ids = config.aux_layer_ids
    yield "folder", str(opened.folder)
    yield "format", reading.kind + (f", imported from {opened.source[0]}" if opened.source else "")
    yield "target", said.target_name or "not named"
    yield "layout", "sample_from_anchor" if config.sample_from_anchor else "1+N (slot 0 is given)"
    yield "block size", str(config.block_size)
    yield "drafts a round", str(config.draft_length)
    yield "aux layers", f"{list(ids)} by what enters them (vLLM, speculators, dspark-jax)"
    yield "", f"{[j - 1 for j in ids]} by output (DeepSpec, SpecForge, DFlash; -1 = embedding)"
    yield "", f"{list(ids)} of transformers' hidden_states"
    yield "layers", f"{config.num_hidden_layers} of {_windows(config)}"
    yield (
        "sizes",
        f"hidden {config.hidden_size}, feed-forward {config.intermediate_size}, "
        f"{config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads of "
        f"{config.head_dim}",
    )
    yield (
        "Markov head",
        f"{config.markov_head_type}, rank {config.markov_rank}" * bool(config.markov_rank)
        or "none",
    )
    yield "confidence head", _confidence(config)
    yield (
        "vocabulary",
        f"drafts {config.draft_vocab_size} of {config.vocab_size} tokens, "
        f"mask token {config.mask_token_id}",
    )
    yield "parameters", f"{sum(int(np.prod(t.shape)) for t in trained):,} in {', '.join(kinds)}"
    yield "target's tables", ", ".join(sorted(TABLES & opened.stored.keys())) or "none"


def _windows(config: DraftConfig) -> str:
    def one(window: int | None, causal: bool) -> str:
        if window is None:
            return "full attention"
        return f"window {window}" + ("" if causal else " (not causal)")

    pairs = zip(config.windows, config.causal, strict=True)
    return ", ".join(dict.fromkeys(one(*pair) for pair in pairs))


def _confidence(config: DraftConfig) -> str:
    if not config.enable_confidence_head:
        return "none"
    return f"{'with' if config.confidence_head_with_markov else 'without'} the Markov embedding"


def served_by(opened: Opened, reading: Reading) -> str:
    """Every engine, and why not where it cannot."""
    if reading.kind in DFLASH_KINDS:
        return "engines' DFlash method; import it to give it DSpark's heads"
    told = []
    for engine, name in ENGINES.items():
        reasons = obstacles(engine, FORMATS[reading.kind], reading.said.config)
        if reading.kind == "specforge" and "markov_rank" not in opened.described:
            reasons += ["markov_rank is not at the top of config.json"] if engine == "vllm" else []
        told.append(f"{name}: no, {'; '.join(reasons)}" if reasons else f"{name}: yes")
    return ". ".join(told)


def suspicions(opened: Opened, reading: Reading) -> Iterator[str]:
    """What a careful reader would ask about."""
    config, described = reading.said.config, opened.described
    yield from reading.notes
    if "sample_from_anchor" not in described and reading.kind in ("deepspec", "specforge"):
        yield "sample_from_anchor is not written; engines disagree on what that means"
    yield from (f"config.json has {line}" for line in reading.misfits)
    yield from (f"config.json has {key}, which is not understood" for key in reading.unknown)
    broken = False
    try:
        checked(opened, reading)
    except ValueError as error:
        broken = True
        yield str(error)
    kinds = {CODES[t.dtype] for name, t in opened.stored.items() if name not in NOT_TRAINED}
    if len(kinds) > 1:
        yield f"parameters of several types: {', '.join(sorted(kinds))}"
    ids = config.aux_layer_ids
    if list(ids) != sorted(ids):
        yield f"aux layers {list(ids)} do not ascend"
    if not config.sample_from_anchor:
        yield (
            f"in the 1+N layout vLLM drafts {config.block_size} tokens unless it is told "
            f"num_speculative_tokens {config.draft_length}"
        )
    name = reading.said.target_name
    if reading.kind == "speculators" and (not name or name.count("/") != 1 or name[:1] in "./~"):
        yield f"target name {name!r} is no hub id, so vLLM's one-argument serve refuses it"
    both = "embed_tokens.weight" in opened.stored and config.draft_vocab_size == config.vocab_size
    if both and reading.kind == "speculators":
        yield "own copies of the target's tables, which engines then do not share"
    if not broken:
        yield from _numbers(opened)


def _numbers(opened: Opened) -> Iterator[str]:
    """Numbers no trained draft has."""
    for stored in opened.stored.values():
        try:
            for _ in finite_pieces(stored):
                pass
        except ValueError as error:
            yield str(error)
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "norm.weight"):
        if name in opened.stored and not whole(opened.stored[name]).astype(jnp.float32).any():
            yield f"{name} is zero everywhere"
