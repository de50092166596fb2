"""The shipped target and draft belong together and keep their promised sizes."""

import json

from dspark_jax.checkpoints.folder import embedded
from dspark_jax.config import GlmConfig
from dspark_jax.draft_files import load_draft
from dspark_jax.target_folder import load_target, target_fingerprint
from dspark_jax.train.presets import PRESETS

TARGET, DRAFT = embedded("tiny-glm"), embedded("tiny-glm-dspark")


def test_the_shipped_draft_was_made_for_the_shipped_target() -> None:
    described = json.loads((DRAFT / "config.json").read_text())
    assert described["target_sha256"] == target_fingerprint(TARGET)


def test_the_shipped_draft_fits_and_loads() -> None:
    loaded = load_target(TARGET, PRESETS["tiny"].draft.aux_layer_ids)
    config, _, target_id = load_draft(DRAFT, loaded.config)
    assert config.draft_length == 8 and len(target_id) == config.draft_vocab_size


def test_assets_stay_within_their_sizes() -> None:
    for folder, limit in ((TARGET, 16e6), (DRAFT, 6e6)):
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= limit


def test_sparsity_is_live_and_the_indexer_is_shared() -> None:
    config = load_target(TARGET, ()).config
    assert isinstance(config, GlmConfig)
    assert config.index_topk < 256
    assert set(config.indexer_types) == {"full", "shared"}
    assert {mlp for _, mlp in config.layer_kinds} == {"dense", "sparse"}
