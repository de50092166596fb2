"""FP8 weights against PyTorch: every array of each `--golden`/targets/*/golden_fp8.npz.

Weights are dequantised and activations plain (W8A16), as transformers computed them; what is
`as_stored`, and what goes through a cache, has its kernels in FP8. Products with quantised
activations too (W8A8) are compared one linear at a time: from end to end they are chaotic, because
the last bit of one e4m3 number picks another expert or another key a few layers on, so
`logits_w8a8` (which a fixture may hold) is no reference for anybody but its writer.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import deserialize

from dspark_jax.checkpoints.header import read_header
from dspark_jax.fp8 import (
    Block,
    BlockScaled,
    dequantise,
    matmul_w8a8,
    quantise_activations,
)
from dspark_jax.targets.load import load_params
from tests.parity.test_glm import (
    ABOUT_THE_FIXTURE,
    MESH,
    MODULES,
    RELATIVE,
    Arrays,
    Model,
    Trace,
    build,
    decoded,
    described,
    differences,
    expected_names,
    hidden_states,
    ints,
    layer_arrays,
    run,
    through_cache,
    two_devices,
)

DTYPES = {"F8_E4M3": jnp.float8_e4m3fn, "BF16": jnp.bfloat16, "F32": np.float32}
SUFFIX = "_scale_inv"
ONE_LINEAR = {"lin_name", "lin_x", "lin_y_w8a8"}
NOT_COMPARED = {"input_ids", "logits_w8a8", *ABOUT_THE_FIXTURE}


def fp8_folders(golden: Path) -> list[Path]:
    found = [path.parent for path in golden.glob("targets/*/golden_fp8.npz")]
    return sorted(folder for folder in found if (folder / "model_fp8.safetensors").exists())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        folders = fp8_folders(metafunc.config.option.golden)
        metafunc.parametrize("folder", folders, ids=lambda folder: folder.name)
    if "unroll" in metafunc.fixturenames:
        unrolled = pytest.param(1000, marks=pytest.mark.slow, id="one_by_one")
        metafunc.parametrize("unroll", [unrolled, pytest.param(0, id="scanned")])
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", [MODULES, pytest.param(MESH, marks=pytest.mark.slow)])


@lru_cache
def arrays_of(folder: Path) -> Arrays:
    """The fixture's arrays of our model, under the names that a plain fixture gives them."""
    named = dict(np.load(folder / "golden_fp8.npz"))
    named["logits"] = named.pop("logits_w8a16")
    return {name.removeprefix("w8a16."): array for name, array in named.items()}


@lru_cache
def tensors_of(folder: Path) -> Arrays:
    """The checkpoint as stored; safetensors' own reader for numpy knows no FP8."""
    data = (folder / "model_fp8.safetensors").read_bytes()
    return {
        name: np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in deserialize(data)
    }


def block_of(folder: Path) -> Block:
    """Rows and columns of our kernels, which are transposed."""
    settings = described(folder).get("quantization_config") or {"weight_block_size": [128, 128]}
    columns, rows = settings["weight_block_size"]
    return rows, columns


def kernel_of(folder: Path, name: str) -> BlockScaled:
    """A checkpoint's quantised `weight` as a kernel."""
    tensors = tensors_of(folder)
    values, scales = tensors[name], tensors[name + SUFFIX]
    return BlockScaled(jnp.asarray(values.T), jnp.asarray(scales.T), block_of(folder))


@lru_cache
def load(folder: Path, unroll: int) -> Model:
    """The model of the weights that are left of the quantised ones."""
    tensors = tensors_of(folder)

    def get(name: str) -> np.ndarray:
        if name + SUFFIX in tensors:
            return np.asarray(dequantise(kernel_of(folder, name), jnp.float32)).T
        return tensors[name]

    shapes = {name: tensors[name].shape for name in tensors if not name.endswith(SUFFIX)}
    return build(described(folder), shapes, get, unroll)


