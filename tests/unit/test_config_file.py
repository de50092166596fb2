"""config.json holds every setting, reads back to the same run, and mistakes in it are named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.train.__main__ import parse
from dspark_jax.train.config_file import differences, read_config, to_json, write_config
from dspark_jax.train.presets import PRESETS
from dspark_jax.train.settings import TrainSettings

FLAGS = [
    *("--loss-weights", "ce", "0.5", "nla", "0.25", "--position-weights", "dpace"),
    *("--fully-sharded", "4", "--loggers", "wandb", "tensorboard", "--accumulate", "2"),
    *("--layer-types", "sliding_attention", "--target", "some/where", "--no-confidence-head"),
]


def leaves(kind: Any) -> set[str]:
    """Names of all settings, groups taken apart."""
    found = set()
    for field in dataclasses.fields(kind):
        group = getattr(kind, field.name)
        found |= leaves(group) if dataclasses.is_dataclass(group) else {field.name}
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_back_to_itself(name: str, tmp_path: Path):
    write_config(PRESETS[name], tmp_path / "config.json")
    assert read_config(tmp_path) == PRESETS[name]
    assert not differences(PRESETS[name], tmp_path / "config.json")


def test_flags_reach_the_file_and_come_back(tmp_path: Path):
    settings = parse(FLAGS).settings
    assert settings.loss.config().weights == (("ce", 0.5), ("nla", 0.25))
    write_config(settings, tmp_path / "config.json")
    again = parse(["--config", str(tmp_path / "config.json"), "--seed", "3"]).settings
    assert again == dataclasses.replace(settings, seed=3)
    assert differences(again, tmp_path / "config.json") == ["seed is 3 here and 0 there"]


def test_every_setting_is_a_flag_and_a_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in leaves(TrainSettings()):
        assert f"--{name.replace('_', '-')}" in shown, name


def test_settings_that_change_nothing_learnt_may_change(tmp_path: Path):
    settings = PRESETS["tiny"]
    write_config(settings, tmp_path / "config.json")
    keeping = dataclasses.replace(settings.keeping, save_every=7, loggers=("wandb",))
    other = dataclasses.replace(settings, keeping=keeping, output=tmp_path)
    assert not differences(other, tmp_path / "config.json")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stepz": 3}, "'stepz' that does not exist; did you mean 'steps'"),
        ({"steps": "many"}, "steps = 'many'"),
        ({"steps": True}, "steps = True"),
        ({"seed": 1.0}, "seed = 1.0"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing = 1"),
        ({"optimizer": {"learning_rate": False}}, "optimizer.learning_rate = False"),
        ({"loss": {"loss_preset": "mine"}}, "loss.loss_preset = 'mine'"),
        ({"loss": {"loss_weights": {"cee": 1.0}}}, "loss.loss_weights"),
        ({"mesh": {"fully_sharded": 0}}, "fully_sharded is 0"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], message: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(PRESETS["tiny"]) | change))
    with pytest.raises(ValueError) as raised:
        read_config(tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_config_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="config .*nowhere.json cannot be read"):
        read_config(tmp_path / "nowhere.json")


def test_a_whole_number_will_do_for_a_real_one(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"optimizer": {"learning_rate": 1}, "output": "there"}')
    settings = read_config(tmp_path)
    assert settings.optimizer.learning_rate == 1.0 and settings.output == Path("there")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "[" * 10**5])
def test_what_is_no_object_is_one_sentence(text: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config {path} ") as raised:
        read_config(path)
    (found,) = differences(PRESETS["tiny"], path)
    assert str(raised.value) == f"{found}." and "\n" not in found


def test_what_an_older_file_lacks_has_its_default_there(tmp_path: Path):
    path = tmp_path / "config.json"
    settings = dataclasses.replace(TrainSettings(), accumulate=2, seed=3)
    values = to_json(settings)
    del values["accumulate"], values["bad_states"], values["loss"], values["output"]
    path.write_text(json.dumps(values | {"seed": 0, "dropped_since": 1}))
    assert differences(settings, path) == [
        "dropped_since is no setting here and 1 there",
        "seed is 3 here and 0 there",
        f"{path} lacks accumulate",
    ]
