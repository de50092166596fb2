"""Whether the last interpreted kernel had a race: the one place that knows where jax keeps it."""

from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def interpreted(**settings: Any) -> Any:
    """What a TPU kernel takes as `interpret` to run on a CPU with its copies and races checked."""
    # From jax 0.12 on a race is an error unless asked for as a finding.
    if "on_race" in pltpu.InterpretParams.__dataclass_fields__:
        settings = {"on_race": "warn"} | settings
    return pltpu.InterpretParams(detect_races=True, **settings)


def race_found() -> bool:
    """Whether the last kernel that ran `interpreted` had a race; block on its result first."""
    races = interpret_pallas_call.races
    assert races is not None, "no kernel has run with races detected"
    return bool(races.races_found)
