"""What a folder's safetensors hold is known, and all that is wrong with them said, from headers."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


def write_index(folder: Path, weight_map: dict[str, Any]) -> None:
    """The index of a sharded checkpoint."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    """A header's description of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "x-00001-of-00002.safetensors")
    save_file({"b": np.zeros(5, np.int8)}, tmp_path / "x-00002-of-00002.safetensors")
    write_index(
        tmp_path, {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    )
    return tmp_path


@pytest.mark.parametrize("indexed", [True, False])
def test_all_shards_are_known(sharded: Path, indexed: bool):
    if not indexed:
        (sharded / "model.safetensors.index.json").unlink()
    found = stored_tensors(sharded)
    assert {n: (s.name, s.shape, s.dtype, s.nbytes) for n, s in found.items()} == {
        "a": ("a", (2, 3), np.float32, 24),
        "b": ("b", (5,), np.int8, 5),
    }
    assert found["b"].path == sharded / "x-00002-of-00002.safetensors"


def test_every_dtype_of_a_checkpoint_is_known(tmp_path: Path):
    kinds = ["float32", "float16", "int8", "int16", "int32", "int64", "uint8", "uint32"]
    tensors = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    for kind in (jnp.bfloat16, jnp.float8_e4m3fn):
        tensors[np.dtype(kind).name] = np.arange(6).reshape(2, 3).astype(kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = stored_tensors(tmp_path)
    assert {name: s.dtype for name, s in found.items()} == {n: t.dtype for n, t in tensors.items()}
    for name, stored in found.items():
        data = stored.path.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        assert data == tensors[name].tobytes()


def test_files_that_the_index_does_not_list_are_left_alone(sharded: Path):
    save_file({"a": np.zeros(1, np.float32)}, sharded / "consolidated.safetensors")
    assert stored_tensors(sharded).keys() == {"a", "b"}


def test_the_hubs_cache_of_links_into_blobs_is_followed(tmp_path: Path):
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": np.zeros(2, np.float32)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, {"a": "model.safetensors"})
    assert stored_tensors(snapshot)["a"].shape == (2,)
    (tmp_path / "linked").symlink_to(snapshot)
    assert stored_tensors(tmp_path / "linked")["a"].shape == (2,)


def refused(folder: Path, sentence: str) -> None:
    """The folder is refused in one sentence."""
    with pytest.raises(ValueError, match=sentence) as caught:
        stored_tensors(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "holds no .*safetensors file; give a model's folder")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/../../x.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(sharded: Path, name: str):
    save_file({"a": np.zeros(1, np.float32)}, sharded.parent / "x.safetensors")
    write_index(sharded, {"a": name})
    refused(sharded, "names the weights file '.*x.safetensors', which lies outside it at")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_that_leaves_its_folder_is_refused(tmp_path: Path, indexed: bool):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "x.safetensors")
    if indexed:
        write_index(folder, {"a": "model.safetensors"})
    refused(folder, "names the weights file 'model.safetensors', which lies outside it at")


def test_only_safetensors_are_opened(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").touch()
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    refused(tmp_path, "'pytorch_model.bin'; only .*safetensors files are opened")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "index .*index.json .*; download it again")


def test_all_missing_shards_are_listed(sharded: Path):
    for i in (1, 2):
        (sharded / f"x-0000{i}-of-00002.safetensors").unlink()
    listed = "x-00001-of-00002.safetensors, x-00002-of-00002.safetensors"
    refused(sharded, f"lacks 2 of its 2 shards: {listed}; download them")


def test_a_missing_shard_is_noticed_without_an_index(sharded: Path):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "x-00001-of-00002.safetensors").unlink()
    refused(sharded, "lacks 1 of its 2 shards: x-00001-of-00002.safetensors; download them")


