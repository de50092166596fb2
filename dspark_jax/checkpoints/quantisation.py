"""How a checkpoint's weights are quantised, as its config.json says."""

from collections.abc import Mapping
from typing import Any, Literal

BLOCK = [128, 128]
"""Rows and columns of a weight that share one scale."""
NEEDED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": (BLOCK,),
}
"""What each setting may be; None where it may be absent."""


def quantisation(config: Mapping[str, Any]) -> Literal["fp8"] | None:
    """What config.json's `quantization_config` asks for: nothing, or FP8 in 128x128 blocks.

    Raises ValueError, naming it, on any other quantisation.
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
    if not wrong:
        return "fp8"
    method = asked.get("quant_method")
    if method != "fp8":
        # ModelOpt and compressed-tensors say what they really are in a second field.
        kinds = [method, asked.get("quant_algo"), asked.get("format")]
        what = " ".join(str(kind) for kind in kinds if kind)
        raise ValueError(
            f"quantisation {what or 'without quant_method'} is not supported; "
            "supported are bfloat16 weights and fp8 (e4m3) in blocks of 128 x 128."
        )
    told = ", ".join(f"{key} {value!r}" for key, value in wrong.items())
    raise ValueError(
        f"fp8 quantisation with {told} is not supported; "
        "supported are fmt 'e4m3', activation_scheme 'dynamic' and weight_block_size [128, 128]."
    )
