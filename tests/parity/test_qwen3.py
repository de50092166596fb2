"""Our Qwen3 against the PyTorch one: every array of every `--golden`/targets/*/golden.npz of one.

Everything is checked twice, with layers run one by one and with layers stacked and scanned.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dspark_jax.config import Qwen3Config
from dspark_jax.stack import members
from dspark_jax.targets.families import make_target, read_config
from dspark_jax.targets.qwen3 import Qwen3
from dspark_jax.targets.residual import Choices
from dspark_jax.targets.weights import params_from_tensors, shape_of, tensors_from_params
from dspark_jax.types import Target
from tests.parity.test_glm import RELATIVE, Arrays, arrays_of, described, ints, through_cache

INPUTS = {"input_ids", "prefill_len", "verify_len", "leftpad_mask", "leftpad_positions"}


class Model(NamedTuple):
    """A target with its parameters, every residual stream captured."""

    config: Qwen3Config
    target: Target
    params: Any


def folders_of(golden: Path) -> list[Path]:
    every = sorted(path.parent for path in golden.glob("targets/*/golden.npz"))
    return [folder for folder in every if described(folder)["model_type"].startswith("qwen3")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "folder" in metafunc.fixturenames:
        folders = folders_of(metafunc.config.option.golden)
        metafunc.parametrize("folder", folders, ids=lambda folder: folder.name)
    if "unroll" in metafunc.fixturenames:
        metafunc.parametrize("unroll", [1000, 0], ids=["one_by_one", "scanned"])


@lru_cache(maxsize=8)
def load(folder: Path, unroll: int) -> Model:
    layers = described(folder)["num_hidden_layers"]
    config = read_config(
        described(folder), unroll_layers=unroll, aux_layer_ids=tuple(range(layers + 1))
    )
    assert isinstance(config, Qwen3Config)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    params = params_from_tensors(config, shapes, tensors.__getitem__)
    target = make_target(config)
    compiled = target._replace(trace=jax.jit(target.trace), extend=jax.jit(target.extend))
    return Model(config, compiled, params)


def run(model: Model, tokens: jax.Array, segment: Any, position: Any) -> tuple[Any, Any, Any]:
    """(residual streams 0..L, choices per layer, logits) of whole rows."""
    states, choices = model.target.trace(model.params, tokens, ints(segment), ints(position))
    streams = states.aux_hidden.reshape(*tokens.shape, -1, states.final_hidden.shape[-1])
    logits = model.target.unembed(model.params, states.final_hidden)
    return jnp.moveaxis(streams, 2, 0), by_layer(model.config, choices), logits


def by_layer(config: Qwen3Config, choices: list[Any]) -> list[Choices]:
    """Choices in the order of the layers, taken out of their groups."""
    found = {}
    for group, member, repeat, layer in members(shape_of(config).groups):
        choice = choices[group][member]
        found[layer] = choice if repeat is None else jax.tree.map(lambda x, r=repeat: x[r], choice)
    return [found[layer] for layer in range(config.num_hidden_layers)]


def everything(folder: Path, unroll: int) -> dict[str, Any]:
    """Our version of every array but those through the cache."""
    model, arrays = load(folder, unroll), arrays_of(folder)
    tokens = ints(arrays["input_ids"])
    plain = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    streams, choices, logits = run(model, tokens, np.ones(tokens.shape), plain)
    graphdef, _ = nnx.split(shape_of(model.config))
    normed = nnx.merge(graphdef, model.params, copy=True).norm(streams[-1])
    ours = {"logits": logits, f"hf_hidden_states.{len(choices)}": normed}
    for i, choice in enumerate(choices):
        ours |= {f"hf_hidden_states.{i}": streams[i], f"layer{i}.out": streams[i + 1]}
        if choice.routing is not None:
            flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), choice.routing)
            ours |= {
                f"layer{i}.router_logits": flat.logits,
                f"layer{i}.router_idx": flat.expert,
                f"layer{i}.router_w": jnp.take_along_axis(flat.weight, flat.expert, -1),
            }
    padded = run(model, tokens, arrays["leftpad_mask"], arrays["leftpad_positions"])[2]
    real = arrays["leftpad_mask"] == 1
    return ours | {"leftpad_logits": np.where(real[..., None], padded, arrays["leftpad_logits"])}


def differences(ours: Mapping[str, Any], arrays: Arrays) -> list[str]:
    """One line for every array that is not the same; choices are exact."""
    lines = []
    for name, value in ours.items():
        mine, theirs = np.asarray(value), arrays[name]
        if mine.shape != theirs.shape:
            lines.append(f"{name}: shape {mine.shape}, expected {theirs.shape}")
        elif np.issubdtype(theirs.dtype, np.integer):
            lines += [] if np.array_equal(mine, theirs) else [f"{name}: another choice"]
        else:
            error, limit = np.abs(mine - theirs).max(), RELATIVE * np.abs(theirs).max()
            lines += [] if error <= limit else [f"{name}: differs by {error:.3g}"]
    return lines


def test_there_is_something_to_check(golden: Path) -> None:
    assert folders_of(golden), f"no targets/* of qwen3 in {golden}"


def test_every_array_matches(folder: Path, unroll: int) -> None:
    ours, arrays = everything(folder, unroll), arrays_of(folder)
    assert set(ours) | INPUTS | {"cached_logits"} == set(arrays)
    assert not differences(ours, arrays)


def test_logits_through_the_cache_match(folder: Path, unroll: int) -> None:
    arrays, model = arrays_of(folder), load(folder, unroll)
    tokens, prefill = ints(arrays["input_ids"]), int(arrays["prefill_len"])
    verified = prefill + int(arrays["verify_len"])
    singles = [(i, i + 1, None) for i in range(verified, tokens.shape[1])]
    chunks = [(0, prefill, None), (prefill, verified, None), *singles]
    ours = jnp.concatenate(through_cache(model, tokens, chunks), axis=1)
    assert not differences({"cached_logits": ours}, arrays)


def test_rejected_rows_leave_no_trace_once_overwritten(folder: Path, unroll: int) -> None:
    arrays, model = arrays_of(folder), load(folder, unroll)
    tokens, start = ints(arrays["input_ids"]), int(arrays["prefill_len"])
    end, kept = start + int(arrays["verify_len"]), start + 2
    refused = (tokens[:, start:end] + 7) % model.config.vocab_size
    refused = refused.at[:, :2].set(tokens[:, start:kept])
    chunks = [(0, start, None), (start, end, refused), (kept, end, None), (end, end + 1, None)]
    before, proposed, after, last = through_cache(model, tokens, chunks)
    ours = jnp.concatenate([before, proposed[:, :2], after, last], axis=1)
    theirs = {"cached_logits": arrays["cached_logits"][:, : end + 1]}
    assert not differences({"cached_logits": ours}, theirs)


def test_tensors_come_back_as_they_were_read(folder: Path, unroll: int) -> None:
    model, tensors = load(folder, unroll), load_file(folder / "model.safetensors")
    back = tensors_from_params(model.config, model.params)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_the_model_is_the_published_one() -> None:
    """Qwen3-8B's and Qwen3-30B-A3B's parameters, counted in the published checkpoints."""
    dense = Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128)
    sparse = Qwen3Config(
        *(151936, 2048, 6144, 48, 32, 4, 128),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    for config, parameters in (dense, 8_190_735_360), (sparse, 30_532_122_624):
        model: Qwen3 = shape_of(config)  # pyright: ignore[reportAssignmentType]
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert sum(leaf.size for leaf in leaves) == parameters
