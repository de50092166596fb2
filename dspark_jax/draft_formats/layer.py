"""The keys that describe a draft's layers, which every format takes from transformers' Qwen3."""

from typing import Any

from dspark_jax.config import DraftConfig
from dspark_jax.draft_formats.keys import (
    NOTHING,
    Described,
    Key,
    constant,
    derived,
    integer,
    kept,
    number,
    one_of,
    optional,
    setting,
    several,
    size,
    text,
)

LAYER_KEYS = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
"""Keys that DraftConfig calls the same."""


def layer_table(prefix: str = "", rope_parameters: bool = True) -> tuple[Key, ...]:
    """The rows below a prefix; transformers 5's `rope_parameters` are written, or 4's `rope_theta`.

    Both are read.
    """
    names = [(name, number if name == "rms_norm_eps" else size) for name in LAYER_KEYS]
    new, old = rope_parameters, not rope_parameters
    return (
        *(setting(prefix + name, name, read) for name, read in names),
        setting(f"{prefix}rope_parameters.rope_theta", "rope_theta", number, fresh=new),
        derived_rope(f"{prefix}rope_parameters.rope_type", "default", new),
        setting(f"{prefix}rope_theta", "rope_theta", number, needed=False, fresh=old),
        derived_rope(f"{prefix}rope_scaling", None, old),
        Key(
            f"{prefix}layer_types",
            lambda said: list(said.config.layer_types),
            lambda found, said: (
                tuple(found or ()) in ((), said.config.layer_types)
                and (bool(found) or not sliding(said.config))
            ),
            "layer_types",
            lambda value: optional(several(one_of(*TYPES)))(value) or NOTHING,
        ),
        Key(
            f"{prefix}sliding_window",
            lambda said: said.config.sliding_window if sliding(said.config) else None,
            lambda found, said: not sliding(said.config) or found == said.config.sliding_window,
            "sliding_window",
            optional(integer, NOTHING),
        ),
        derived(f"{prefix}use_sliding_window", lambda said: sliding(said.config)),
        constant(f"{prefix}attention_bias", False),
        constant(f"{prefix}hidden_act", "silu"),
        constant(f"{prefix}model_type", "qwen3"),
        derived(f"{prefix}attention_dropout", lambda said: 0.0),
        kept(f"{prefix}initializer_range", 0.02),
        kept(f"{prefix}max_window_layers", 28),  # transformers' default; layer_types overrides it
        kept(f"{prefix}tie_word_embeddings", False),  # a draft's tables are its target's
        kept(f"{prefix}use_cache", True),
        *(kept(prefix + name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")),
        *(kept(prefix + name) for name in ("dtype", "torch_dtype") if prefix),
        *(kept(prefix + name) for name in ("architectures", "transformers_version") if prefix),
        *(kept(prefix + name) for name in ("_name_or_path", "_attn_implementation")),
    )


DTYPE = Key("dtype", lambda said: said.dtype, lambda found, said: True, "dtype", optional(text))
"""The type of the tensors; trainers get it wrong, and readers take the tensors' own."""
TYPES = ("full_attention", "sliding_attention")


def sliding(config: DraftConfig) -> bool:
    """Whether any layer has a window."""
    return "sliding_attention" in config.layer_types


def derived_rope(path: str, value: Any, fresh: bool) -> Key:
    """The kind of rotary positions; only the default one is built here."""

    def plain(found: Any, said: Described) -> bool:
        kind = found.get("rope_type", found.get("type")) if isinstance(found, dict) else found
        return kind in (None, "default")

    return Key(path, lambda said: value if fresh else NOTHING, plain, strict_only=False)
