"""A checkpoint streamed into parameters: the same numbers on any mesh, FP8 kept."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.flax import save_file

from dspark_jax.checkpoints.quantisation import quantisation
from dspark_jax.checkpoints.shards import stored_tensors
from dspark_jax.fp8 import BlockScaled, dequantise
from dspark_jax.sharding import target_mesh
from dspark_jax.targets.families import read_config
from dspark_jax.targets.load import load_params
from dspark_jax.targets.weights import params_from_tensors

TARGETS = Path(__file__).parents[1] / "golden" / "targets"
TYPES = {"F8_E4M3": jnp.float8_e4m3fn, "BF16": jnp.bfloat16, "F32": np.float32}


@pytest.fixture(params=["glm_small", "glm_small_fp8", "qwen3_moe_many", "qwen3_tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A target's folder with its weights under the usual name."""
    source = TARGETS / request.param
    shutil.copy(source / "config.json", tmp_path)
    (weights,) = source.glob("*.safetensors")
    shutil.copy(weights, tmp_path / "model.safetensors")
    return tmp_path


def load(folder: Path, mesh: tuple[int, int], dtype: Any = jnp.float32, **config: Any) -> Any:
    described = json.loads((folder / "config.json").read_text())
    block, stored = quantisation(described), stored_tensors(folder)
    devices = target_mesh(jax.devices()[: mesh[0] * mesh[1]], mesh[1])
    return load_params(read_config(described, **config), stored, block, devices, dtype)


def read_raw(path: Path) -> dict[str, np.ndarray]:
    """Every tensor in its own type."""
    return {
        name: np.frombuffer(tensor["data"], TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in deserialize(path.read_bytes())
    }


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor in float32, FP8 ones multiplied out block by block."""
    found = {name: tensor.astype(np.float32) for name, tensor in read_raw(path).items()}
    rows, columns = 16, 9  # the fixture's blocks
    for name in [name for name in found if name.endswith("_scale_inv")]:
        scale = np.repeat(np.repeat(found.pop(name), rows, 0), columns, 1)
        weight = found[name.removesuffix("_scale_inv")]
        weight *= scale[: weight.shape[0], : weight.shape[1]]
    return found


def expected(folder: Path, **config: Any) -> Any:
    described = json.loads((folder / "config.json").read_text())
    tensors = read_all(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return params_from_tensors(read_config(described, **config), shapes, tensors.__getitem__)


@pytest.mark.parametrize("unroll", [1000, 0], ids=["one_by_one", "scanned"])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 2), (2, 1)])
def test_parameters_are_the_checkpoints(
    folder: Path, mesh: tuple[int, int], unroll: int, request: pytest.FixtureRequest
) -> None:
    if is_fp8(folder) and mesh == (4, 2):
        with pytest.raises(ValueError, match="cuts blocks of 16 x 9"):
            load(folder, mesh, unroll_layers=unroll)
        return
    ours = load(folder, mesh, unroll_layers=unroll)
    theirs = expected(folder, unroll_layers=unroll)
    for mine, wanted in zip(leaves(ours), leaves(theirs), strict=True):
        assert len(jax.tree.leaves(mine)[0].sharding.device_set) == mesh[0] * mesh[1]
        plain = dequantise(mine, jnp.float32) if isinstance(mine, BlockScaled) else mine
        np.testing.assert_array_equal(plain, wanted)
    kept = any(isinstance(leaf, BlockScaled) for leaf in leaves(ours))
    assert kept == (is_fp8(folder) and mesh != (1, 1))


def is_fp8(folder: Path) -> bool:
    return "weight_block_size" in (folder / "config.json").read_text()


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, BlockScaled))


def rewrite(folder: Path, changes: Mapping[str, Any]) -> None:
    """The weights with some tensors changed, or left out where the change is None."""
    tensors = {**read_raw(folder / "model.safetensors"), **changes}
    kept = {name: jnp.asarray(x) for name, x in tensors.items() if x is not None}
    save_file(kept, folder / "model.safetensors")


def fp8_folder(tmp_path: Path) -> Path:
    shutil.copy(TARGETS / "glm_small_fp8" / "config.json", tmp_path)
    weights = TARGETS / "glm_small_fp8" / "model_fp8.safetensors"
    shutil.copy(weights, tmp_path / "model.safetensors")
    return tmp_path


SCALED = "model.layers.0.self_attn.q_b_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (SCALED, None, f"missing {SCALED}"),
        (SCALED, jnp.ones((1, 1)), f"{SCALED} has shape"),
        ("model.extra.weight", jnp.ones(2), "unexpected model.extra.weight"),
        ("model.norm.weight", jnp.ones(40, jnp.int32), "no floating-point type"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, value: Any, said: str) -> None:
    rewrite(fp8_folder(tmp_path), {name: value})
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        load(tmp_path, (1, 1))


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path)
    scale = read_raw(folder / "model.safetensors")[SCALED].copy()
    scale[0, 0] = np.nan
    rewrite(folder, {SCALED: scale})
    with pytest.raises(ValueError, match="holds nan where scales are finite"):
        load(folder, (1, 1))


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float16])
def test_scales_of_any_float_type_are_taken(tmp_path: Path, kind: Any) -> None:
    folder = fp8_folder(tmp_path)
    scale = read_raw(folder / "model.safetensors")[SCALED].astype(kind)
    rewrite(folder, {SCALED: scale})
    layer = load(folder, (2, 1))["layers"][0][0]
    found = layer["self_attn"]["q_b_proj"]["kernel"][...].scales
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(found).T, scale.astype(np.float32))


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.indexer.weights_proj.weight",
        "model.layers.0.self_attn.indexer.k_norm.bias",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ],
)
def test_fp8_where_nothing_takes_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = fp8_folder(tmp_path)
    old = read_raw(folder / "model.safetensors")[name]
    scales = [-(-n // b) for n, b in zip(old.shape, (16, 9), strict=False)]
    changes = {name: old.astype(jnp.float8_e4m3fn), f"{name}_scale_inv": np.ones(scales)}
    rewrite(folder, changes)
    with pytest.raises(ValueError, match=f"1 tensors are FP8 .* may be: {name}; use a"):
        load(folder, (2, 1))


def test_fp8_weights_need_their_description(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    del described["quantization_config"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="unexpected .*_scale_inv|no quantization_config"):
        load(folder, (1, 1))
