"""The published presets run on a target of their depth, and hold the published settings."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import Qwen3Config
from dspark_jax.targets.families import init_params
from dspark_jax.train.__main__ import parse
from dspark_jax.train.presets import PRESETS, draft_config
from dspark_jax.train.run import run
from dspark_jax.train.tiny_glm import TINY_GLM, save_target

PUBLISHED = {
    "qwen3-8b": (7, True, 5, (2, 10, 18, 26, 34), 6e-4, 512, 4096),
    "glm-5.2": (8, False, 5, (8, 23, 39, 55, 70), 6e-4, 1024, 4096),
    "glm-5.2-3layer": (8, False, 3, (2, 20, 39, 58, 75), 3e-4, 1024, 8192),
}
FLAGS = [
    *("--steps", "1", "--conversations", "64", "--answer-tokens", "16", "--prompt-tokens", "64"),
    *("--serve-prompts", "1", "--max-anchors", "8", "--sequence-length", "96"),
    *("--batch-rows", "1", "--intermediate-size", "32"),
]


@pytest.fixture(scope="module")
def deep_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target of GLM-5.2's depth and layer pattern, and of no size."""
    folder = tmp_path_factory.mktemp("target") / "deep-glm"
    tokenizer = Tokenizer.from_file(str(embedded("tiny-glm") / "tokenizer.json"))
    full = {0, 1, 2, *range(6, 78, 4)}
    config = dataclasses.replace(
        TINY_GLM,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=78,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        index_topk=32,
        index_head_dim=8,
        index_n_heads=2,
        first_k_dense_replace=3,
        indexer_types=tuple("full" if i in full else "shared" for i in range(78)),
    )
    save_target(folder, config, init_params(config, 0), tokenizer)
    return folder


@pytest.fixture(scope="module")
def deep_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target of Qwen3-8B's depth, and of no size."""
    folder = tmp_path_factory.mktemp("target") / "deep-qwen3"
    tokenizer = Tokenizer.from_file(str(embedded("tiny-glm") / "tokenizer.json"))
    config = Qwen3Config(tokenizer.get_vocab_size(), 32, 32, 36, 4, 2, 8)
    save_target(folder, config, init_params(config, 0), tokenizer)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_holds_the_published_settings(name: str) -> None:
    settings, draft = PRESETS[name], PRESETS[name].draft
    kinds = set(draft.layer_types) or {"full_attention"}
    assert kinds == {"full_attention"} and draft.draft_vocab_size is None
    assert draft.markov_rank == 256
    assert PUBLISHED[name] == (
        draft.block_size,
        draft.sample_from_anchor,
        draft.num_layers,
        draft.aux_layer_ids,
        settings.optimizer.learning_rate,
        settings.max_anchors,
        settings.sequence_length,
    )
    target = dataclasses.replace(TINY_GLM, num_hidden_layers=78, aux_layer_ids=draft.aux_layer_ids)
    assert draft_config(draft, target, 4).draft_length == 7


def check_preset(name: str, target: Path, output: Path) -> None:
    """Train a step, decode, and find the answers identical and the layers as published."""
    flags = ["--preset", name, "--target", str(target), "--output", str(output), *FLAGS]
    run(parse(flags))
    report = json.loads((output / "report.json").read_text())
    assert report["served"]["greedy"]["identical_to_plain"] is True
    described = json.loads((output / "draft/config.json").read_text())
    assert described["aux_hidden_state_layer_ids"] == list(PRESETS[name].draft.aux_layer_ids)
    shutil.rmtree(output)


@pytest.mark.slow
def test_the_glm_preset_trains_serves_and_is_lossless(deep_target: Path, tmp_path: Path) -> None:
    check_preset("glm-5.2", deep_target, tmp_path)


@pytest.mark.slow
def test_the_qwen3_preset_trains_serves_and_is_lossless(deep_qwen3: Path, tmp_path: Path) -> None:
    check_preset("qwen3-8b", deep_qwen3, tmp_path)
