"""A part of a stored tensor is what numpy cuts from it, for no more bytes than it needs."""

import itertools
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.checkpoints.header import Stored
from dspark_jax.checkpoints.read import needed_bytes, read
from dspark_jax.checkpoints.shards import stored_tensors

KINDS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "int32", "int64", "uint8"]


def stored(folder: Path, tensor: np.ndarray) -> Stored:
    """The tensor in a file, behind another one."""
    save_file({"a": np.arange(7, dtype=np.int8), "t": tensor}, folder / "model.safetensors")
    return stored_tensors(folder)["t"]


def cost(tensor: Stored, *index: slice) -> int:
    """Bytes read for a part, which are those foretold."""
    seen: list[int] = []
    read(tensor, index, seen.append)
    assert sum(seen) == needed_bytes(tensor, index)
    return sum(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, kind: str):
    tensor = np.arange(60).reshape(12, 5).astype(jnp.dtype(kind))
    part = read(stored(tmp_path, tensor), (slice(2, 9), slice(1, 4)))
    assert part.dtype == tensor.dtype
    assert part.tobytes() == tensor[2:9, 1:4].tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (9,), (6, 5), (3000, 8), (4, 3, 2500), (3, 2, 2, 5)])
def test_any_part_of_any_shape_is_numpys(tmp_path: Path, shape: tuple[int, ...]):
    tensor = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    where, chance = stored(tmp_path, tensor), random.Random(0)
    for _ in range(20):
        ends = [sorted(chance.choices(range(n + 1), k=2)) for n in shape]
        index = tuple(itertools.starmap(slice, ends))
        np.testing.assert_array_equal(read(where, index), tensor[index])
        cost(where, *index)
    whole = (slice(None),) * len(shape)
    np.testing.assert_array_equal(read(where, whole), tensor)


def test_a_part_costs_the_bytes_that_it_needs(tmp_path: Path):
    matrix = stored(tmp_path, np.zeros((64, 8192), jnp.bfloat16))
    every = slice(None)
    assert cost(matrix, every, every) == matrix.nbytes
    assert cost(matrix, slice(8, 16), every) == matrix.nbytes // 8
    assert cost(matrix, every, slice(4096, None)) == matrix.nbytes // 2
    assert cost(matrix, slice(16), slice(4096)) == matrix.nbytes // 8
    assert cost(matrix, slice(3, 3), every) == 0


def test_runs_shorter_than_a_page_cost_their_rows(tmp_path: Path):
    matrix = stored(tmp_path, np.zeros((5000, 1024), jnp.bfloat16))
    assert cost(matrix, slice(None), slice(512)) == matrix.nbytes
    assert cost(matrix, slice(1000), slice(512)) == matrix.nbytes // 5


def test_a_file_that_shrank_is_refused(tmp_path: Path):
    where = stored(tmp_path, np.zeros((4, 4), np.float32))
    where.path.write_bytes(where.path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="tensor t of .* cannot be read: the file ends at byte"):
        read(where, (slice(None), slice(None)))
    where.path.unlink()
    with pytest.raises(ValueError, match="tensor t of .* cannot be read: .*No such file"):
        read(where, (slice(None), slice(None)))
