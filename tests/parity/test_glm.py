"""Our GLM against the PyTorch one: every array of every folder `--golden`/targets/*/golden.npz.

Sizes come from each folder's config.json. Everything is checked twice, with layers run one by one
and with layers stacked and scanned; what goes through a cache also by every way of decoding.
"""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file

from dspark_jax.config import GlmConfig
from dspark_jax.sharding import target_mesh, tree_shardings
from dspark_jax.stack import members
from dspark_jax.targets.families import make_target
from dspark_jax.targets.glm import Glm
from dspark_jax.targets.glm_config import config_from_json
from dspark_jax.targets.mesh import spread_decoding
from dspark_jax.targets.residual import Choices
from dspark_jax.targets.weights import params_from_tensors, tensors_from_params
from dspark_jax.types import Rows, Target

RELATIVE = 1e-5
"""Allowed difference, as a fraction of the array's largest magnitude."""
TRANSFORMERS_LATENT_EPS = 1e-6
ABOUT_THE_FIXTURE = {
    "weight_seed": "says how the weights were drawn",
    "min_topk_gap": "says that no choice of keys is a tie",
}
"""Arrays that describe no result of the model."""
INPUTS = {"input_ids", "prefill_len", "verify_len", "leftpad_mask"}

COMPACT, MODULES, MESH = "compact", "modules", "mesh"
"""Ways of decoding: weights laid out anew, the modules that train, these on two devices."""

Arrays = Mapping[str, np.ndarray]


class Model(NamedTuple):
    """A target, its functions compiled, with its parameters."""

    target: Target
    params: Any
    config: GlmConfig


class Trace(NamedTuple):
    """A pass without a cache: residual streams 0..L (the last un-normed), choices, logits."""

    streams: list[jax.Array]
    choices: list[Choices]
    logits: jax.Array


def covered_folders(golden: Path) -> list[Path]:
    """Folders of a GLM with plain weights; test_fp8.py and test_qwen3.py check the others."""
    every = sorted(path.parent for path in golden.glob("targets/*/model.safetensors"))
    return [folder for folder in every if described(folder)["model_type"] == "glm_moe_dsa"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        folders = covered_folders(metafunc.config.option.golden)
        metafunc.parametrize("folder", folders, ids=lambda folder: folder.name)
    if "unroll" in metafunc.fixturenames:
        metafunc.parametrize("unroll", [1000, 0], ids=["one_by_one", "scanned"])
    if "way" in metafunc.fixturenames:
        mesh = pytest.param(MESH, marks=pytest.mark.slow)
        metafunc.parametrize("way", [COMPACT, MODULES, mesh])


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@lru_cache
def arrays_of(folder: Path) -> Arrays:
    return dict(np.load(folder / "golden.npz"))


@lru_cache(maxsize=8)
def load(folder: Path, unroll: int, **changes: Any) -> Model:
    """The folder's model."""
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return build(described(folder), shapes, tensors.__getitem__, unroll, **changes)


def build(
    description: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    get: Callable[[str], np.ndarray],
    unroll: int,
    **changes: Any,
) -> Model:
    """The model of these tensors; every residual stream is captured."""
    layers = description["num_hidden_layers"]
    settings = {"latent_norm_eps": TRANSFORMERS_LATENT_EPS, "unroll_layers": unroll}
    settings |= {"aux_layer_ids": tuple(range(layers + 1))} | changes
    config = config_from_json(description, **settings)
    params = params_from_tensors(config, shapes, get)
    return Model(compiled(make_target(config)), params, config)


def compiled(target: Target) -> Target:
    """The target with the functions compiled that are called often."""
    names = "trace", "extend", "logits"
    return target._replace(**{name: jax.jit(getattr(target, name)) for name in names})


def decoded(model: Model, way: str) -> Model:
    """The same model, decoded another way."""
    if way == COMPACT:
        return model
    if way == MODULES:
        graphdef, _ = nnx.split(glm_of(model.config))
        functions = spread_decoding(
            model.config, lambda params: nnx.merge(graphdef, params, copy=True), None
        )
        return model._replace(target=compiled(make_target(model.config)._replace(**functions)))
    mesh = two_devices()
    params = jax.device_put(model.params, tree_shardings(mesh, model.params, "glm"))
    return model._replace(target=compiled(make_target(model.config, mesh)), params=params)


def two_devices() -> Mesh:
    """They share the experts only: a fixture's heads and vocabulary may be odd."""
    return target_mesh(jax.devices()[:2], 1)


@lru_cache(maxsize=8)
def load_decoded(folder: Path, unroll: int, way: str) -> Model:
    """The folder's model, decoded this way."""
    return decoded(load(folder, unroll), way)


@lru_cache(maxsize=8)
def trace(folder: Path, unroll: int, **changes: Any) -> Trace:
    return run(load(folder, unroll, **changes), ints(arrays_of(folder)["input_ids"]))


def run(model: Model, tokens: jax.Array, mask: Any = 1) -> Trace:
    """A pass over whole rows; tokens where `mask` is 0 are a document of their own."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment = jnp.broadcast_to(jnp.asarray(mask, jnp.int32), tokens.shape)
    states, choices = model.target.trace(model.params, tokens, segment, position)
    streams = states.aux_hidden.reshape(*tokens.shape, -1, states.final_hidden.shape[-1])
    logits = model.target.unembed(model.params, states.final_hidden)
    return Trace(list(jnp.moveaxis(streams, 2, 0)), by_layer(model.config, choices), logits)


def by_layer(config: GlmConfig, choices: list[Any]) -> list[Choices]:
    """Choices in the order of the layers, taken out of their groups."""
    found = {}
    for group, member, repeat, layer in members(glm_of(config).groups):
        choice = choices[group][member]
        found[layer] = choice if repeat is None else jax.tree.map(lambda x, r=repeat: x[r], choice)
    return [found[layer] for layer in range(config.num_hidden_layers)]


def glm_of(config: GlmConfig) -> Glm:
    """The model's shape, without its arrays."""
    return nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0)))


