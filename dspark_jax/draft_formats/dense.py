"""The flat formats, a Qwen3 config.json with a few keys more: DeepSpec, SpecForge, DFlash.

Their layer ids count outputs: id m is the output of layer m, our id m + 1 (-1 is the embedding).
"""

from collections.abc import Mapping
from typing import Any

from dspark_jax.draft_formats.keys import (
    NOTHING,
    Described,
    Key,
    boolean,
    derived,
    integer,
    kept,
    one_of,
    optional,
    setting,
    several,
)
from dspark_jax.draft_formats.layer import DTYPE, layer_table
from dspark_jax.draft_formats.speculators import NO_HEADS

HEAD_KEYS = {
    "markov_rank": integer,
    "markov_head_type": one_of("vanilla", "gated", "rnn"),
    "enable_confidence_head": boolean,
    "confidence_head_with_markov": boolean,
}


def _layer_ids(path: str, needed: bool = True, fresh: bool = True) -> Key:
    def read(value: Any) -> tuple[int, ...]:
        return tuple(m + 1 for m in several(integer)(value))

    def shifted(ids: tuple[int, ...]) -> list[int]:
        return [j - 1 for j in ids]

    return setting(path, "aux_layer_ids", read, shifted, needed=needed, fresh=fresh)


def _unless_none(path: str, name: str) -> Key:
    def given(value: Any) -> Any:
        return NOTHING if value is None else value

    return setting(path, name, optional(integer), given, needed=False)


def _causality(path: str) -> Key:
    """Whether a block's slots see only earlier ones, in all layers; unset: in sliding ones."""

    def write(said: Described) -> Any:
        windowed = "sliding_attention" in said.config.layer_types
        return False if windowed and said.config.sliding_window_non_causal else NOTHING

    def fits(found: Any, said: Described) -> bool:
        return found is None or said.config.causal == (found,) * said.config.num_hidden_layers

    return Key(path, write, fits)


def _top(architecture: str) -> tuple[Key, ...]:
    return (
        setting("block_size", "block_size", integer),
        _unless_none("num_target_layers", "num_target_layers"),
        _unless_none("target_hidden_size", "target_hidden_size"),
        setting("draft_vocab_size", "draft_vocab_size", integer, needed=False),
        setting("sample_from_anchor", "sample_from_anchor", boolean, needed=False),
        _causality("is_causal"),
        kept("architectures", [architecture]),
        DTYPE,
        kept("torch_dtype"),
        kept("auto_map"),
        kept("transformers_version"),
        kept("num_anchors"),
        kept("chunk_size_feed_forward"),
        kept("output_attentions"),
        kept("output_hidden_states"),
        kept("return_dict"),
    )


DEEPSPEC: tuple[Key, ...] = (
    *_top("Qwen3DSparkModel"),
    *(setting(name, name, read) for name, read in HEAD_KEYS.items()),
    setting("mask_token_id", "mask_token_id", integer),
    _layer_ids("target_layer_ids"),
    *layer_table(),
)
"""DeepSpec, and what vLLM and sglang-jax call Qwen3DSparkModel."""

NESTED: tuple[Key, ...] = (
    setting("dflash_config.mask_token_id", "mask_token_id", integer),
    _layer_ids("dflash_config.target_layer_ids"),
    setting("mask_token_id", "mask_token_id", integer, needed=False, fresh=False),
    _layer_ids("target_layer_ids", needed=False, fresh=False),
    setting("dflash_config.block_size", "block_size", integer, needed=False, fresh=False),
    setting(
        *("dflash_config.sample_from_anchor", "sample_from_anchor", boolean),
        needed=False,
        fresh=False,
    ),
    _causality("dflash_config.causal"),
    derived(
        "dflash_config.attention_mode",
        lambda said: NOTHING,
        lambda found, said: (
            found == "gqa"
            or (found == "mha")
            and said.config.num_key_value_heads == said.config.num_attention_heads
        ),
    ),
    kept("dflash_config.confidence_head_alpha"),
)

SPECFORGE: tuple[Key, ...] = (
    *_top("DSparkDraftModel"),
    *NESTED,
    derived("dflash_config.projector_type", lambda said: "dspark"),
    *(setting(f"dflash_config.{name}", name, read) for name, read in HEAD_KEYS.items()),
    *(
        setting(f"dspark_config.{name}", name, read, needed=False, fresh=False)
        for name, read in HEAD_KEYS.items()
    ),
    # vLLM looks for these at the top only.
    *(setting(name, name, read, needed=False) for name, read in HEAD_KEYS.items()),
    *layer_table(rope_parameters=False),
)
"""SpecForge's DSpark drafts, with their settings under dflash_config or dspark_config."""

DFLASH: tuple[Key, ...] = (
    *_top("DFlashDraftModel"),
    *NESTED,
    derived(
        "dflash_config.projector_type", lambda said: NOTHING, lambda found, said: found == "dflash"
    ),
    *layer_table(rope_parameters=False),
)
"""DFlash drafts of z-lab and SpecForge: a draft without heads, in the 1+N layout."""


def completed(described: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Gathered settings with what these formats mean by an absent key."""
    dflash = "DFlashDraftModel" in (described.get("architectures") or [])
    absent = {
        "draft_vocab_size": settings.get("vocab_size"),
        "sample_from_anchor": not dflash,
        **(NO_HEADS if dflash else {}),
    }
    # DeepSpec says nothing about a head that a draft does not have.
    if settings.get("markov_rank") == 0:
        absent["markov_head_type"] = "vanilla"
    if settings.get("enable_confidence_head") is False:
        absent["confidence_head_with_markov"] = False
    causal, nested = described.get("is_causal"), described.get("dflash_config")
    if causal is None and isinstance(nested, Mapping):
        causal = nested.get("causal")
    return {**absent, "sliding_window_non_causal": causal is False, **settings}
