"""Writes paper_loss.npz and optimizer_step.npz into tests/golden/draft/loss_jsd with PyTorch.

    pip install torch==2.13.0 transformers==5.19.0 speculators==0.9.0   # CPU builds are enough
    python tests/golden/make_draft.py && python tests/golden/make_training.py

paper_loss.npz: DeepSpec's loss (decay 4, ce 0.1, L1 0.9, confidence 1) on the arrays of the
fixture, and its gradients. optimizer_step.npz: every trained weight after one clipped step
of AdamW (`adamw/`) and of Muon with AdamW for the rest (`muon/`), from the fixture's gradients.
"""

from pathlib import Path

import numpy as np
import torch
from speculators.train.optimizers import split_named_params_for_muon
from torch.nn import functional

FOLDER = Path(__file__).parent / "draft" / "loss_jsd"
"""Muon rounds to bfloat16 between products: where a sum lies halfway, the order of adding decides,
and one matrix in about twenty ends 1e-5 elsewhere. In this variant none does."""
BLOCK, DECAY = 3, 4.0
RATE = 1e-3


def main() -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "fixture.npz").items()}
    save("paper_loss", paper_loss(arrays))
    steps = [optimizer_step(arrays, kind) for kind in ("adamw", "muon")]
    save("optimizer_step", steps[0] | steps[1])


def save(name: str, arrays: dict[str, torch.Tensor]) -> None:
    found = {k: v.detach().numpy() for k, v in arrays.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", **found)
    print(name, len(found))


def paper_loss(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    logits = arrays["mid/corrected_logits"].requires_grad_()
    confidence = arrays["mid/confidence_logits"].reshape(1, -1).requires_grad_()
    p, q = arrays["mid/targets"].softmax(-1), logits.softmax(-1)
    tokens, trained = arrays["in/input_ids"][0], arrays["in/loss_mask"][0]
    after = arrays["mid/anchored_block_indices"] + 1
    inside = after < len(tokens)
    after = after.clamp(max=len(tokens) - 1)
    valid = arrays["mid/anchor_valid"].repeat_interleave(BLOCK)
    reached = (inside & trained[after] & valid).view(-1, BLOCK)
    mask = reached.long().cumprod(-1).view(1, -1).float()
    weight = mask * torch.exp(-(torch.arange(logits.shape[1]) % BLOCK) / DECAY)

    def mean(value: torch.Tensor) -> torch.Tensor:
        return (value * weight).sum() / (weight.sum() + 1e-6)

    distance = (q - p).abs().sum(-1)
    rate = (1 - distance / 2).detach().clamp(0, 1)
    ce = mean(functional.cross_entropy(logits[0], tokens[after], reduction="none")[None])
    l1 = mean(distance)
    bce = mean(functional.binary_cross_entropy_with_logits(confidence, rate, reduction="none"))
    total = 0.1 * ce + 0.9 * l1 + bce
    total.backward()
    assert logits.grad is not None and confidence.grad is not None
    values = {"eval_mask": mask, "labels": tokens[after], "ce": ce, "l1": l1, "confidence": bce}
    gradients = {"corrected_logits": logits.grad, "confidence_logits": confidence.grad}
    return values | {"total": total} | {f"grad/{k}": v for k, v in gradients.items()}


class Weights(torch.nn.Module):
    """The trained weights of the fixture under their own names, with its gradients."""

    def __init__(self, arrays: dict[str, torch.Tensor]):
        super().__init__()
        self.names = [k.removeprefix("grad/") for k in arrays if k.startswith("grad/")]
        for i, name in enumerate(self.names):
            weight = torch.nn.Parameter(arrays[f"w/{name}"].clone())
            weight.grad = arrays[f"grad/{name}"].clone()
            self.register_parameter(f"p{i}", weight)

    def named_parameters(self, *_: object, **__: object):
        return ((name, getattr(self, f"p{i}")) for i, name in enumerate(self.names))


def optimizer_step(arrays: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    weights = Weights(arrays)
    everything = list(weights.named_parameters())
    torch.nn.utils.clip_grad_norm_([p for _, p in everything], 1.0)
    matrices, rest = ([], everything) if kind == "adamw" else split_named_params_for_muon(weights)
    torch.optim.AdamW([p for _, p in rest], lr=RATE, weight_decay=0.01).step()
    if matrices:
        torch.optim.Muon(
            [p for _, p in matrices],
            lr=RATE,
            momentum=0.95,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ).step()
    return {f"{kind}/{name}": p for name, p in weights.named_parameters()}


if __name__ == "__main__":
    main()