def ints(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.int32)


def layer_arrays(one_by_one: Model, seen: Trace) -> dict[str, Any]:
    """Our version of every `layer{i}.` array; choices as a table of what was chosen."""
    config, ours = one_by_one.config, {}
    for i, choice in enumerate(seen.choices):
        mine = {"out": seen.streams[i + 1], "topk": choice.selected}
        mine |= dict(zip(("attn_out", "mlp_out"), block_updates(one_by_one, seen, i), strict=True))
        if choice.index_scores is not None:
            mine["index_scores"] = choice.index_scores
        if choice.routing is not None:
            flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), choice.routing)
            mine |= {
                "router_logits": flat.logits,
                "router_idx": jax.nn.one_hot(flat.expert, config.n_routed_experts).sum(1) > 0,
                "router_w": flat.weight,
            }
        ours |= {f"layer{i}.{name}": value for name, value in mine.items()}
    return ours


def block_updates(model: Model, seen: Trace, layer: int) -> tuple[jax.Array, jax.Array]:
    """What attention and MLP of a layer add to the stream that our model fed them."""
    glm = nnx.merge(nnx.split(glm_of(model.config))[0], model.params, copy=True)
    block, x = glm.layers[layer][0], seen.streams[layer]
    normed = block.input_layernorm(x)
    angle = glm._angles(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    query, memory = block.self_attn.query(normed, angle), block.self_attn.memory(normed, angle)
    attended, _ = block.self_attn.attend_expanded(query, memory, seen.choices[layer].selected)
    return attended, block.feed_forward(x + attended)[0]


def hidden_states(model: Model, seen: Trace) -> dict[str, Any]:
    """Our version of every residual stream, as transformers returns them, and of the logits."""
    glm = nnx.merge(nnx.split(glm_of(model.config))[0], model.params, copy=True)
    hidden = [*seen.streams[:-1], glm.norm(seen.streams[-1])]  # transformers norms the last one
    ours = {f"hf_hidden_states.{i}": x for i, x in enumerate(hidden)}
    return ours | {"logits": seen.logits}


def comparable(name: str, theirs: np.ndarray, arrays: Arrays, ours: Any) -> tuple[Any, Any]:
    """Both sides with what the two programs leave undefined removed.

    Keys after a row's own are in no set and have no score; sets are tables of booleans; weights
    stand in the order of the experts.
    """
    ours, kind = np.asarray(ours), name.rpartition(".")[2]
    earlier = np.tri(theirs.shape[1], dtype=bool)
    if kind == "index_scores":
        return ours[:, earlier], theirs[:, earlier]
    if kind in ("topk", "router_idx"):
        table = np.zeros(ours.shape, bool)
        np.put_along_axis(table, theirs, True, axis=-1)
        return ours, table & earlier if kind == "topk" else table
    if kind == "router_w":
        table = np.zeros(ours.shape, np.float32)
        np.put_along_axis(table, arrays[name.replace("router_w", "router_idx")], theirs, axis=-1)
        return ours, table
    return ours, theirs


def differences(ours: Mapping[str, Any], arrays: Arrays) -> list[str]:
    """One line for every array that is not the same."""
    lines = []
    for name, value in ours.items():
        mine, theirs = comparable(name, arrays[name], arrays, value)
        if mine.shape != theirs.shape:
            lines.append(f"{name}: shape {mine.shape}, expected {theirs.shape}")
        elif theirs.dtype == bool:
            lines += [] if np.array_equal(mine, theirs) else [f"{name}: another choice"]
        else:
            error, limit = np.abs(mine - theirs).max(), RELATIVE * np.abs(theirs).max()
            if not error <= limit:
                lines.append(f"{name}: differs by {error:.3g}, allowed {limit:.3g}")
    return lines


def through_cache(model: Any, tokens: jax.Array, chunks: list[tuple[int, int, Any]]) -> Any:
    """Logits of chunks (start, end, tokens or None for the real ones) fed one after another.

    `model` has a target and params; `test_qwen3.py` hands over its own.
    """
    prepared = model.target.prepare(model.params)
    cache, logits = model.target.init_cache(len(tokens), tokens.shape[1] + 3), []
    for start, end, other in chunks:
        rows = tokens[:, start:end] if other is None else other
        position = jnp.broadcast_to(jnp.arange(start, end), rows.shape)
        cache, states = model.target.extend(prepared, cache, Rows(rows, position))
        logits.append(model.target.logits(prepared, states.final_hidden))
    return logits


def expected_names(config: GlmConfig) -> set[str]:
    """Every array a fixture of this model has."""
    names = {"logits", "cached_logits", "dense_logits", "logits_a_norm_eps_1e-5", "leftpad_logits"}
    names |= {f"hf_hidden_states.{i}" for i in range(config.num_hidden_layers + 1)}
    for i, (indexer, mlp) in enumerate(config.layer_kinds):
        kinds = ["out", "attn_out", "mlp_out", "topk"]
        kinds += ["index_scores"] if indexer == "full" else []
        kinds += ["router_logits", "router_w", "router_idx"] if mlp == "sparse" else []
        names |= {f"layer{i}.{kind}" for kind in kinds}
    return names


def test_there_is_something_to_check(golden: Path):
    assert covered_folders(golden), (
        f"no targets/* of glm_moe_dsa with model.safetensors in {golden}"
    )


def test_a_fixture_has_all_its_arrays_and_no_others(folder: Path):
    config = config_from_json(described(folder))
    assert set(arrays_of(folder)) == expected_names(config) | INPUTS | set(ABOUT_THE_FIXTURE)


def test_what_every_layer_computes_matches(folder: Path, unroll: int):
    ours, arrays = layer_arrays(load(folder, 1000), trace(folder, unroll)), arrays_of(folder)
    assert set(ours) == {name for name in arrays if name.startswith("layer")}
    assert not differences(ours, arrays)


def test_hidden_states_and_logits_match(folder: Path, unroll: int):
    ours = hidden_states(load(folder, unroll), trace(folder, unroll))
    assert not differences(ours, arrays_of(folder))


def test_logits_without_sparsity_match(folder: Path, unroll: int):
    length = arrays_of(folder)["input_ids"].shape[1]
    dense = trace(folder, unroll, index_topk=length).logits
    assert not differences({"dense_logits": dense}, arrays_of(folder))


def test_logits_with_the_epsilon_of_vllm_match(folder: Path, unroll: int):
    logits = trace(folder, unroll, latent_norm_eps=1e-5).logits
    assert not differences({"logits_a_norm_eps_1e-5": logits}, arrays_of(folder))


def test_padding_on_the_left_is_a_document_of_its_own(folder: Path, unroll: int):
    arrays = arrays_of(folder)
    real = arrays["leftpad_mask"] == 1
    ours = run(load(folder, unroll), ints(arrays["input_ids"]), arrays["leftpad_mask"]).logits
    name, theirs = "leftpad_logits", arrays["leftpad_logits"][real]
    assert not differences({name: np.asarray(ours)[real]}, {name: theirs})


def test_logits_through_the_cache_match(folder: Path, unroll: int, way: str):
    arrays, model = arrays_of(folder), load_decoded(folder, unroll, way)
    tokens, prefill = ints(arrays["input_ids"]), int(arrays["prefill_len"])
    verified = prefill + int(arrays["verify_len"])
    singles = [(i, i + 1, None) for i in range(verified, tokens.shape[1])]
    chunks = [(0, prefill, None), (prefill, verified, None), *singles]
    ours = jnp.concatenate(through_cache(model, tokens, chunks), axis=1)
    assert not differences({"cached_logits": ours}, arrays)


def test_rejected_rows_leave_no_trace_once_overwritten(folder: Path, unroll: int, way: str):
    arrays, model = arrays_of(folder), load_decoded(folder, unroll, way)
    tokens, start = ints(arrays["input_ids"]), int(arrays["prefill_len"])
    end = start + int(arrays["verify_len"])
    kept = start + 2
    refused = (tokens[:, start:end] + 7) % model.config.vocab_size
    refused = refused.at[:, :2].set(tokens[:, start:kept])
    chunks = [(0, start, None), (start, end, refused), (kept, end, None), (end, end + 1, None)]
    before, proposed, after, last = through_cache(model, tokens, chunks)
    ours = jnp.concatenate([before, proposed[:, :2], after, last], axis=1)
    theirs = {"cached_logits": arrays["cached_logits"][:, : end + 1]}
    assert not differences({"cached_logits": ours}, theirs)


def test_tensors_come_back_as_they_were_read(folder: Path, unroll: int):
    model, tensors = load(folder, unroll), load_file(folder / "model.safetensors")
    back = tensors_from_params(model.config, model.params)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
