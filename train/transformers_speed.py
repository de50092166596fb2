"""Plain decoding by transformers' own `generate`, as a yardstick where torch is installed."""

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def measure_transformers(
    folder: Path, prompts: Sequence[np.ndarray], max_tokens: int
) -> dict[str, Any] | None:
    """Greedy tokens per second of `generate` on the target's files; None without torch.

    Float32 as ours, one prompt at a time, one untimed prompt first.
    """
    if importlib.util.find_spec("torch") is None:
        return None
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
