"""Writes tests/golden/draft with PyTorch: one training step of tiny drafts, all arrays kept.

    pip install torch==2.13.0 transformers==5.19.0 speculators==0.9.0   # CPU builds are enough
    python tests/golden/make_draft.py

Each folder gets fixture.npz (in/ inputs, w/ weights, mid/ intermediates, out/ metric/ grad/ of the
step) and checkpoint/, the draft as speculators exports it. Fewer positions can start a block than
blocks are asked for, so that unused blocks are covered too.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import speculators.models.dflash.core as dflash
import speculators.models.dspark.core as dspark
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent / "draft"
VOCAB, HIDDEN, AUX_LAYERS, BLOCK, BLOCKS, ROW = 40, 24, [0, 2, 5], 3, 16, 30
DOCUMENTS = (13, 11)
"""Lengths of the packed documents; the rest of the row is padding."""
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=28,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)
VARIANTS: dict[str, dict[str, Any]] = {
    "small_vanilla": dict(markov_head_type="vanilla", sample_from_anchor=True, draft_vocab_size=29),
    "small_rnn": dict(markov_head_type="rnn", sample_from_anchor=False, draft_vocab_size=VOCAB),
}
FULL = dict(markov_head_type="vanilla", sample_from_anchor=True, draft_vocab_size=VOCAB)
LOSSES: dict[str, dict[str, Any]] = {
    **{f"loss_{name}": {"loss_fn": name} for name in ("rkl", "jsd", "nla", "lk_hybrid")},
    "loss_mixed": {"loss_fn": '{"ce": 0.2, "kl_div": 0.3, "tv": 0.5}'},
    "dpace": {"loss_fn": "ce", "per_position_loss_weight": "dpace", "dpace_alpha": 0.5},
}
"""Variants of the full vocabulary that differ in their loss."""
VARIANTS |= {name: FULL for name in LOSSES}
Arrays = dict[str, torch.Tensor]


def main() -> None:
    with tempfile.TemporaryDirectory() as target:
        save_target(target)
        for seed, (name, options) in enumerate(VARIANTS.items()):
            torch.manual_seed(seed)
            model = build_draft(target, options)
            arrays = record_step(model, make_inputs(), LOSSES.get(name, {}))
            folder = HERE / name
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / "fixture.npz", **{k: v.numpy() for k, v in arrays.items()})
            export(model, folder / "checkpoint")
            print(f"{folder}: {len(arrays)} arrays, loss {arrays['out/loss'].item():.6f}")


def save_target(folder: str) -> None:
    """A random target: speculators reads embeddings, final norm and head from its files."""
    torch.manual_seed(99)
    target = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=5, **SIZES))
    with torch.no_grad():
        target.model.norm.weight.uniform_(0.5, 1.5)
        target.lm_head.weight.normal_(std=0.4)  # peaked enough that its argmax is no tie
    target.save_pretrained(folder)


def build_draft(target: str, options: dict[str, Any]) -> torch.nn.Module:
    """A draft with one sliding and one full layer, weights drawn wide enough to matter."""
    layers = Qwen3Config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=4,
        **SIZES,
    )
    chosen = torch.randperm(VOCAB)[: options["draft_vocab_size"]].sort().values
    reduced = len(chosen) < VOCAB
    model = dspark.DSparkDraftModel.from_training_args(
        verifier_config=layers,
        verifier_name_or_path=target,
        target_layer_ids=AUX_LAYERS,
        block_size=BLOCK,
        mask_token_id=VOCAB - 2,
        markov_rank=6,
        draft_attn_impl="eager",
        t2d=torch.isin(torch.arange(VOCAB), chosen) if reduced else None,
        d2t=chosen - torch.arange(len(chosen)) if reduced else None,
        **options,
    )
    with torch.no_grad():
        for parameter in trained(model).values():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
            else:
                parameter.normal_(std=0.2)
    return model.eval()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_inputs() -> Arrays:
    """A packed row: positions restart per document, padding has document -1."""
    pads = ROW - sum(DOCUMENTS)
    parts = [*enumerate(DOCUMENTS), (-1, pads)]
    prompt = [torch.arange(n) < 5 for n in DOCUMENTS]
    is_text = torch.arange(ROW) < sum(DOCUMENTS)
    return {
        "input_ids": torch.randint(VOCAB - 2, (1, ROW)) * is_text,
        "hidden_states": torch.randn(1, ROW, len(AUX_LAYERS) * HIDDEN) * is_text[:, None],
        "verifier_last_hidden_states": torch.randn(1, ROW, HIDDEN) * is_text[:, None],
        "loss_mask": torch.cat([*(~p for p in prompt), torch.zeros(pads, dtype=torch.bool)])[None],
        "document_ids": torch.cat([torch.full((n,), i) for i, n in parts])[None],
        "position_ids": torch.cat([torch.arange(n) * (i >= 0) for i, n in parts])[None],
    }


def record_step(model: torch.nn.Module, inputs: Arrays, loss: dict[str, Any]) -> Arrays:
    """Forward and backward with every intermediate the parity test asks for."""
    mid: Arrays = {}
    watch(model, mid)
    settings, _ = model.get_trainer_kwargs(
        **{"loss_fn": '{"ce": 0.1, "tv": 0.9}', "loss_implementation": "eager"} | loss,
        max_anchors=BLOCKS,
    )
    _, loss, metrics = model(**inputs, **settings)
    loss.backward()
    groups = {
        "in": inputs,
        "w": {k: v for k, v in model.state_dict().items() if v is not None},
        "mid": mid,
        "out": {"loss": loss},
        "metric": metrics,
        "grad": {name: p.grad for name, p in trained(model).items()},
    }
    return {f"{g}/{k}": v.detach().clone() for g, group in groups.items() for k, v in group.items()}


def watch(model: torch.nn.Module, mid: Arrays) -> None:
    """Note what speculators' own functions and modules pass on while the model runs."""

    def note(*names: str) -> Callable[..., None]:
        def keep(_: Any, result: Any) -> None:
            results = result if isinstance(result, tuple) else (result,)
            mid.update({n: r.detach().clone() for n, r in zip(names, results, strict=True)})

        return keep

    def note_mask(_: Any, mask: torch.Tensor) -> None:
        mid[f"attn_mask_{sum(name.startswith('attn_mask') for name in mid)}"] = mask.float()

    def note_logits(args: Any, _: Any) -> None:
        mid["corrected_logits"] = args[0].detach().clone()

    spy(dflash, "select_anchors", note("anchor_positions", "anchor_valid"))
    spy(dspark, "compute_metrics", note_logits)
    spy(model, "_create_mask_fn", note_mask)
    names = ("hidden", "base_logits", "targets", "aligned_loss_mask", "anchored_block_indices")
    spy(model, "_backbone_forward", note(*names))
    spy(model.hidden_norm, "forward", note("ctx_after_fc_hidden_norm"))
    spy(model.rotary_emb, "forward", note("rope_cos", "rope_sin"))
    spy(model.confidence_head, "forward", note("confidence_logits"))
    for i, layer in enumerate(model.layers):
        spy(layer, "forward", note(f"layer{i}_out"))


def spy(owner: Any, name: str, keep: Callable[[Any, Any], None]) -> None:
    """Replace a function by one that also hands its arguments and result to `keep`."""
    original = getattr(owner, name)
    original = getattr(original, "spied_on", original)

    @functools.wraps(original)
    def spied(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        keep(args, result)
        return result

    spied.spied_on = original
    setattr(owner, name, spied)


def export(model: torch.nn.Module, folder: Path) -> None:
    """What speculators saves, in bfloat16, with a name in place of the temporary target's path."""
    state = {k: v for k, v in model.state_dict().items() if v is not None}
    halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    model.save_pretrained(folder, state_dict=halved)
    (folder / "config.py").unlink(missing_ok=True)  # speculators' own source
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = "dspark-jax/random-target"
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