def test_a_tensor_that_is_not_in_its_shard_is_refused(sharded: Path):
    first, second = (f"x-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(sharded, {"a": first, "b": first, "c": second})
    refused(sharded, rf"2 tensors are not in the shard .* names: b \({first}\), c \({second}\); d")


def test_a_tensor_in_two_shards_is_refused(sharded: Path):
    save_file({"a": np.zeros(1, np.float32)}, sharded / "x-00002-of-00002.safetensors")
    refused(sharded, "tensor a is in both x-00001-of-00002.* and x-00002-of-00002.*; remove")


def test_an_unknown_dtype_is_refused(tmp_path: Path):
    header = {"a": entry("F8_E5M2", [4], 0, 4)}
    write_raw(tmp_path / "model.safetensors", header, bytes(4))
    refused(tmp_path, "tensor a of .* has dtype F8_E5M2; supported are .*BF16, .*F8_E4M3")


@pytest.mark.parametrize("left_bytes", [40, 12])
def test_a_truncated_file_is_refused(sharded: Path, left_bytes: int):
    path = sharded / "x-00001-of-00002.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1] if left_bytes > 12 else path.read_bytes()[:left_bytes])
    sentence = rf"weights {path} are truncated: the header tells of \d+ bytes but the file has"
    refused(sharded, sentence + rf" {size - 1 if left_bytes > 12 else left_bytes}; download it")


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"{nonsense", b"", "no JSON"),
        (b"\xff\xfe{}", b"", "no JSON"),
        (b"[" * 100_000, b"", "no JSON"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ([], b"", "a list for a header"),
        ({"a": {"dtype": "F32"}}, b"", "tensor a without dtype, shape and data_offsets"),
        ({"a": entry("F32", [-1], 0, 4)}, bytes(4), "tensor a shape"),
        ({"a": entry("F32", [2], 0, 4)}, bytes(4), "tensor a 4 bytes where its shape needs 8"),
        ({"a": entry("I8", [4], 4, 8)}, bytes(8), "tensor a at byte"),
        ({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, bytes(6), "tensor b at byte"),
        ({"a": entry("I8", [4], 0, 4)}, bytes(9), "bytes where its header tells of"),
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, header: Any, data: bytes, why: str):
    write_raw(tmp_path / "model.safetensors", header, data)
    refused(tmp_path, f"weights {tmp_path}/model.safetensors are corrupt: .*{why}.*; download it")


def test_a_header_of_absurd_length_is_refused_unread(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(
        tmp_path, "are corrupt: the file gives its header 18446744073709551615 bytes of at most"
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "are corrupt: the file has 0 bytes, fewer than a header's 8")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_plain_weights_have_no_quantisation(config: dict[str, Any]):
    assert quantisation(config) is None


@pytest.mark.parametrize("without", ["", "fmt", "activation_scheme"])
def test_fp8_in_blocks_is_known(without: str):
    asked = {key: value for key, value in FP8.items() if key != without}
    assert quantisation({"quantization_config": asked}) == (128, 128)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"quant_method": "nvfp4"}, "quantisation nvfp4 is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantisation modelopt NVFP4 is"),
        ({"quant_method": "awq", "bits": 4}, "quantisation awq is not supported"),
        ({"quant_method": "gptq"}, "quantisation gptq is"),
        ({"quant_method": "bitsandbytes"}, "quantisation bitsandbytes is"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "quantisation compressed-tensors nvfp4-pack-quantized is",
        ),
        ({"bits": 4}, "quantisation without quant_method is not supported"),
        (FP8 | {"fmt": "e5m2"}, "fp8 quantisation with fmt 'e5m2' is not supported"),
        (FP8 | {"activation_scheme": "static"}, "fp8 quantisation with activation_scheme 'static'"),
        (FP8 | {"weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\] is not supported"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size \[128\] is not supported"),
        ({"quant_method": "fp8"}, "fp8 quantisation with weight_block_size None is not"),
        ("fp8", "quantization_config is 'fp8' in config.json, but an object is needed"),
    ],
)
def test_any_other_quantisation_is_refused_by_name(asked: Any, named: str):
    with pytest.raises(ValueError, match=named):
        quantisation({"quantization_config": asked})
