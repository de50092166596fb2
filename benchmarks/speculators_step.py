"""Training steps of speculators 0.9.0 on what `train_step.py` wrote: the torch side, in a process.

    python benchmarks/speculators_step.py FOLDER --attention sdpa --steps 10

FOLDER holds draft/, verifier/ and batch.npz. Prints JSON: `seconds` of every step, the median
seconds of its `phases`, and the `loss` of the first step, which takes the anchors of batch.npz.
A step is what `speculators.train.trainer` does with a batch: forward, loss and metrics, backward,
clip, update; its own optimizers with its own defaults, no gradient checkpointing, nothing compiled.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false
# torch and speculators are in this benchmark's environment only.

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speculators.models.dflash import core
from speculators.models.dspark import DSparkDraftModel
from speculators.train.optimizers import build_optimizers
from speculators.train.trainer import TrainerConfig

WARMUP_STEPS = 3
PHASES = ("forward", "backward", "update")


def main() -> None:
    """Time the steps."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    arrays = np.load(given.folder / "batch.npz")
    step = make_step(load_draft(given.folder, given.attention), arrays, given.precision)
    loss, _ = with_anchors(arrays["anchor"], step)
    runs = [step()[1] for _ in range(WARMUP_STEPS + given.steps)][WARMUP_STEPS:]
    phases = {p: statistics.median(run[p] for run in runs) for p in PHASES}
    seconds = [sum(run.values()) for run in runs]
    print(json.dumps({"seconds": seconds, "loss": loss, "phases": phases}))


def load_draft(folder: Path, attention: str) -> DSparkDraftModel:
    """The draft with float32 weights, as `speculators train --from-pretrained` loads it."""
    config = DSparkDraftModel.config_class.from_pretrained(folder / "draft")
    config.transformer_layer_config._attn_implementation = attention
    draft = DSparkDraftModel.from_pretrained(folder / "draft", config=config, dtype=torch.float32)
    return draft.train()


def make_step(
    draft: DSparkDraftModel, arrays: Any, precision: str
) -> Callable[[], tuple[float, dict[str, float]]]:
    """`step() -> (loss, seconds per phase)`; bfloat16 is autocast over float32 weights."""
    dtype = getattr(torch, precision)
    batch = {
        "hidden_states": torch.from_numpy(arrays["aux_hidden"]).to(dtype),
        "verifier_last_hidden_states": torch.from_numpy(arrays["final_hidden"]).to(dtype),
        "input_ids": torch.from_numpy(arrays["tokens"]).long(),
        "loss_mask": torch.from_numpy(arrays["loss_mask"]),
        "document_ids": torch.from_numpy(arrays["document"]).long(),
        "position_ids": torch.from_numpy(arrays["position"]).long(),
    }
    options, _ = draft.get_trainer_kwargs(
        loss_fn='{"ce": 0.1, "tv": 0.9}',
        loss_implementation="eager",  # the fused one needs Triton
        dflash_decay_gamma=4.0,
        max_anchors=arrays["anchor"].size,
        confidence_head_alpha=1.0,
    )
    settings = TrainerConfig(1e-3, 1, "", optimizer="muon", weight_decay=0.01, muon_lr=1e-3)
    optimizers = build_optimizers(draft, settings)

    def step() -> tuple[float, dict[str, float]]:
        ticks = [time.perf_counter()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            _, loss, _ = draft(**batch, **options)
        ticks.append(time.perf_counter())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        ticks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ticks.append(time.perf_counter())
        spent = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
        return loss.item(), dict(zip(PHASES, spent, strict=True))

    return step


def with_anchors(anchor: np.ndarray, step: Callable[[], Any]) -> Any:
    """One step on these anchors instead of drawn ones."""
    draw = core.select_anchors
    chosen = torch.from_numpy(anchor[0]).long()
    core.select_anchors = lambda *_: (chosen, torch.ones_like(chosen, dtype=torch.bool))
    try:
        return step()
    finally:
        core.select_anchors = draw


if __name__ == "__main__":
    main()
