"""`tests/interop/set-up` tells what cannot be downloaded (exit code 75) from what is broken."""

import os
import subprocess
from pathlib import Path

import pytest

SET_UP = Path(__file__).parents[1] / "interop" / "set-up"
PYTHON = """#!/usr/bin/env bash
mkdir -p "$3/bin"
printf '#!/usr/bin/env bash\\necho "ERROR: $SAID" >&2\\nexit 1\\n' >"$3/bin/python"
chmod +x "$3/bin/python"
"""


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("No matching distribution found for vllm==0.33.0", 75),
        ("HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded", 75),
        ("Could not install packages due to an OSError: No space left on device", 1),
        ("Invalid requirement: 'msgspec=='", 1),
    ],
)
def test_only_what_cannot_be_downloaded_is_forgiven(said: str, code: int, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "SAID": said}
    done = subprocess.run(
        [SET_UP, tmp_path / "venv"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code and said in done.stderr
