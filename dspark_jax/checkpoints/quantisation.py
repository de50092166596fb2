"""How a checkpoint's weights are quantised, as its config.json says."""

import re
from collections.abc import Mapping
from typing import Any

STORED_FP8 = re.compile(r"(?<!weights)_proj(_with_mqa)?\.weight$|\.(wq_b|wk)\.weight$")
"""Matrices that published FP8 checkpoints store in FP8; all else is bfloat16."""
NEEDED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
}
"""What each setting may be; None where it may be absent."""


def quantisation(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share one scale, None where weights are not quantised.

    That is FP8 (e4m3) with `weight_block_size`, 128 x 128 in published checkpoints. Raises
    ValueError, naming it, on any other quantisation.
    """
    asked = config.get("quantization_config")
    if not asked:
        return None
    if not isinstance(asked, Mapping):
        raise ValueError(
            f"quantization_config is {asked!r} in config.json, but an object is needed; "
            "use the model's own file."
        )
    wrong = {k: asked.get(k) for k, allowed in NEEDED.items() if asked.get(k) not in allowed}
    block = asked.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes):
        wrong["weight_block_size"] = block
    if not wrong:
        return sizes[0], sizes[1]
    method = asked.get("quant_method")
    if method != "fp8":
        # ModelOpt and compressed-tensors say what they really are in a second field.
        kinds = [method, asked.get("quant_algo"), asked.get("format")]
        what = " ".join(str(kind) for kind in kinds if kind)
        raise ValueError(
            f"quantisation {what or 'without quant_method'} is not supported; "
            "supported are bfloat16 weights and fp8 (e4m3) in blocks, as 128 x 128."
        )
    told = ", ".join(f"{key} {value!r}" for key, value in wrong.items())
    raise ValueError(
        f"fp8 quantisation with {told} is not supported; "
        "supported are fmt 'e4m3', activation_scheme 'dynamic' and a weight_block_size of two "
        "sizes, as [128, 128]."
    )
