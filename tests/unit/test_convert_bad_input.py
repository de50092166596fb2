"""What is wrong with a checkpoint or an output is one sentence and exit code 2; nothing is left."""

import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from safetensors.flax import load_file, save_file

from dspark_jax.convert import files
from dspark_jax.convert.__main__ import main
from dspark_jax.draft_formats import speculators

DRAFT = Path(__file__).resolve().parents[1] / "golden/draft/small_vanilla/checkpoint"
SHAPE = json.loads((DRAFT / "config.json").read_text())
V, Vd = SHAPE["transformer_layer_config"]["vocab_size"], SHAPE["draft_vocab_size"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a good checkpoint."""
    return Path(shutil.copytree(DRAFT, tmp_path / "source"))


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command: (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
        code = main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def refusal(convert: Any, tmp_path: Path) -> Callable[..., str]:
    """The one sentence of a command that must refuse and leave no trace of its output."""

    def run(*arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, error = convert(*arguments)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert error.startswith("error: ") and sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.fixture
def importing(refusal: Callable[..., str], source: Path, tmp_path: Path) -> Callable[[], str]:
    """The sentence of an import of the changed checkpoint."""
    return lambda: refusal("import", "--source", source, "--output", tmp_path / "run")


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys, dotted by __; None removes one."""
    described = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        place = described
        for key in above:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    (folder / "config.json").write_text(json.dumps(described))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_truncated_and_corrupt_files(importing: Callable[[], str], source: Path):
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated" in importing()
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    assert "corrupt" in importing()
    weights.write_bytes(b"")
    assert "corrupt" in importing()


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', "NaN", ""])
def test_a_config_that_is_no_object(text: str, importing: Callable[[], str], source: Path):
    (source / "config.json").write_text(text)
    assert str(source / "config.json") in importing()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_opened(name: str, importing: Callable[[], str], source: Path):
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = importing()
    assert name in message and "pickle" in message and "save_file" in message


def test_a_pickle_given_as_the_source(refusal: Callable[..., str], source: Path, tmp_path: Path):
    (source / "pytorch_model.bin").write_bytes(b"x")
    given = source / "pytorch_model.bin"
    message = refusal("import", "--source", given, "--output", tmp_path / "run")
    assert "is a file" in message and "safetensors" in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_that_leads_elsewhere(name: str, importing: Callable[[], str], source: Path):
    (source / INDEX).write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    assert repr(name) in importing()


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(name: str, importing: Callable[[], str], source: Path):
    change_tensors(source, lambda tensors: tensors.pop(name))
    assert f"missing {name}" in importing()


def test_a_tensor_that_is_not_understood_is_named(importing: Callable[[], str], source: Path):
    change_tensors(source, lambda tensors: tensors.update({"../extra": jnp.zeros(3)}))
    assert "unknown ../extra" in importing()


def test_tables_of_another_shape_or_type(importing: Callable[[], str], source: Path):
    change_tensors(source, lambda tensors: tensors.update({"lm_head.weight": jnp.zeros((3, 2))}))
    assert "lm_head.weight has shape [3, 2]" in importing()
    shutil.copy(DRAFT / "model.safetensors", source)
    change_tensors(source, lambda t: t.update({"norm.weight": t["norm.weight"].astype(jnp.int8)}))
    assert "norm.weight is I8" in importing()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value: float, importing: Callable[[], str], source: Path):
    change_tensors(source, lambda t: t.update({"fc.weight": t["fc.weight"].at[0, 0].set(value)}))
    message = importing()
    assert "fc.weight" in message and "NaN" in message


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [(0, -1, "outside"), (-1, V, "outside"), (1, 0, "two draft tokens to token 0")],
)
def test_a_vocabulary_map_that_is_none(
    place: int, value: int, said: str, importing: Callable[[], str], source: Path
):
    def change(tensors: dict[str, Any]) -> None:
        ids = tensors["d2t"] + jnp.arange(Vd)
        tensors["d2t"] = ids.at[0].set(0).at[place].set(value) - jnp.arange(Vd)

    change_tensors(source, change)
    assert said in importing()


def test_maps_that_disagree(importing: Callable[[], str], source: Path):
    change_tensors(source, lambda tensors: tensors.update({"t2d": ~tensors["t2d"]}))
    assert "choose different tokens" in importing()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 5}, "speculative_tokens"),
        ({"draft_vocab_size": V + 1}, "draft_vocab_size"),
        ({"markov_rank": "8"}, "markov_rank '8'"),
        ({"enable_confidence_head": 1}, "enable_confidence_head 1"),
        ({"transformer_layer_config__rope_theta": 1.0}, "rope_theta"),
        ({"transformer_layer_config__sliding_window": None}, "no sliding_window"),
        ({"transformer_layer_config__use_sliding_window": False}, "use_sliding_window False"),
        ({"transformer_layer_config__num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"transformer_layer_config__num_key_value_heads": 0}, "num_key_value_heads"),
        ({"aux_hidden_state_layer_ids": [1, 1, 5]}, "aux layers"),
        ({"aux_hidden_state_layer_ids": [1, 3]}, "fc.weight"),
        ({"speculators_config__algorithm": "eagle3"}, "eagle3"),
        ({"speculators_model_type": "eagle3"}, "eagle3"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"transformer_layer_config__rope_parameters__factor": 4.0}, "rope_parameters.factor"),
        ({"mask_token_id": None}, "mask_token_id"),
    ],
)
def test_a_config_that_contradicts_itself_or_is_not_understood(
    changes: dict[str, Any], said: str, importing: Callable[[], str], source: Path
):
    windowed = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
    change_config(source, **{f"transformer_layer_config__{k}": v for k, v in windowed.items()})
    change_config(source, transformer_layer_config__use_sliding_window=True)
    change_config(source, **changes)
    assert said in importing()


