"""Tables of a config.json's keys, walked in either direction.

A table has one row per key, by its dotted path. Reading gathers the settings its rows hold; writing
gives every row its value. What a row holds is a setting of the draft, a consequence of other
settings, or something that changes no number and is only kept.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from dspark_jax.config import DraftConfig


@dataclass(frozen=True)
class Described:
    """A draft as its config.json tells of it."""

    config: DraftConfig
    target_name: str | None = None
    """Hub id of the target, where the format has room for it."""
    target_architectures: tuple[str, ...] = ()
    num_target_layers: int | None = None
    dtype: str | None = None
    target_sha256: str | None = None


class Nothing:
    """The value of a key that is left out."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = Nothing()


class Key(NamedTuple):
    """One key of a config.json."""

    path: str
    write: Callable[[Described], Any]
    """Its value; NOTHING leaves it out."""
    fits: Callable[[Any, Described], bool]
    """Whether a value that was found says the same as the rest."""
    setting: str | None = None
    """Field of DraftConfig or of Described that it gives."""
    read: Callable[[Any], Any] = lambda value: value
    needed: bool = False
    strict_only: bool = True
    """Whether a misfit matters only to a conversion, not to reading the draft."""


def setting(
    path: str,
    name: str,
    read: Callable[[Any], Any],
    write: Callable[[Any], Any] = lambda value: value,
    *,
    needed: bool = True,
    fresh: bool = True,
) -> Key:
    """A key that holds the setting `name`; `fresh` False: understood, but not written anew."""

    def fits(found: Any, said: Described) -> bool:
        return read(found) == value_of(said, name)

    def value(said: Described) -> Any:
        return write(value_of(said, name)) if fresh else NOTHING

    return Key(path, value, fits, name, read, needed)


def constant(path: str, value: Any) -> Key:
    """A key whose only supported value is this one."""
    return Key(path, lambda said: value, lambda found, said: found == value, strict_only=False)


def derived(
    path: str,
    write: Callable[[Described], Any],
    fits: Callable[[Any, Described], bool] | None = None,
) -> Key:
    """A key that follows from the settings; another value contradicts them."""
    return Key(path, write, fits or (lambda found, said: found == write(said)))


def kept(path: str, value: Any = NOTHING) -> Key:
    """A key that changes no number of a draft; `value` is what is written anew."""
    return Key(path, lambda said: value, lambda found, said: True)


def value_of(said: Described, name: str) -> Any:
    """A field of the draft's settings or of what else is told."""
    return getattr(said if name in TOLD else said.config, name)


TOLD = {field.name for field in fields(Described)} - {"config"}


