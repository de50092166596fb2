"""Writes tests/golden/targets/glm_small with PyTorch: a tiny GLM and everything its layers compute.

    pip install torch==2.13.0 transformers==5.23.0   # CPU builds are enough
    python tests/golden/make_glm.py
    python tests/golden/make_glm.py --fp8            # glm_small_fp8, which 5.19.0 made

The layout of golden.npz is that of the shared target fixtures; `test_glm.py` reads both, and
`test_fp8.py` the FP8 ones. Seeds are tried until no choice of keys or experts is nearly a tie, so
that the chosen sets are well defined.
"""

import argparse
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

TARGETS = Path(__file__).parent / "targets"
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
BLOCK = (16, 9)
"""Of the FP8 weights [out, in]: unequal sides, and hardly a size that they divide."""
QUANTISED = ("_proj.weight", "_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
ONE_LINEAR = "model.layers.0.self_attn.q_b_proj"
LARGEST_FP8 = 448.0
Arrays = dict[str, torch.Tensor]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fp8", action="store_true", help="write glm_small_fp8 instead")
    torch.set_num_threads(1)
    config = GlmMoeDsaConfig(**SIZES)
    config._attn_implementation = "eager"
    model = GlmMoeDsaForCausalLM(config).float().eval()
    write_fp8(model) if parser.parse_args().fp8 else write_plain(model)


def write_plain(model: Any) -> None:
    """The weights in float32 and what every kind of pass computes with them."""
    ids, arrays = first_without_ties(model, draw_weights)
    arrays |= other_passes(model, ids)
    write("glm_small", "", arrays, published_tensors(model), config_of(model))


def write_fp8(model: Any) -> None:
    """The weights in FP8 and what a pass over plain activations computes with them (W8A16)."""
    _, arrays = first_without_ties(model, draw_fp8)
    tensors = draw_fp8(model, int(arrays["weight_seed"]))
    layers = {f"w8a16.{n}": arrays.pop(n) for n in list(arrays) if n.startswith(("layer", "hf_"))}
    arrays |= {"logits_w8a16": arrays.pop("logits")} | layers | one_linear(tensors)
    config = config_of(model) | {"quantization_config": QUANTISATION}
    write("glm_small_fp8", "_fp8", arrays, tensors, config)


def config_of(model: Any) -> dict[str, Any]:
    """What config.json says."""
    return model.config.to_dict() | NOT_WRITTEN_BY_TRANSFORMERS


def write(
    name: str, suffix: str, arrays: dict[str, Any], tensors: Arrays, described: dict[str, Any]
) -> None:
    """One folder: golden.npz, model.safetensors, config.json."""
    folder = TARGETS / name
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"golden{suffix}.npz", **{k: np.asarray(v) for k, v in arrays.items()}
    )
    save_file(tensors, folder / f"model{suffix}.safetensors")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    seed, gap = arrays["weight_seed"].item(), arrays["min_topk_gap"].item()
    print(f"{folder}: {len(arrays)} arrays, seed {seed}, smallest gap {gap:.2e}")


def first_without_ties(model: Any, draw: Callable[[Any, int], Any]) -> tuple[torch.Tensor, Arrays]:
    """(tokens, arrays) of the first seed whose choices are all clear; `draw` sets the weights."""
    for seed in range(1000):
        draw(model, seed)
        generator = torch.Generator().manual_seed(10_000 + seed)
        ids = torch.randint(model.config.vocab_size, (BATCH, SEQ), generator=generator)
        arrays = full_pass(model, ids)
        gap = smallest_gap(model, arrays)
        if gap > SMALLEST_GAP:
            about = {"input_ids": ids, "weight_seed": torch.tensor(seed), "min_topk_gap": gap}
            return ids, arrays | about
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


def draw_fp8(model: Any, seed: int) -> Arrays:
    """The checkpoint in FP8 of such weights; the model gets the numbers that are left of them."""
    draw_weights(model, seed)
    tensors: Arrays = {}
    for name, weight in published_views(model):
        if name.endswith(QUANTISED) and "weights_proj" not in name:
            values, scales = quantise(weight, BLOCK)
            tensors |= {name: values, f"{name}_scale_inv": scales}
            weight.copy_(dequantise(values, scales, BLOCK))
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = weight.clone()
        else:
            tensors[name] = weight.bfloat16()
            weight.copy_(tensors[name])
    return tensors


def quantise(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, float32 scales): every block's largest magnitude becomes 448."""
    size = [-(-n // b) for n, b in zip(x.shape, block, strict=True)]
    scales = torch.empty(size)
    for i in range(size[0]):
        for j in range(size[1]):
            scales[i, j] = x[part(i, block[0]), part(j, block[1])].abs().max() / LARGEST_FP8
    ratio = x / spread(scales, x.shape, block)
    return ratio.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scales


def part(i: int, length: int) -> slice:
    return slice(i * length, (i + 1) * length)


def dequantise(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return values.float() * spread(scales, values.shape, block)


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Every element's scale."""
    row, column = (torch.arange(n) // b for n, b in zip(shape, block, strict=True))
    return scales[row[:, None], column]


def one_linear(tensors: Arrays) -> dict[str, Any]:
    """A product of which both sides are in FP8 (W8A8).

    One alone: a last bit of one activation soon sends another one to another expert.
    """
    weight, scales = tensors[f"{ONE_LINEAR}.weight"], tensors[f"{ONE_LINEAR}.weight_scale_inv"]
    x = 2 * torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(77))
    x[3, 5], x[4] = 50.0, 0.0
    group = (1, BLOCK[1])
    scale = quantise(x.abs().clamp_min(1e-10), group)[1]
    rounded = (x / spread(scale, x.shape, group)).to(torch.float8_e4m3fn)
    y = dequantise(rounded, scale, group) @ dequantise(weight, scales, BLOCK).T
    return {"lin_name": ONE_LINEAR, "lin_x": x, "lin_y_w8a8": y}


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
    """The checkpoint's tensors."""
    return {name: view.clone() for name, view in published_views(model)}


def published_views(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors in the model's memory: one per expert, where it keeps all in one."""
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                yield f"{prefix}.{e}.gate_proj.weight", gate
                yield f"{prefix}.{e}.up_proj.weight", up
        elif last == "down_proj":
            yield from ((f"{prefix}.{e}.{last}.weight", w) for e, w in enumerate(value))
        else:
            yield name, value


if __name__ == "__main__":
    main()