@lru_cache
def load_stored(folder: Path, unroll: int, way: str) -> Model:
    """The same model with its kernels in FP8 as stored, decoded by the modules."""
    model, stored = load(folder, unroll), read_header(folder / "model_fp8.safetensors")
    # On two devices they stay in FP8; on one a target as small as a fixture is multiplied out.
    rows, columns = block_of(folder)
    params = load_params(model.config, stored, (columns, rows), two_devices())
    kernels = jax.tree.leaves(params, is_leaf=is_scaled)
    assert sum(map(is_scaled, kernels)) > 7
    if way == MODULES:
        params = jax.device_put(params, jax.devices()[0])
    return decoded(model._replace(params=params), way)


def is_scaled(x: Any) -> bool:
    return isinstance(x, BlockScaled)


@lru_cache
def trace(folder: Path, unroll: int, stored: bool = False) -> Trace:
    model = load_stored(folder, unroll, MODULES) if stored else load(folder, unroll)
    return run(model, ints(arrays_of(folder)["input_ids"]))


def test_there_is_something_to_check():
    ours = Path(__file__).parents[1] / "golden"  # another `--golden` may have no FP8 weights
    assert fp8_folders(ours), f"no targets/* with golden_fp8.npz in {ours}"


def test_a_fixture_has_all_its_arrays_and_no_others(folder: Path):
    names = expected_names(load(folder, 1000).config)
    computed = {n for n in names if n.startswith(("layer", "hf_hidden_states"))} | {"logits"}
    assert arrays_of(folder).keys() - NOT_COMPARED == computed | ONE_LINEAR


@pytest.mark.parametrize("stored", [False, True], ids=["multiplied_out", "as_stored"])
def test_what_every_layer_computes_matches(folder: Path, unroll: int, stored: bool):
    one_by_one = load_stored(folder, 1000, MODULES) if stored else load(folder, 1000)
    ours, arrays = layer_arrays(one_by_one, trace(folder, unroll, stored)), arrays_of(folder)
    assert set(ours) == {name for name in arrays if name.startswith("layer")}
    assert not differences(ours, arrays)


@pytest.mark.parametrize("stored", [False, True], ids=["multiplied_out", "as_stored"])
def test_hidden_states_and_logits_match(folder: Path, unroll: int, stored: bool):
    model = load_stored(folder, unroll, MODULES) if stored else load(folder, unroll)
    ours = hidden_states(model, trace(folder, unroll, stored))
    assert not differences(ours, arrays_of(folder))


def test_logits_through_the_cache_match(folder: Path, unroll: int, way: str):
    arrays, model = arrays_of(folder), load_stored(folder, unroll, way)
    tokens = ints(arrays["input_ids"])
    end = tokens.shape[1]
    # The rows of a refused draft are written, then overwritten by the real ones.
    refused = (tokens[:, end - 7 : end - 2] + 7) % model.config.vocab_size
    refused = refused.at[:, :2].set(tokens[:, end - 7 : end - 5])
    chunks = [(0, end - 7, None), (end - 7, end - 2, refused), (end - 5, end, None)]
    chunks += [(end - 1, end, None)]
    before, proposed, after, last = through_cache(model, tokens, chunks)
    ours = jnp.concatenate([before, proposed[:, :2], after[:, :-1], last], axis=1)
    assert not differences({"logits": ours}, arrays)


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["eager", "compiled"])
def test_one_linear_with_quantised_activations_matches(folder: Path, call: Any):
    arrays = arrays_of(folder)
    kernel = kernel_of(folder, f"{arrays['lin_name']}.weight")
    ours = np.asarray(call(matmul_w8a8)(jnp.asarray(arrays["lin_x"]), kernel))
    theirs = arrays["lin_y_w8a8"]
    assert np.abs(ours - theirs).max() <= RELATIVE * np.abs(theirs).max()


def test_both_sides_of_the_linear_dequantised_give_the_same(folder: Path):
    arrays = arrays_of(folder)
    kernel = kernel_of(folder, f"{arrays['lin_name']}.weight")
    x = quantise_activations(jnp.asarray(arrays["lin_x"]), kernel.block[0])
    ours = np.asarray(dequantise(x, jnp.float32) @ dequantise(kernel, jnp.float32))
    theirs = arrays["lin_y_w8a8"]
    assert np.abs(ours - theirs).max() <= RELATIVE * np.abs(theirs).max()
