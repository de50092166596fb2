"""A target as Orbax arrays: the bits of its safetensors, on any mesh, recognised by its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.checkpoints.fingerprint import RECORD, target_fingerprint
from dspark_jax.checkpoints.folder import embedded
from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.convert.__main__ import main
from dspark_jax.convert.target import chosen_devices, written_bytes
from dspark_jax.fp8 import BlockScaled
from dspark_jax.sharding import target_mesh
from dspark_jax.target_folder import load_target
from dspark_jax.targets import orbax
from dspark_jax.targets.families import read_config
from dspark_jax.targets.load import FP8, SCALES, load_params
from dspark_jax.targets.orbax import ARRAYS, read_params, save_params
from dspark_jax.targets.weights import shape_of

TARGETS = Path(__file__).parents[1] / "golden" / "targets"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("glm_small", "qwen3_moe_many")]


@pytest.fixture(params=["glm_small_fp8", "qwen3_tied", *SLOW])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A target's folder with its weights under the usual name."""
    folder, (weights,) = tmp_path / "source", (TARGETS / request.param).glob("*.safetensors")
    folder.mkdir()
    shutil.copy(TARGETS / request.param / "config.json", folder)
    shutil.copy(weights, folder / "model.safetensors")
    return folder


def mesh_of(data: int, tensor: int) -> Any:
    return target_mesh(jax.devices()[: data * tensor], tensor)


def read(folder: Path, data: int, tensor: int, dtype: Any = jnp.float32) -> Any:
    """What a folder's parameters are on a mesh, whichever way it holds them."""
    described = json.loads((folder / "config.json").read_text())
    return read_params(read_config(described), folder, described, mesh_of(data, tensor), dtype)


def saved(source: Path, folder: Path, data: int, tensor: int) -> Path:
    """A folder of Orbax arrays, written by this mesh."""
    described = json.loads((source / "config.json").read_text())
    config, block = read_config(described), quantisation(described)
    mesh, stored = mesh_of(data, tensor), stored_tensors(source)
    params = load_params(config, stored, block, mesh, jnp.float32, as_stored=True)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_params(folder, params, {"source_sha256": target_fingerprint(source)})
    return folder


def bits(params: Any) -> dict[Any, Any]:
    """Every array's bytes, type and shape."""
    found = {}
    for path, param in nnx.to_flat_state(params):
        value = param[...]
        scaled = isinstance(value, BlockScaled)
        parts = (value.values, value.scales) if scaled else (value,)
        found[path] = [(np.asarray(x).tobytes(), x.dtype, x.shape) for x in parts]
        found[path] += [value.block] if scaled else []
    return found


def test_arrays_are_the_bits_of_the_safetensors_on_another_mesh(source: Path, tmp_path: Path):
    folder = saved(source, tmp_path / "saved", 6, 1)  # six experts
    assert bits(read(folder, 1, 1)) == bits(read(source, 1, 1))
    ours, theirs = (read(place, 3, 1, jnp.bfloat16) for place in (folder, source))
    assert bits(ours) == bits(theirs)
    for mine, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert mine.sharding.is_equivalent_to(other.sharding, mine.ndim)
    assert target_fingerprint(folder) == target_fingerprint(source)


@pytest.mark.parametrize("count", [0, -1, 99])
def test_devices_that_are_not_there_are_refused(count: int):
    with pytest.raises(ValueError, match=f"--devices {count} does not fit the 8 devices here"):
        chosen_devices(count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_disk_is_asked_for_the_written_type(dtype: str):
    stored = stored_tensors(TARGETS / "qwen3_tied")
    narrow = {n: t._replace(dtype=np.dtype(jnp.bfloat16)) for n, t in stored.items()}
    count = sum(int(np.prod(t.shape)) for t in stored.values())
    width = jnp.dtype(dtype).itemsize
    assert written_bytes(stored, dtype) == written_bytes(narrow, dtype) == count * width


def test_the_disk_is_asked_for_fp8_as_it_is_stored():
    stored = stored_tensors(TARGETS / "glm_small_fp8")
    kept = {n: t for n, t in stored.items() if t.dtype == FP8 or n.endswith(SCALES)}
    assert kept and written_bytes(kept, "float32") == sum(t.nbytes for t in kept.values())


def test_a_mesh_that_cuts_blocks_is_refused(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(TARGETS / "glm_small_fp8", source)
    folder = saved(source, tmp_path / "saved", 1, 1)
    told = []
    for place in (source, folder):
        with pytest.raises(ValueError, match="cuts blocks of") as error:
            read(place, 1, 8)
        told.append(str(error.value)[:60])
    assert told[0] == told[1]


def test_arrays_of_another_config_are_refused(tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(TARGETS / "qwen3_tied", source)
    folder = saved(source, tmp_path / "saved", 1, 1)
    described = json.loads((folder / "config.json").read_text())
    changed = {**described, "vocab_size": described["vocab_size"] + 8}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="embed_tokens; make it again with `convert target`"):
        read(folder, 1, 1)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / RECORD).write_text("{}")
    with pytest.raises(ValueError, match="broken"):
        read(folder, 1, 1)


def tied(tmp_path: Path) -> Path:
    """A small target's arrays, without FP8."""
    shutil.copytree(TARGETS / "qwen3_tied", tmp_path / "source")
    return saved(tmp_path / "source", tmp_path / "saved", 1, 1)


def data_files(folder: Path) -> list[Path]:
    """Files with arrays' bytes, the largest first."""
    return sorted((folder / ARRAYS).rglob("d/*"), key=lambda file: -file.stat().st_size)


def test_arrays_that_are_not_whole_are_refused(tmp_path: Path):
    folder = tied(tmp_path)
    refused, source = 0, bits(read(folder, 1, 1))
    for file in data_files(folder)[:2]:  # some hold only what others hold too
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        try:
            assert bits(read(folder, 1, 1)) == source
        except ValueError as error:
            assert str(error).endswith("make it again with `convert target`.")
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(whole)
    assert refused


def test_arrays_with_changed_bytes_are_refused(tmp_path: Path):
    folder = tied(tmp_path)
    file = data_files(folder)[0]
    damaged = bytearray(file.read_bytes())
    middle = len(damaged) // 2
    for i in range(middle, middle + 64):
        damaged[i] ^= 0x15
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="make it again"):
        read(folder, 1, 1)
    with pytest.raises(ValueError, match="make it again"):
        read(folder, 2, 1, jnp.bfloat16)


