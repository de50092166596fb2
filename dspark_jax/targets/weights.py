"""Checkpoint tensors <-> parameters: one table for every family, walked in both directions."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import GlmConfig, TargetConfig
from dspark_jax.stack import members
from dspark_jax.targets.glm import Glm
from dspark_jax.targets.qwen3 import Qwen3

Layout = Literal["plain", "transposed"]


class Entry(NamedTuple):
    """One checkpoint tensor: its name and shape there, and where it goes here."""

    name: str
    shape: tuple[int, ...]
    path: tuple[Any, ...]
    layout: Layout
    place: tuple[Any, ...]
    """Place inside the parameter: (repeat,) of a stacked layer, then the expert."""


def build(config: TargetConfig, rngs: nnx.Rngs) -> Glm | Qwen3:
    """A model of this configuration with freshly drawn weights."""
    if isinstance(config, GlmConfig):
        return Glm(config, rngs=rngs)
    return Qwen3(config, rngs=rngs)


def shape_of(config: TargetConfig) -> Glm | Qwen3:
    """The model without its arrays."""
    return nnx.eval_shape(lambda: build(config, nnx.Rngs(0)))


def entries(config: TargetConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint: the one table that reading and writing both walk."""
    model = shape_of(config)
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, param in flat.items():
        if path[0] != "layers":
            yield from _tensors(("model",) if path[0] != "lm_head" else (), path, param.shape, ())
    for g, member, repeat, layer in members(model.groups):
        lead = ("layers", g, member)
        for path, param in flat.items():
            if path[:3] != lead:
                continue
            stacked = () if repeat is None else (repeat,)
            shape = param.shape[len(stacked) :]
            prefix = ("model", "layers", str(layer))
            yield from _tensors(prefix, path[3:], shape, stacked, lead)


def _tensors(
    prefix: tuple[str, ...],
    path: tuple[Any, ...],
    shape: tuple[int, ...],
    index: tuple[int, ...],
    lead: tuple[Any, ...] = (),
) -> Iterator[Entry]:
    name, full = ".".join((*prefix, *path)), (*lead, *path)
    if "experts" in path:
        base = ".".join((*prefix, *path[:-1]))
        for expert in range(shape[0]):
            one = f"{base}.{expert}.{path[-1]}.weight"
            yield Entry(one, shape[:0:-1], full, "transposed", (*index, expert))
    elif path[-1] == "kernel":
        yield Entry(name[: -len("kernel")] + "weight", shape[::-1], full, "transposed", index)
    elif path[-1] == "embed_tokens":
        yield Entry(f"{name}.weight", shape, full, "plain", index)
    else:
        yield Entry(name, shape, full, "plain", index)


def params_from_tensors(
    config: TargetConfig, shapes: Mapping[str, tuple[int, ...]], get: Callable[[str], np.ndarray]
) -> Any:
    """Parameters (float32) from a checkpoint with tensors of these shapes.

    Layers past `num_hidden_layers` (multi-token prediction) and the head of a model that ties it to
    its embedding are skipped. Every missing, extra or
    mis-shaped tensor is listed in one ValueError before the first is read.
    """
    table = list(entries(config))
    check_tensors(config, {e.name: e.shape for e in table}, shapes)
    model = shape_of(config)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    arrays = {path: np.empty(param.shape, np.float32) for path, param in flat.items()}
    for entry in table:
        value = get(entry.name).astype(np.float32)
        arrays[entry.path][entry.place] = value if entry.layout == "plain" else value.T
    flat = [(path, param.replace(jnp.asarray(arrays[path]))) for path, param in flat.items()]
    return nnx.from_flat_state(flat)


def tensors_from_params(config: TargetConfig, params: Any) -> dict[str, np.ndarray]:
    """The checkpoint's tensors of these parameters, in the parameters' own type."""
    arrays = {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(params)}
    tensors = {}
    for entry in entries(config):
        value = arrays[entry.path][entry.place]
        tensors[entry.name] = np.ascontiguousarray(value if entry.layout == "plain" else value.T)
    return tensors


def check_tensors(
    config: TargetConfig,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one ValueError that lists every missing, extra and mis-shaped tensor.

    Layers past `num_hidden_layers` (multi-token prediction) are left out, and the head of a model
    that ties it to its embedding.
    """

    def beyond(name: str) -> bool:
        parts = name.split(".")
        tied = name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False)
        numbered = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal()
        return tied or (numbered and int(parts[2]) >= config.num_hidden_layers)

    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {n}" for n in found.keys() - wanted.keys() if not beyond(n)]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if tuple(found[name]) != tuple(wanted[name])
    ]
    if problems:
        raise ValueError(
            f"{len(problems)} tensors do not match the target's config.json: "
            + "; ".join(sorted(problems))
        )
