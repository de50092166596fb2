"""GLM checkpoints: config.json and tensor names <-> this package's config and parameters."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import TargetConfig
from dspark_jax.stack import members
from dspark_jax.targets.glm import Glm

ARCHITECTURE = "GlmMoeDsaForCausalLM"
CONSTANTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "indexer_rope_interleave": True,
    "n_group": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
"""What a GLM-5.x config.json says and the model here does not vary."""
Layout = Literal["plain", "transposed", "experts_in", "experts_out"]


class Entry(NamedTuple):
    """One checkpoint tensor: its name and shape there, and where it goes here."""

    name: str
    shape: tuple[int, ...]
    path: tuple[Any, ...]
    layout: Layout
    place: tuple[Any, ...]
    """Place inside the parameter: (repeat,) of a stacked layer, then the expert."""


def config_from_json(config: Mapping[str, Any], **overrides: Any) -> TargetConfig:
    """Read a `glm_moe_dsa` config.json.

    `indexer_types` wins over `index_topk_pattern` ("FSSF…"), which wins over frequency and offset;
    rope_theta comes from `rope_parameters` first. Raises ValueError on another architecture.
    """
    if config.get("model_type") != "glm_moe_dsa":
        raise ValueError(
            f"architecture {config.get('model_type')!r} is not supported; "
            "supported is 'glm_moe_dsa'."
        )
    other = {k: config[k] for k, v in CONSTANTS.items() if config.get(k, v) != v}
    if other:
        needed = {key: CONSTANTS[key] for key in other}
        raise ValueError(f"config.json asks for {other}, but targets here have {needed}.")
    fields = TargetConfig.__dataclass_fields__
    read = {name for name in fields if name not in ("indexer_types", "rope_theta")}
    absent = [n for n in fields if n in read and fields[n].default is MISSING and n not in config]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; use the model's own file.")
    values = {name: config[name] for name in read & config.keys()}
    values["rope_theta"] = _rope_theta(config)
    values["indexer_types"] = _indexer_types(config)
    return TargetConfig(**(values | overrides))


def _rope_theta(config: Mapping[str, Any]) -> float:
    rope = {**config, **(config.get("rope_parameters") or {})}
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    if kind != "default" or theta is None:
        raise ValueError(
            f"config.json has rotary positions of type {kind!r} with theta {theta}; "
            "targets here need type 'default' and a rope_theta."
        )
    return float(theta)


def _indexer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers = config["num_hidden_layers"]
    if types := config.get("indexer_types"):
        return tuple(types)
    if pattern := config.get("index_topk_pattern"):
        return tuple("full" if letter == "F" else "shared" for letter in pattern)
    every, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 1)
    return tuple("full" if max(i - offset + 1, 0) % every == 0 else "shared" for i in range(layers))


def config_to_json(config: TargetConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """The config.json that transformers reads; the inverse of `config_from_json`."""
    ours = ("indexer_types", "rope_theta", "latent_norm_eps", "aux_layer_ids", "unroll_layers")
    plain = {k: getattr(config, k) for k in config.__dataclass_fields__ if k not in ours}
    return plain | {
        "architectures": [ARCHITECTURE],
        "model_type": "glm_moe_dsa",
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,
        "indexer_types": list(config.indexer_types),
        "mlp_layer_types": [mlp for _, mlp in config.layer_kinds],
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        **CONSTANTS,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": "bfloat16",
    }


def entries(config: TargetConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint: the one table that reading and writing both walk."""
    glm = nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(glm, nnx.Param)))
    for path, param in flat.items():
        if path[0] != "layers":
            yield from _tensors(("model",) if path[0] != "lm_head" else (), path, param.shape, ())
    for g, member, repeat, layer in members(glm.groups):
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
        experts_first = path[-1] == "down_proj"
        layout: Layout = "experts_out" if experts_first else "experts_in"
        count = shape[0] if experts_first else shape[1]
        one = shape[:0:-1] if experts_first else (shape[2], shape[0])
        base = ".".join((*prefix, *path[:-1]))
        for expert in range(count):
            place = (*index, expert) if experts_first else (*index, slice(None), expert)
            yield Entry(f"{base}.{expert}.{path[-1]}.weight", one, full, layout, place)
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

    Layers past `num_hidden_layers` (multi-token prediction) are skipped. Every missing, extra or
    mis-shaped tensor is listed in one ValueError before the first is read.
    """
    table = list(entries(config))
    _check(config, {e.name: e.shape for e in table}, shapes)
    glm = nnx.eval_shape(lambda: Glm(config, rngs=nnx.Rngs(0)))
    state = nnx.state(glm, nnx.Param)
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


def _check(
    config: TargetConfig,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    def beyond(name: str) -> bool:
        parts = name.split(".")
        return parts[:2] == ["model", "layers"] and int(parts[2]) >= config.num_hidden_layers

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