def test_checksums_name_the_array_that_is_not_what_was_saved(tmp_path: Path):
    folder = tied(tmp_path)
    record = json.loads((folder / RECORD).read_text())
    record["checksums"]["norm.scale" if "norm.scale" in record["arrays"] else "norm.weight"] += 1
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"norm\.\w+ in .* has checksum \d+ but \d+ was saved; make"
    ):
        read(folder, 1, 1)
    del record["checksums"]  # as folders were made before
    (folder / RECORD).write_text(json.dumps(record))
    assert bits(read(folder, 1, 1)) == bits(read(tmp_path / "source", 1, 1))


def test_arrays_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tied(tmp_path)
    whole = bits(read(folder, 1, 1))
    monkeypatch.setattr(orbax, "BATCH_BYTES", 4000)
    assert bits(read(folder, 1, 1)) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": {"embed_tokens": 3}},
        {"blocks": {"embed_tokens": [16, "x"]}},
        {"blocks": {"embed_tokens": [16, 9]}},
        {"blocks": {"nothing": [16, 9]}},
        {"arrays": {"embed_tokens": 3}},
        {"arrays": {"embed_tokens": ["x", "float32"]}},
        {"arrays": {"embed_tokens": [[1, 2], 3]}},
        {"types": "no_type"},
        {"checksums": 3},
        {"checksums": {"embed_tokens": 1}},
        {"source_sha256": 3},
        {"narrowed_to": 3},
    ],
)
def test_a_broken_record_is_one_sentence(tmp_path: Path, change: dict[str, Any]):
    described = json.loads((TARGETS / "qwen3_tied" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described))
    shapes = {
        ".".join(map(str, path)): param.shape
        for path, param in nnx.to_flat_state(nnx.state(shape_of(read_config(described)), nnx.Param))
    }
    kind = change.pop("types", "float32")
    arrays = {name: [list(shape), kind] for name, shape in shapes.items()}
    record = {"source_sha256": "0", "blocks": {}, "arrays": arrays} | change
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="make (it|the folder) again with `convert target`"):
        read(tmp_path, 1, 1)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_only_narrowed_arrays_are_another_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None
):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    shutil.copy(TARGETS / "qwen3_tied" / "config.json", source)
    shutil.copy(TARGETS / "qwen3_tied" / "model.safetensors", source)
    stored = {tensor.dtype.name for tensor in stored_tensors(source).values()}
    assert stored == {"float32"}
    arguments = ["convert", "target", "--source", str(source), "--output", str(output)]
    arguments += [] if dtype is None else ["--dtype", dtype]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    kept = {kind for _, kind in json.loads((output / RECORD).read_text())["arrays"].values()}
    assert kept == {dtype or "float32"}
    same = bits(read(output, 1, 1)) == bits(read(source, 1, 1))
    assert same == (target_fingerprint(output) == target_fingerprint(source)) == (kept == stored)


@pytest.mark.slow
def test_the_command_makes_a_folder_that_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, output = embedded("tiny-glm"), tmp_path / "target"
    arguments = ["convert", "target", "--source", str(source), "--output", str(output)]
    arguments += ["--devices", "8", "--tensor-parallel", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    assert f"--target {output}" in capsys.readouterr().out
    assert not list(output.glob("*.safetensors")) and (output / "chat_template.jinja").is_file()
    ours, theirs = load_target(output, (1, 2)), load_target(source, (1, 2))
    assert bits(ours.params) == bits(theirs.params) and ours.ends == theirs.ends
    assert bits(read(output, 8, 1)) == bits(theirs.params) == bits(read(output, 1, 4))
    assert target_fingerprint(output) == target_fingerprint(source)
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 2 and "is not empty" in capsys.readouterr().err
    again = [*arguments[:3], str(output), "--output", str(tmp_path / "again")]
    monkeypatch.setattr("sys.argv", again)
    assert main() == 2 and "Orbax arrays already" in capsys.readouterr().err
