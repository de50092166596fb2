"""calibration.json beside a draft's weights: the temperatures that its confidences are divided by.

No published format has a place for them, so they lie in a file of their own that goes with the
draft wherever it is converted to. A draft without it is taken at its word.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dspark_jax.calibrate import Calibration

NAME = "calibration.json"


def described(calibration: Calibration) -> dict[str, Any]:
    """What the file and a run's report say: errors of survival are position by position."""
    return {
        "temperatures": [round(float(t), 6) for t in calibration.temperatures],
        "survival_error": {
            "before": [round(float(x), 6) for x in calibration.before],
            "after": [round(float(x), 6) for x in calibration.after],
        },
        "rounds": calibration.rounds,
    }


def write(folder: Path, calibration: Calibration) -> Path:
    """Write the file whole or not at all; its path. Raises OSError when it cannot be written."""
    path, partial = folder / NAME, folder / f".{NAME}.partial"
    try:
        partial.write_text(json.dumps(described(calibration), indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); copy the draft to a folder of "
            "your own and calibrate it there."
        ) from error
    return path


def read(folder: Path, draft_length: int) -> Float[np.ndarray, "G"] | None:
    """The temperatures beside a draft, None where there are none; ValueError on a broken file."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        found = np.array(json.loads(path.read_text())["temperatures"], float)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = np.zeros(0)
    if found.shape != (draft_length,) or not np.all(np.isfinite(found) & (found > 0)):
        raise ValueError(
            f"{path} does not give {draft_length} positive temperatures, one for every drafted "
            "position; delete it, and fit them anew with `python -m dspark_jax.serve --calibrate`."
        )
    return found


def carry(source: Path, folder: Path, draft_length: int) -> None:
    """Copy the file, if there is one, to where a draft is written; ValueError when it is broken."""
    if read(source, draft_length) is not None:
        shutil.copyfile(source / NAME, folder / NAME)
