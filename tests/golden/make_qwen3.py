"""Writes tests/golden/targets/qwen3_* with PyTorch: tiny Qwen3 models and what they compute.

    pip install torch==2.13.0 transformers==5.23.0   # CPU builds are enough
    python tests/golden/make_qwen3.py

The layout of golden.npz is that of the shared target fixtures; `test_qwen3.py` reads both.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    DynamicCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FOLDER = Path(__file__).parent / "targets"
BATCH, SEQ, PREFILL, VERIFY, PADS = 2, 22, 12, 6, 4
SIZES: dict[str, Any] = dict(
    vocab_size=59,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=3, moe_intermediate_size=12)
MODELS = {
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=True)),
    # Few experts all run, many run on their own rows; a dense layer stands among the sparse ones.
    "qwen3_moe_few": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=6, norm_topk_prob=False),
    ),
    "qwen3_moe_many": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES, **EXPERTS, num_experts=20, norm_topk_prob=True, mlp_only_layers=[1]
        ),
    ),
}
Arrays = dict[str, np.ndarray]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    for name, (kind, config) in MODELS.items():
        config._attn_implementation = "eager"
        model = kind(config).float().eval()
        draw_weights(model)
        ids = torch.randint(0, config.vocab_size, (BATCH, SEQ), generator=seeded(2))
        arrays = whole_pass(model, ids) | other_passes(model, ids)
        folder = FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "golden.npz", **arrays)
        save_file(published_tensors(model), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        print(f"{folder}: {len(arrays)} arrays")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_weights(model: Any) -> None:
    """Weights wide enough that every part of the model shows in its logits."""
    generator = seeded(1)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        wide = 1.5 / math.sqrt(weight.shape[-1])
        weight.copy_(1 + 0.3 * drawn if "norm" in name else drawn * wide)


def whole_pass(model: Any, ids: torch.Tensor) -> Arrays:
    """Logits, hidden states, every layer's output (the last before the norm), router decisions."""
    arrays: Arrays = {"input_ids": ids.numpy()}

    def keep_output(layer: int) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            arrays[f"layer{layer}.out"] = output.numpy()

        return hook

    def keep_choice(layer: int) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            logits, weight, expert = output
            found = {"router_logits": logits, "router_w": weight, "router_idx": expert}
            arrays.update({f"layer{layer}.{k}": v.numpy() for k, v in found.items()})

        return hook

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(keep_output(i)))
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(keep_choice(i)))
    output = model(ids, output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    states = {f"hf_hidden_states.{i}": h.numpy() for i, h in enumerate(output.hidden_states)}
    raw = model(ids, use_cache=False).logits
    assert torch.equal(raw, output.logits)
    logits = torch.from_numpy(arrays[f"layer{model.config.num_hidden_layers - 1}.out"])
    assert torch.equal(model.lm_head(model.model.norm(logits)), output.logits)
    return arrays | states | {"logits": output.logits.numpy()}


def other_passes(model: Any, ids: torch.Tensor) -> Arrays:
    """Logits through a cache in chunks, and with padding on the left of the first row."""
    cache, verified = DynamicCache(config=model.config), PREFILL + VERIFY
    ends = [0, PREFILL, verified, *range(verified + 1, SEQ + 1)]
    chunks = [
        model(ids[:, start:end], past_key_values=cache, use_cache=True).logits
        for start, end in zip(ends[:-1], ends[1:], strict=True)
    ]
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    return {
        "cached_logits": torch.cat(chunks, 1).numpy(),
        "prefill_len": np.array(PREFILL),
        "verify_len": np.array(VERIFY),
        "leftpad_mask": mask.numpy(),
        "leftpad_positions": position.numpy(),
        "leftpad_logits": padded.numpy(),
    }


def published_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors under the names of published checkpoints, every expert on its own."""
    tensors = {}
    for name, weight in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(weight):
                gate, up = both.chunk(2)
                tensors[f"{prefix}.{e}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}.{e}.up_proj.weight"] = up.clone()
        elif last == "down_proj" and prefix.endswith("experts"):
            tensors |= {f"{prefix}.{e}.down_proj.weight": w.clone() for e, w in enumerate(weight)}
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = weight.clone().contiguous()
    return tensors


if __name__ == "__main__":
    main()
