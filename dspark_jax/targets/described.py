"""What every family's config.json has in common: required keys, constants, rotary positions.

A key that is null is as good as absent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, NoReturn


def required(config: Mapping[str, Any], kind: Any, derived: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of dataclass `kind` that config.json holds, lists as tuples.

    Raises ValueError naming the keys without a default that are absent, and on one of another type;
    `derived` are read apart.
    """
    fields = {n: f for n, f in kind.__dataclass_fields__.items() if n not in derived}
    absent = [n for n, f in fields.items() if f.default is MISSING and config.get(n) is None]
    if absent:
        raise ValueError(f"config.json lacks {', '.join(absent)}; use the model's own file.")
    return {n: _typed(n, config[n], f.type) for n, f in fields.items() if config.get(n) is not None}


def _typed(key: str, value: Any, wanted: Any) -> Any:
    """A value of the type that its field has."""
    if wanted is int:
        return whole(key, value, 0)
    if wanted is float:
        return number(key, value)
    if wanted is bool:
        return value if isinstance(value, bool) else refuse(key, value, "true or false is")
    if not isinstance(value, list):
        refuse(key, value, "a list of whole numbers is")
    return tuple(whole(key, one, 0) for one in value)


def whole(key: str, value: Any, least: int) -> int:
    """A whole number; ValueError when it is none or too small."""
    if type(value) is not int or value < least:
        refuse(key, value, f"a whole number from {least} is")
    return value


def number(key: str, value: Any) -> float:
    """A finite positive number, or zero; ValueError when it is none."""
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        refuse(key, value, "a number is")
    return float(value)


def refuse(key: str, value: Any, needed: str) -> NoReturn:
    """Raise ValueError on what a key of config.json holds."""
    raise ValueError(
        f"config.json has {key} {value!r}, but {needed} needed; use the model's own file."
    )


def check_constants(config: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Raise ValueError when config.json asks for what the model here does not vary."""
    other = {k: config[k] for k, v in constants.items() if config.get(k) not in (None, v)}
    if other:
        needed = {key: constants[key] for key in other}
        raise ValueError(f"config.json asks for {other}, but targets here have {needed}.")


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary positions, from `rope_parameters` first; no scaling is supported."""
    rope = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key)
        if not isinstance(given, Mapping | None):
            refuse(key, given, "an object is")
        rope |= {name: value for name, value in (given or {}).items() if value is not None}
    kind, theta = rope.get("rope_type") or rope.get("type") or "default", rope.get("rope_theta")
    if kind != "default" or theta is None:
        raise ValueError(
            f"config.json has rotary positions of type {kind!r} with theta {theta}; "
            "targets here need type 'default' and a rope_theta."
        )
    return number("rope_theta", theta)
