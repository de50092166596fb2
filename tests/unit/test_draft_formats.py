"""Every format says the same draft in its own keys; layer ids move by one where they should."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dspark_jax.config import DraftConfig
from dspark_jax.draft_formats.dense import DFLASH
from dspark_jax.draft_formats.formats import TABLES, look, read, written
from dspark_jax.draft_formats.keys import Described, write
from dspark_jax.draft_formats.speculators import TABLE

CONFIG = DraftConfig(
    vocab_size=31,
    draft_vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    aux_layer_ids=(0, 1, 3),
    mask_token_id=30,
    block_size=4,
    markov_rank=5,
)
SAID = Described(CONFIG, "org/target", ("Qwen3ForCausalLM",), 6, "bfloat16")


def test_layer_ids_are_outputs_in_the_flat_formats():
    assert written("speculators", SAID)["aux_hidden_state_layer_ids"] == [0, 1, 3]
    assert written("deepspec", SAID)["target_layer_ids"] == [-1, 0, 2]
    assert written("specforge", SAID)["dflash_config"]["target_layer_ids"] == [-1, 0, 2]
    for name in ("deepspec", "specforge"):
        assert read(written(name, SAID)).said.config.aux_layer_ids == (0, 1, 3)


@pytest.mark.parametrize("name", ["speculators", "deepspec", "specforge"])
def test_the_layout_is_always_written(name: Any):
    assert written(name, SAID)["sample_from_anchor"] is True
    source = {k: v for k, v in written(name, SAID).items() if k != "sample_from_anchor"}
    assert written(name, SAID, (name, source))["sample_from_anchor"] is True


@pytest.mark.parametrize("name", ["speculators", "deepspec", "specforge"])
def test_every_setting_is_in_every_format(name: Any):
    settings = {key.setting for key in TABLES[name]} - {None}
    fields = set(DraftConfig.__dataclass_fields__) - {"unroll_layers"}
    assert fields - settings <= ({"sliding_window_non_causal"} if name != "speculators" else set())


@pytest.mark.parametrize("name", ["speculators", "deepspec", "specforge"])
@pytest.mark.parametrize("non_causal", [False, True])
def test_causality_of_windows_survives(name: Any, non_causal: bool):
    changed = {"layer_types": ("sliding_attention",) * 2, "sliding_window_non_causal": non_causal}
    config = replace(CONFIG, **changed)
    assert read(written(name, Described(config, "org/target"))).said.config == config


def test_full_layers_that_are_causal_are_refused():
    for change in ({"is_causal": True}, {"dflash_config": {"causal": True}}):
        described = written("specforge", SAID)
        nested = described["dflash_config"] | change.pop("dflash_config", {})
        with pytest.raises(ValueError, match="causal True"):
            read(described | change | {"dflash_config": nested})


def test_specforge_settings_are_read_from_both_places():
    described = written("specforge", SAID)
    heads = ("markov_rank", "markov_head_type", "enable_confidence_head")
    heads += ("confidence_head_with_markov",)
    moved = {name: described["dflash_config"].pop(name) for name in heads}
    for name in heads:
        del described[name]
    assert read(described | {"dspark_config": moved}).said.config == CONFIG
    with pytest.raises(ValueError, match="contradicts itself on markov_rank"):
        read(described | {"dspark_config": moved, "markov_rank": 7})


def test_deepspec_says_nothing_about_heads_that_are_not_there():
    bare = {"markov_rank": 0, "enable_confidence_head": False, "confidence_head_with_markov": False}
    config = replace(CONFIG, **bare)
    described = written("deepspec", Described(config))
    with pytest.raises(ValueError, match="lacks confidence_head_with_markov"):
        read({k: v for k, v in written("deepspec", SAID).items() if not k.endswith("with_markov")})
    del described["markov_head_type"], described["confidence_head_with_markov"]
    assert read(described).said.config == config


def test_an_older_speculators_file_says_its_layout_by_its_drafts():
    described = write(TABLE, SAID)
    del described["sample_from_anchor"], described["sliding_window_non_causal"]
    described |= {"num_anchors": 256, "ce_loss_alpha": 1.0, "l1_loss_alpha": 0.9}
    reading = read(described)
    assert reading.said.config == CONFIG and len(reading.notes) == 1
    described["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 3
    assert read(described).said.config.sample_from_anchor is False


@pytest.mark.parametrize("style", ["flat", "speculators"])
def test_a_dflash_draft_has_no_heads_and_a_given_slot(style: str):
    plain = {"markov_rank": 0, "enable_confidence_head": False, "sample_from_anchor": False}
    plain |= {"confidence_head_with_markov": False}
    config = replace(CONFIG, **plain)
    if style == "flat":
        described = write(DFLASH, Described(config))
        del described["sample_from_anchor"]
    else:
        described = write(TABLE, Described(config, "org/target")) | {
            "speculators_model_type": "dflash",
            "architectures": ["DFlashDraftModel"],
        }
        described["speculators_config"]["algorithm"] = "dflash"
        for name in ("markov_rank", "markov_head_type", "enable_confidence_head"):
            del described[name]
    reading = read(json.loads(json.dumps(described)))
    assert reading.kind.startswith("dflash") and reading.said.config == config


def test_looking_tells_what_reading_refuses():
    described = written("deepspec", SAID) | {"logit_scale": 2.0, "hidden_act": "gelu"}
    reading = look(described)
    assert reading.unknown == ["logit_scale"] and "hidden_act 'gelu'" in reading.misfits[0]
    with pytest.raises(ValueError, match="hidden_act"):
        read(described)


@pytest.mark.parametrize("described", [{}, {"architectures": ["Gemma4DSparkModel"]}])
def test_what_is_no_draft_known_here_is_refused(described: dict[str, Any]):
    with pytest.raises(ValueError, match="no draft that is known here"):
        read(described)


ODD = (None, "x", -1, 2.5, True, [], [None], {}, {"a": 1}, float("nan"))


@pytest.mark.parametrize("name", ["speculators", "deepspec", "specforge"])
def test_no_value_of_any_key_is_more_than_a_sentence(name: Any):
    described = written(name, SAID)
    for path in paths(described):
        for value in ODD:
            changed = json.loads(json.dumps(described))
            *above, last = path
            place = changed
            for key in above:
                place = place[key]
            place[last] = value
            try:
                read(changed)
            except ValueError as error:
                assert str(error)


def paths(value: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key, at every depth."""
    found = []
    for key, inner in value.items():
        found.append((*above, key))
        found += paths(inner, (*above, key)) if isinstance(inner, dict) else []
    return found
