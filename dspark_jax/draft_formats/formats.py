"""Which format a config.json is of, read whole or refused, and written."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from dspark_jax.draft_formats import dense, speculators
from dspark_jax.draft_formats.keys import (
    Described,
    Key,
    check_needed,
    described_by,
    gather,
    misfits,
    restore,
    unknown,
    write,
)
from dspark_jax.draft_formats.layer import sliding

FormatName = Literal["speculators", "deepspec", "specforge"]
Kind = Literal["speculators", "deepspec", "specforge", "dflash", "dflash of speculators"]

TABLES: Mapping[str, tuple[Key, ...]] = MappingProxyType(
    {
        "speculators": speculators.TABLE,
        "deepspec": dense.DEEPSPEC,
        "specforge": dense.SPECFORGE,
        "dflash": dense.DFLASH,
        "dflash of speculators": speculators.TABLE,
    }
)
ALWAYS = ("sample_from_anchor",)
"""Written even where a source left it out, because readers disagree on what that means."""
DFLASH_KINDS = ("dflash", "dflash of speculators")
ARCHITECTURES: Mapping[str, Kind] = MappingProxyType(
    {
        "Qwen3DSparkModel": "deepspec",
        "DSparkDraftModel": "specforge",
        "DFlashDraftModel": "dflash",
    }
)


class Reading(NamedTuple):
    """What a config.json says, and what is odd about how it says it."""

    kind: Kind
    said: Described
    unknown: list[str]
    misfits: list[str]
    notes: list[str]


def kind_of(described: Mapping[str, Any]) -> Kind:
    """The format; ValueError when the file describes no draft that is known here."""
    if "speculators_model_type" in described:
        algorithm = described["speculators_model_type"]
        if algorithm not in ("dspark", "dflash"):
            raise ValueError(
                f"config.json describes a draft of speculators' type {algorithm!r}; known here are "
                "dspark and dflash."
            )
        return "speculators" if algorithm == "dspark" else "dflash of speculators"
    architectures = described.get("architectures")
    named = [str(name) for name in architectures] if isinstance(architectures, list) else []
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"config.json describes no draft that is known here: it has no speculators_model_type and "
        f"architectures {architectures!r}; known are {', '.join(ARCHITECTURES)}."
    )


def look(described: Mapping[str, Any]) -> Reading:
    """What a config.json says, whatever else it holds; ValueError when it describes no draft."""
    kind, notes = kind_of(described), []
    table = TABLES[kind]
    if table is speculators.TABLE:
        described, notes = speculators.completed(described)
        settings = gather(table, described)
    else:
        settings = dense.completed(described, gather(table, described))
    check_needed(table, settings)
    said = described_by(settings)
    wrong = misfits(table, described, said, strict=True)
    if kind == "dflash of speculators":
        told = ("speculators_model_type", "speculators_config.algorithm")
        wrong = [line for line in wrong if line.split()[0] not in told]
    wrong += _contradictions(settings, said)
    return Reading(kind, said, unknown(table, described), wrong, notes)


def _contradictions(settings: Mapping[str, Any], said: Described) -> list[str]:
    """What no single key shows."""
    config, found = said.config, []
    windows = settings.get("sliding_window")
    if sliding(config) and type(windows) is not int:
        found.append("sliding layers but no sliding_window")
    ids = config.aux_layer_ids
    if len(set(ids)) < len(ids) or not ids or min(ids) < 0:
        found.append(f"aux layers {list(ids)}, counted by what enters them")
    deepest = said.num_target_layers
    if deepest is not None and ids and max(ids) > deepest:
        found.append(f"aux layers up to {max(ids)} of {deepest} target layers")
    return found


def read(described: Mapping[str, Any]) -> Reading:
    """As `look`; ValueError names every key that is unknown, unsupported or contradictory."""
    reading = look(described)
    if reading.misfits:
        raise ValueError(
            f"config.json has {'; '.join(reading.misfits)}: it contradicts itself or asks for what "
            "is not built here; use the file that was saved with the weights."
        )
    if reading.unknown:
        raise ValueError(
            f"config.json has keys that are not understood: {', '.join(reading.unknown)}; a draft "
            "is only converted when every key is. Remove them if you know they do not matter."
        )
    return reading


def written(
    name: FormatName, said: Described, source: tuple[Kind, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The config.json of a draft; key for key its source's, where that had the same format."""
    table = TABLES[name]
    if source is None or source[0] != name or look(source[1]).said.config != said.config:
        return write(table, said)
    return restore(table, said, source[1], ALWAYS)
