"""transformers itself reads the embedded target and computes the same, where torch is installed."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import GlmConfig
from dspark_jax.target_folder import load_target
from dspark_jax.targets.families import make_target
from dspark_jax.train.conversations import prompt_tokens
from dspark_jax.train.transformers_speed import measure_transformers

OPTIONAL = "PyTorch is not a dependency; where it is installed transformers is the yardstick"
QUESTION = [{"role": "user", "content": 'def add(a, b):\n    """Add two numbers."""'}]


def test_the_embedded_target_gives_the_logits_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch = pytest.importorskip("torch", reason=OPTIONAL)

    # Keys that no index head likes score exactly zero, and among equals torch keeps any, we the
    # earlier one: give torch the same rule.
    def first_of_equals(x: Any, k: int, dim: int = -1, **_: Any) -> Any:
        values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))

    monkeypatch.setattr(torch, "topk", first_of_equals)
    monkeypatch.setattr(torch.Tensor, "topk", first_of_equals)
    import transformers

    loaded = load_target(embedded("tiny-glm"), ())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(loaded.folder), dtype=torch.float32
    )
    tokens = np.tile(prompt_tokens(loaded.tokenizer, QUESTION), 8)[None, :120]
    assert isinstance(loaded.config, GlmConfig)
    assert tokens.shape[1] > loaded.config.index_topk  # so that attention is sparse
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    # transformers' own epsilon of the two latent norms
    target = make_target(dataclasses.replace(loaded.config, latent_norm_eps=1e-6))
    position = np.arange(tokens.shape[1])[None]
    states = jax.jit(target.forward)(loaded.params, tokens, np.ones_like(tokens), position)
    ours = np.asarray(target.unembed(loaded.params, states.final_hidden))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_its_generate_is_timed_on_the_same_files() -> None:
    pytest.importorskip("torch", reason=OPTIONAL)
    loaded = load_target(embedded("tiny-glm"), ())
    prompts = [prompt_tokens(loaded.tokenizer, QUESTION)]
    found = measure_transformers(loaded.folder, prompts, 8, pytest.fail)
    assert found is not None and 0 < found["tokens"] <= 8 and found["tokens_per_second"] > 0
