"""The speculators format (0.9.0 and before): DSpark drafts, and DFlash ones as a start."""

from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.config import DraftConfig
from dspark_jax.draft_formats.keys import (
    NOTHING,
    Described,
    Key,
    boolean,
    check_needed,
    derived,
    described_by,
    gather,
    integer,
    kept,
    misfits,
    one_of,
    optional,
    setting,
    several,
    text,
    write,
)
from dspark_jax.draft_formats.layer import DTYPE, layer_table

LAYER = "transformer_layer_config."
METHODS = "speculators_config.proposal_methods"
SHARED_KEYS = (
    "block_size",
    "confidence_head_with_markov",
    "draft_vocab_size",
    "enable_confidence_head",
    "markov_head_type",
    "markov_rank",
    "mask_token_id",
    "sample_from_anchor",
    "sliding_window_non_causal",
    "target_hidden_size",
)
"""Keys of config.json that DraftConfig calls the same."""
RECIPE = (
    *("num_anchors", "ce_loss_alpha", "l1_loss_alpha", "confidence_head_alpha", "loss_decay_gamma"),
    *("auf", "pure_draft_prefix_len", "emb_dim", "gru_hidden_dim"),
    *("lambda_base_start", "lambda_base_decay_ratio"),
)
"""How older trainers taught a draft; nothing of what it computes."""
NO_HEADS = {
    "markov_rank": 0,
    "markov_head_type": "vanilla",
    "enable_confidence_head": False,
    "confidence_head_with_markov": False,
}
"""What a DFlash draft has of DSpark's heads."""


def proposals(said: Described) -> list[dict[str, Any]]:
    """How many tokens a round drafts: block_size of them, or one fewer in the 1+N layout."""
    greedy = {"proposal_type": "greedy", "speculative_tokens": said.config.draft_length}
    return [greedy | {"accept_tolerance": 0.0, "verifier_accept_k": 1}]


def _same_length(found: Any, said: Described) -> bool:
    listed = isinstance(found, list) and all(isinstance(one, dict) for one in found)
    return listed and all(
        one.get("speculative_tokens") == said.config.draft_length for one in found
    )


def _shared(name: str) -> Key:
    if name == "markov_head_type":
        return setting(name, name, one_of("vanilla", "gated", "rnn"))
    if name == "target_hidden_size":
        return setting(name, name, optional(integer), needed=False)
    flags = ("confidence_head_with_markov", "enable_confidence_head", "sample_from_anchor")
    flag = name in (*flags, "sliding_window_non_causal")
    return setting(name, name, boolean if flag else integer)


TABLE: tuple[Key, ...] = (
    *(_shared(name) for name in SHARED_KEYS),
    setting("aux_hidden_state_layer_ids", "aux_layer_ids", several(integer), list),
    *layer_table(LAYER),
    kept("architectures", ["DSparkDraftModel"]),
    DTYPE,
    derived("speculators_config.algorithm", lambda said: "dspark"),
    kept("speculators_config.default_proposal_method", "greedy"),
    derived(METHODS, proposals, _same_length),
    setting(
        "speculators_config.verifier.architectures",
        "target_architectures",
        lambda value: optional(several(text))(value) or (),
        list,
        needed=False,
    ),
    setting(
        "speculators_config.verifier.name_or_path", "target_name", optional(text), needed=False
    ),
    derived("speculators_model_type", lambda said: "dspark"),
    kept("speculators_version", "0.9.0"),
    kept("tie_word_embeddings", False),
    kept("auto_map"),
    kept("transformers_version"),
    kept("torch_dtype"),
    setting(
        "target_sha256",
        "target_sha256",
        optional(text),
        lambda value: NOTHING if value is None else value,
        needed=False,
    ),
    *(kept(name) for name in RECIPE),
    derived("shift_label", lambda said: NOTHING, lambda found, said: not found),
    derived("projector_type", lambda said: NOTHING, lambda found, said: found == "dflash"),
    derived("use_aux_hidden_state", lambda said: NOTHING, lambda found, said: found is True),
)
"""Every key of a DSpark draft in this format."""


def config_to_json(
    config: DraftConfig, target_name: str, target_architectures: Sequence[str], dtype: str
) -> dict[str, Any]:
    """The speculators config.json of a draft, with every key explicit.

    Readers disagree on absent keys (vLLM takes a missing sample_from_anchor for false, speculators
    for true). `target_name` is the target's hub id; vLLM's one-argument serve refuses a path.
    """
    return write(TABLE, Described(config, target_name, tuple(target_architectures), None, dtype))


def config_from_json(described: Mapping[str, Any]) -> DraftConfig:
    """The settings in a speculators config.json; ValueError for what this drafter is not.

    Keys that are not understood are passed over; `formats.read` refuses them.
    """
    settings = gather(TABLE, described)
    check_needed(TABLE, settings)
    said = described_by(settings)
    if wrong := misfits(TABLE, described, said, strict=False):
        raise ValueError(f"config.json has {'; '.join(wrong)}: drafts here are built that way.")
    return said.config


def completed(described: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config.json with what older writers and DFlash leave out, and a line for every guess made.

    The layout is not guessed: without sample_from_anchor, the drafts per round have to tell it.
    """
    result, notes = dict(described), []
    dflash = described.get("speculators_model_type") == "dflash"
    result.setdefault("sliding_window_non_causal", False)
    if dflash:
        result = {**NO_HEADS, **result}
    if "sample_from_anchor" not in described:
        result["sample_from_anchor"] = _layout(described, dflash)
        notes.append(
            f"sample_from_anchor is not written; the drafts per round say it is "
            f"{str(result['sample_from_anchor']).lower()}"
        )
    return result, notes


def _drafted(about: Any) -> Any:
    methods = about.get("proposal_methods") if isinstance(about, Mapping) else None
    first = methods[0] if isinstance(methods, list) and methods else None
    return first.get("speculative_tokens") if isinstance(first, Mapping) else None


def _layout(described: Mapping[str, Any], dflash: bool) -> bool:
    tokens, block = _drafted(described.get("speculators_config")), described.get("block_size")
    if type(block) is int and tokens in (block, block - 1):
        return tokens == block
    if dflash:
        return False
    raise ValueError(
        f"config.json lacks sample_from_anchor, and speculative_tokens {tokens} of block_size "
        f"{block} does not tell the layout either; add it: true where slot k predicts the token "
        "after it, false where it predicts its own."
    )
