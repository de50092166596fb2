"""Plain decoding by transformers' own `generate`, as a yardstick where torch is installed."""

import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.fingerprint import RECORD
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.target_folder import read_json

LARGEST_BYTES = 2_000_000_000
"""In float32; a larger target would fill the host's memory and take hours."""


def measure_transformers(
    folder: Path, prompts: Sequence[np.ndarray], max_tokens: int, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """As `generate_speed`; None without torch, and `say` why where it cannot be timed."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        reason = obstacle(folder)
        if reason is None:
            return generate_speed(folder, prompts, max_tokens)
    except Exception as error:  # whatever fails in others' code, the run is finished
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    say(f"transformers' generate is not timed: {reason.rstrip('.')}.")
    return None


def obstacle(folder: Path) -> str | None:
    """Why transformers would not read a target's files in float32 on this machine, if so."""
    if (folder / RECORD).is_file():
        return f"{folder} holds Orbax arrays, not safetensors"
    if quantisation(read_json(folder / "config.json", "target")) is not None:
        return f"{folder} is quantised"
    size = 4 * sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    if size > LARGEST_BYTES:
        return f"{folder} takes {size:,} bytes in float32, more than {LARGEST_BYTES:,}"
    return None


def generate_speed(folder: Path, prompts: Sequence[np.ndarray], max_tokens: int) -> dict[str, Any]:
    """Greedy tokens per second of `generate` on the target's files.

    Float32 as ours, one prompt at a time, one untimed prompt first.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=False
    )

    def answer(prompt: np.ndarray) -> int:
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        return out.shape[1] - ids.shape[1]

    answer(prompts[0])
    start = time.perf_counter()
    tokens = sum(answer(prompt) for prompt in prompts)
    return {
        "tokens_per_second": tokens / (time.perf_counter() - start),
        "tokens": tokens,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