def test_a_layout_that_nothing_tells_is_not_guessed(importing: Callable[[], str], source: Path):
    change_config(source, sample_from_anchor=None)
    methods = [{"proposal_type": "greedy", "speculative_tokens": 99}]
    change_config(source, speculators_config__proposal_methods=methods)
    assert "lacks sample_from_anchor" in importing()


@pytest.mark.parametrize("make", ["full", "file", "link"])
def test_an_output_that_is_not_free_is_left_alone(
    make: str, refusal: Callable[..., str], source: Path, tmp_path: Path
):
    output = tmp_path / "run"
    if make == "full":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    elif make == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert str(output) in refusal("import", "--source", source, "--output", output)


def test_an_empty_output_is_used(convert: Any, source: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert convert("import", "--source", source, "--output", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "config.json").is_file()


def test_a_full_disk(
    importing: Callable[[], str], monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda path: usage(9, 2, 7))
        assert "7 are free" in importing()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may grow beyond it
    try:
        message = importing()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{tmp_path / 'run'} cannot be written: " in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"markov_head_type": "gated"}, "gated"),
        ({"markov_head_type": "rnn"}, "rnn"),
        ({"markov_rank": 0}, "markov_rank is 0"),
        ({"sliding_window_non_causal": True}, "not causal"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason(
    changes: dict[str, Any],
    said: str,
    refusal: Callable[..., str],
    convert: Any,
    source: Path,
    tmp_path: Path,
):
    windowed = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}
    change_config(source, **{f"transformer_layer_config__{k}": v for k, v in windowed.items()})
    change_config(source, transformer_layer_config__use_sliding_window=True, **changes)
    config = speculators.config_from_json(
        json.loads((source / "config.json").read_text())
        | ({"confidence_head_with_markov": False} if changes.get("markov_rank") == 0 else {})
    )
    change_config(source, confidence_head_with_markov=config.confidence_head_with_markov)

    def change(tensors: dict[str, Any]) -> None:
        r, D = config.markov_rank, config.hidden_size
        heads = {"gated": ("gate_proj", (r, D + r)), "rnn": ("joint_proj", (3 * r, 2 * r + D))}
        if r == 0:
            for name in [n for n in tensors if n.startswith("markov_head.")]:
                del tensors[name]
            tensors["confidence_head.proj.weight"] = jnp.ones((1, D), jnp.bfloat16)
        elif config.markov_head_type in heads:
            name, shape = heads[config.markov_head_type]
            tensors[f"markov_head.{name}.weight"] = jnp.ones(shape, jnp.bfloat16)
            tensors[f"markov_head.{name}.bias"] = jnp.ones(shape[:1], jnp.bfloat16)

    change_tensors(source, change)
    assert convert("import", "--source", source, "--output", tmp_path / "run")[0] == 0
    export = ("export", "--checkpoint", tmp_path / "run", "--target-name", "org/target")
    message = refusal(*export, "--output", tmp_path / "out")
    assert "vLLM 0.33 cannot serve" in message and said in message
    assert convert(*export, "--output", tmp_path / "out", "--allow-unservable")[0] == 0


def test_a_target_name_that_is_a_path(refusal: Callable[..., str], source: Path, tmp_path: Path):
    for name in ("../target", "/models/target", "target"):
        message = refusal(
            *("export", "--checkpoint", source, "--target-name", name),
            *("--output", tmp_path / "out"),
        )
        assert "is no hub id" in message


def test_another_format_is_not_taken_for_a_run(
    refusal: Callable[..., str], convert: Any, source: Path, tmp_path: Path
):
    named = ("--target-name", "org/target")
    deepspec = ("--format", "deepspec", "--output", tmp_path / "deepspec")
    assert convert("export", "--checkpoint", source, *named, *deepspec)[0] == 0
    again = ("export", "--checkpoint", tmp_path / "deepspec", *named, "--output", tmp_path / "o")
    assert "import it first" in refusal(*again)


@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_positive(
    value: int, importing: Callable[[], str], refusal: Callable[..., str], source: Path
):
    change_config(source, transformer_layer_config__head_dim=value)
    said = f"transformer_layer_config.head_dim {value}; drafts here need a positive integer"
    assert said in importing() and said in refusal("inspect", source)


def test_no_such_source_and_no_such_draft(refusal: Callable[..., str], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        message = refusal("import", "--source", source, "--output", tmp_path / "run")
        assert str(source) in message
    assert "error" in refusal("inspect", tmp_path / "empty")
