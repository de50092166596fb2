"""Writes tests/golden/targets/glm_small with PyTorch: a tiny GLM and everything its layers compute.

    pip install torch==2.13.0 transformers==5.23.0   # CPU builds are enough
    python tests/golden/make_glm.py

The layout of golden.npz is that of the shared target fixtures; `test_glm.py` reads both. Seeds are
tried until no choice of keys or experts is nearly a tie, so that the chosen sets are well defined.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.models.glm_moe_dsa.modeling_glm_moe_dsa as modeling
from safetensors.torch import save_file
from transformers import DynamicCache, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

FOLDER = Path(__file__).parent / "targets" / "glm_small"
BATCH, SEQ, PREFILL, VERIFY, PADS = 3, 21, 11, 5, 4
SMALLEST_GAP = 1e-3
SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=56,
    moe_intermediate_size=12,
    num_hidden_layers=7,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_shared_experts=2,
    n_routed_experts=6,
    num_experts_per_tok=3,
    q_lora_rank=24,
    kv_lora_rank=14,
    qk_rope_head_dim=4,
    qk_nope_head_dim=10,
    v_head_dim=12,
    index_topk=5,
    index_head_dim=12,
    index_n_heads=5,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    max_position_embeddings=512,
    rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    # A dense layer, then a pair of layers three times over: our scan has something to stack.
    indexer_types=["full", "shared", "full", "shared", "full", "shared", "full"],
    mlp_layer_types=["dense"] + ["sparse"] * 6,
)
NOT_WRITTEN_BY_TRANSFORMERS = {
    "indexer_rope_interleave": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
Arrays = dict[str, torch.Tensor]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    config = GlmMoeDsaConfig(**SIZES)
    config._attn_implementation = "eager"
    model = GlmMoeDsaForCausalLM(config).float().eval()
    seed, gap, ids, arrays = first_without_ties(model)
    arrays |= other_passes(model, ids)
    arrays |= {"input_ids": ids, "weight_seed": torch.tensor(seed), "min_topk_gap": gap}
    FOLDER.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FOLDER / "golden.npz", **{k: v.numpy() for k, v in arrays.items()})
    save_file(published_tensors(model), FOLDER / "model.safetensors")
    described = config.to_dict() | NOT_WRITTEN_BY_TRANSFORMERS
    (FOLDER / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"{FOLDER}: {len(arrays)} arrays, seed {seed}, smallest gap {gap:.2e}")


def first_without_ties(model: Any) -> tuple[int, torch.Tensor, torch.Tensor, Arrays]:
    """(seed, smallest gap, tokens, arrays) of the first seed whose choices are all clear."""
    for seed in range(1000):
        draw_weights(model, seed)
        generator = torch.Generator().manual_seed(10_000 + seed)
        ids = torch.randint(model.config.vocab_size, (BATCH, SEQ), generator=generator)
        arrays = full_pass(model, ids)
        gap = smallest_gap(model, arrays)
        if gap > SMALLEST_GAP:
            return seed, gap, ids, arrays
    raise RuntimeError("every seed has a near tie")


def draw_weights(model: Any, seed: int) -> None:
    """Weights that keep activations near one, with norms and biases far from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        noise = torch.randn(state[name].shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.25 * noise
        elif name.endswith("bias"):
            noise = 0.25 * noise
        elif "embed_tokens" not in name:
            noise = noise * 1.4 / math.sqrt(noise.shape[-1])
        state[name].copy_(noise)


def full_pass(model: Any, ids: torch.Tensor) -> Arrays:
    """Logits, hidden states and what every layer computed, without a cache."""
    seen: Arrays = {}
    with watched(model, seen):
        output = model(ids, output_hidden_states=True, use_cache=False)
    hidden = {f"hf_hidden_states.{i}": h for i, h in enumerate(output.hidden_states)}
    return seen | hidden | {"logits": output.logits}


@contextmanager
def watched(model: Any, seen: Arrays) -> Iterator[None]:
    """Note the results of layers, attentions, MLPs, routers and indexers while inside."""

    def note(prefix: str, *names: str) -> Callable[..., None]:
        def keep(_: Any, __: Any, result: Any) -> None:
            results = result if isinstance(result, tuple) else (result,)
            pairs = zip(names, results, strict=True)
            seen.update({f"{prefix}.{n}": r.clone() for n, r in pairs if n})

        return keep

    handles = []
    for i, layer in enumerate(model.model.layers):
        add = {
            layer: ("out", "topk"),
            layer.self_attn: ("attn_out", "", ""),
            layer.mlp: ("mlp_out",),
        }
        if hasattr(layer.mlp, "gate"):
            add[layer.mlp.gate] = ("router_logits", "router_w", "router_idx")
        handles += [m.register_forward_hook(note(f"layer{i}", *names)) for m, names in add.items()]
    original = modeling.GlmMoeDsaIndexer.forward

    def indexer(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The scores are a local of the indexer; the last thing it does with them is this top-k.
        with scores_into(seen, f"layer{self.layer_idx}.index_scores"):
            return original(self, *args, **kwargs)

    modeling.GlmMoeDsaIndexer.forward = indexer
    try:
        yield
    finally:
        modeling.GlmMoeDsaIndexer.forward = original
        for handle in handles:
            handle.remove()


@contextmanager
def scores_into(seen: Arrays, name: str) -> Iterator[None]:
    """Keep the tensor on which `topk` is called while inside."""
    original = torch.Tensor.topk

    def topk(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[name] = self.clone()
        return original(self, *args, **kwargs)

    torch.Tensor.topk = topk
    try:
        yield
    finally:
        torch.Tensor.topk = original


def smallest_gap(model: Any, arrays: Arrays) -> torch.Tensor:
    """Smallest relative distance between the last chosen and the first not chosen, anywhere."""
    gaps = []
    for name, values in arrays.items():
        if name.endswith("index_scores"):
            k = model.config.index_topk
            gaps.append(gap_at(values[:, k:], k))  # earlier rows see no more than k keys
        elif name.endswith("router_logits"):
            layer = int(name.split(".")[0].removeprefix("layer"))
            bias = model.model.layers[layer].mlp.gate.e_score_correction_bias
            gaps.append(gap_at(values.sigmoid() + bias, model.config.num_experts_per_tok))
    return torch.stack(gaps).min()


def gap_at(values: torch.Tensor, k: int) -> torch.Tensor:
    best = values.sort(dim=-1, descending=True).values
    size = best[..., : k + 1].abs().amax(-1).clamp_min(1e-9)
    return ((best[..., k - 1] - best[..., k]) / size).min()


def other_passes(model: Any, ids: torch.Tensor) -> Arrays:
    """The same tokens with a cache, all keys, the other epsilon, and padding on the left."""
    layers = model.model.layers
    arrays = {
        "cached_logits": cached_pass(model, ids),
        "prefill_len": torch.tensor(PREFILL),
        "verify_len": torch.tensor(VERIFY),
    }
    indexers = [layer.self_attn.indexer for layer in layers if layer.self_attn.indexer]
    with changed(indexers, "index_topk", SEQ):
        arrays["dense_logits"] = model(ids, use_cache=False).logits
    attentions = [layer.self_attn for layer in layers]
    norms = [n for a in attentions for n in (a.q_a_layernorm, a.kv_a_layernorm)]
    with changed(norms, "variance_epsilon", 1e-5):
        arrays["logits_a_norm_eps_1e-5"] = model(ids, use_cache=False).logits
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits
    return arrays | {"leftpad_mask": mask, "leftpad_logits": padded}


def cached_pass(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A prefill, a chunk as verification runs it, then single tokens."""
    cache = DynamicCache(config=model.config)
    ends = [0, PREFILL, *range(PREFILL + VERIFY, SEQ + 1)]
    chunks = [ids[:, a:b] for a, b in zip(ends, ends[1:], strict=False)]
    logits = [model(c, past_key_values=cache, use_cache=True).logits for c in chunks]
    return torch.cat(logits, dim=1)


@contextmanager
def changed(modules: list[Any], name: str, value: Any) -> Iterator[None]:
    """Give an attribute of every module another value while inside."""
    before = [getattr(m, name) for m in modules]
    for module in modules:
        setattr(module, name, value)
    yield
    for module, old in zip(modules, before, strict=True):
        setattr(module, name, old)


def published_tensors(model: Any) -> Arrays:
    """The checkpoint's tensors: one per expert, where transformers keeps all in one."""
    tensors: Arrays = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{prefix}.{e}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}.{e}.up_proj.weight"] = up.clone()
        elif last == "down_proj":
            tensors |= {f"{prefix}.{e}.{last}.weight": w.clone() for e, w in enumerate(value)}
        else:
            tensors[name] = value.clone()
    return tensors


if __name__ == "__main__":
    main()
