"""What every family's config.json has in common: required keys, constants, rotary positions."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any


def required(config: Mapping[str, Any], kind: Any, derived: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of dataclass `kind` that config.json holds, lists as tuples.

    Raises ValueError naming the keys without a default that are absent; `derived` are read apart.
    """
    fields = {n: f for n, f in kind.__dataclass_fields__.items() if n not in derived}
    absent = [n for n, f in fields.items() if f.default is MISSING and config.get(n) is None]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; use the model's own file.")
    found = {name: config[name] for name in fields if config.get(name) is not None}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}


def check_constants(config: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Raise ValueError when config.json asks for what the model here does not vary."""
    other = {k: config[k] for k, v in constants.items() if config.get(k, v) != v}
    if other:
        needed = {key: constants[key] for key in other}
        raise ValueError(f"config.json asks for {other}, but targets here have {needed}.")


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary positions, from `rope_parameters` first; no scaling is supported."""
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, theta = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta")
    if kind != "default" or theta is None:
        raise ValueError(
            f"config.json has rotary positions of type {kind!r} with theta {theta}; "
            "targets here need type 'default' and a rope_theta."
        )
    return float(theta)