def gather(table: Sequence[Key], described: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a config.json gives.

    Raises ValueError when two keys give one setting different values.
    """
    flat = dict(_flat(described, _containers(table)))
    found: defaultdict[str, list[tuple[str, Any]]] = defaultdict(list)
    for key in table:
        if key.setting is not None and key.path in flat:
            found[key.setting].append((key.path, _read(key, flat[key.path])))
    for name, given in found.items():
        if any(value != given[0][1] for _, value in given):
            told = " and ".join(f"{path} {flat[path]!r}" for path, _ in given)
            raise ValueError(
                f"config.json contradicts itself on {name}: it has {told}; keep the right one."
            )
    return {name: given[0][1] for name, given in found.items()}


def described_by(settings: Mapping[str, Any]) -> Described:
    """The draft that gathered settings make; ValueError when they make none."""
    told = {name: value for name, value in settings.items() if name in TOLD}
    rest = {name: value for name, value in settings.items() if name not in TOLD}
    return Described(DraftConfig(**{n: v for n, v in rest.items() if v is not NOTHING}), **told)


def check_needed(table: Sequence[Key], settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming every key without which a draft is not described."""
    lacking: dict[str, str] = {}
    for key in table:
        if key.needed and key.setting is not None and key.setting not in settings:
            lacking.setdefault(key.setting, key.path)
    if lacking:
        raise ValueError(
            f"config.json lacks {', '.join(lacking.values())}; drafts here need it: add what the "
            "draft was trained with."
        )


def misfits(
    table: Sequence[Key], described: Mapping[str, Any], said: Described, strict: bool
) -> list[str]:
    """Every key whose value is not supported or contradicts the others, with what is needed."""
    flat = dict(_flat(described, _containers(table)))
    return [
        f"{key.path} {flat[key.path]!r}{_instead(key.write(said))}"
        for key in table
        if key.path in flat
        and key.setting is None
        and (strict or not key.strict_only)
        and not key.fits(flat[key.path], said)
    ]


def _instead(value: Any) -> str:
    return "" if value is NOTHING else f" where {value!r} is needed"


def unknown(table: Sequence[Key], described: Mapping[str, Any]) -> list[str]:
    """Every key that the table does not have."""
    known, containers = {key.path for key in table}, _containers(table)
    return [
        path
        for path, value in _flat(described, containers)
        if path not in known and not (path in containers and not value)
    ]


def write(table: Sequence[Key], said: Described) -> dict[str, Any]:
    """A config.json with every key explicit."""
    return _nested({key.path: value for key in table if (value := key.write(said)) is not NOTHING})


def altered(
    table: Sequence[Key], described: Mapping[str, Any], said: Described, config: DraftConfig
) -> list[tuple[str, Any, Any]]:
    """(path, value found, value needed) of every key that other settings of the draft change."""
    flat, after = dict(_flat(described, _containers(table))), replace(said, config=config)
    found = []
    for key in table:
        old, new = key.write(said), key.write(after)
        if key.setting is not None and key.path in flat and new is NOTHING:
            old, new = value_of(said, key.setting), value_of(after, key.setting)
        written_value = flat.get(key.path, NOTHING)
        if old != new and written_value != new:
            found.append((key.path, written_value, new))
    return found


def restore(
    table: Sequence[Key], said: Described, source: Mapping[str, Any], always: Sequence[str]
) -> dict[str, Any]:
    """The config.json that a draft was read from, key for key, but for what has changed since.

    The paths `always` are written even where the source left them to its readers' defaults.
    """
    flat = dict(_flat(source, _containers(table)))
    rows = {key.path: key for key in table}
    result = {}
    for path, found in flat.items():
        fits = path not in rows or rows[path].fits(found, said)
        result[path] = found if fits else rows[path].write(said)
    result |= {path: rows[path].write(said) for path in always if path not in flat}
    return _nested({path: value for path, value in result.items() if value is not NOTHING})


def _containers(table: Sequence[Key]) -> set[str]:
    parts = [key.path.split(".") for key in table]
    return {".".join(names[:n]) for names in parts for n in range(1, len(names))}


def _flat(
    described: Mapping[str, Any], containers: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in described.items():
        path = prefix + name
        if path in containers and isinstance(value, Mapping) and value:
            yield from _flat(value, containers, path + ".")
        else:
            yield path, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        place = result
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return result


def _read(key: Key, value: Any) -> Any:
    try:
        return key.read(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has {key.path} {value!r}; {error}.") from None


def integer(value: Any) -> int:
    """A whole number."""
    if type(value) is not int:
        raise ValueError("drafts here need an integer")
    return value


def size(value: Any) -> int:
    """A positive whole number."""
    if integer(value) < 1:
        raise ValueError("drafts here need a positive integer")
    return value


def number(value: Any) -> float:
    """A positive number."""
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError("drafts here need a positive number")
    return float(value)


def boolean(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise ValueError("drafts here need true or false")
    return value


def optional(read: Callable[[Any], Any], absent: Any = None) -> Callable[[Any], Any]:
    """As `read`, null giving `absent`."""
    return lambda value: absent if value is None else read(value)


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of these words."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"drafts here know {', '.join(choices)}")
        return value

    return read


def several(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A list of what `read` reads."""

    def read_all(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError("drafts here need a list")
        return tuple(read(one) for one in value)

    return read_all


def text(value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError("drafts here need a string")
    return value
