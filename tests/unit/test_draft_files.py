"""A draft that cannot be written is one sentence with its path, and writing it again works."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.train.draft_files import write_files

TENSORS = {"a": np.arange(2**14, dtype=np.float32)}


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json"])
def test_a_full_disk_is_an_oserror_with_the_path_and_a_rerun_works(broken: str, tmp_path: Path):
    folder = tmp_path / "draft.partial"
    described = {"key": "x" * (2**18 if broken == "config.json" else 1)}
    with (
        small_files(2**17 if broken == "config.json" else 2**12),
        pytest.raises(OSError, match=f"draft {folder} cannot be written: .") as raised,
    ):
        write_files(folder, described, TENSORS)
    assert "\n" not in str(raised.value)
    write_files(folder, described, TENSORS)
    assert np.array_equal(load_file(folder / "model.safetensors")["a"], TENSORS["a"])
