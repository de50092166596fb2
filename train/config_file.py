"""config.json of a run: written beside its results, read back, compared on resume."""

import dataclasses
import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dspark_jax.train.settings import TrainSettings

NOT_COMPARED = ("output", "keeping")
"""Settings that may change when a run goes on: they change nothing of what is learnt."""


def to_json(settings: TrainSettings) -> dict[str, Any]:
    """Plain values of all settings, groups as objects."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def write_config(settings: TrainSettings, path: Path) -> None:
    """Write config.json whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(to_json(settings), indent=1) + "\n")
    os.replace(partial, path)


def read_config(path: Path) -> TrainSettings:
    """Settings of a config.json, which may leave out what has a default.

    Raises ValueError on a missing file, a setting that does not exist or has the wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # slow to import

    path = path / "config.json" if path.is_dir() else path
    values = _object(path)
    strict = ConfigDict(extra="forbid")
    for kind in (TrainSettings, *_groups()):
        kind.__pydantic_config__ = strict  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return TypeAdapter(TrainSettings).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ValueError(
                f"config {path} has a setting {name!r} that does not exist"
                f"{_suggestion(name.split('.')[-1])}."
            ) from None
        raise ValueError(
            f"config {path} has {name or 'a value'} = {first['input']!r}: {first['msg']}."
        ) from None


def differences(ours: TrainSettings, path: Path) -> list[str]:
    """One line for every setting in which a folder's config.json differs from this run's.

    What it lacks has its default there, as in `read_config`.
    """
    try:
        theirs = _object(path)
    except ValueError as error:
        return [str(error).rstrip(".")]
    left, right, default = flat(to_json(ours)), flat(theirs), flat(to_json(TrainSettings()))
    names = [n for n in sorted(left | right) if n.split(".")[0] not in NOT_COMPARED]
    found = [
        f"{name} is {left[name] if name in left else 'no setting'} here and {right[name]} there"
        for name in names
        if name in right and (name not in left or left[name] != right[name])
    ]
    lacking = [n for n in names if n not in right and left[n] != default[n]]
    return found + ([f"{path} lacks {', '.join(lacking)}"] if lacking else [])


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config {path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"config {path} holds a {type(values).__name__}, not an object; give the config.json "
            "of a run."
        )
    return values


def _groups() -> list[type]:
    fields = dataclasses.fields(TrainSettings)
    return [f.type for f in fields if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)]


def _suggestion(name: str) -> str:
    names = [f.name for kind in (TrainSettings, *_groups()) for f in dataclasses.fields(kind)]
    close = get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else "; see --help for those that do"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups taken apart: `draft.num_layers`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "loss_weights":
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
