"""Without hardware: the FP8, drafting and judging kernels compile for every TPU, at full size."""

from functools import partial
from typing import Any

import pytest

from dspark_jax.pallas_kernels.acceptance import tpu as acceptance
from dspark_jax.pallas_kernels.fp8_experts import tpu as fp8_experts
from dspark_jax.pallas_kernels.fp8_matmul import tpu as fp8_matmul
from dspark_jax.pallas_kernels.markov import tpu as markov
from tests.aot.compile import MARKS, TOPOLOGIES, Kernel, compile_kernel, shape, vmem_bytes

pytestmark = MARKS

BLOCK, LAYERS, BATCH = (128, 128), 3, 64


def matrix(*lead: int, size_in: int, size_out: int) -> tuple[Any, Any]:
    """One matrix in FP8, or stacked ones, and its scales."""
    blocks = -(-size_in // BLOCK[0]), -(-size_out // BLOCK[1])
    return (
        shape(*lead, size_in, size_out, dtype="float8_e4m3fn"),
        shape(*lead, *blocks, dtype="float32"),
    )


def product(R: int, size_in: int, size_out: int, name: str = "fp8_matmul") -> Kernel:
    """One of a stack of layers by R rows."""
    kernel = matrix(LAYERS, size_in=size_in, size_out=size_out)
    function = partial(getattr(fp8_matmul, name), block=BLOCK)
    return Kernel(function, (shape(R, size_in), *kernel, shape(dtype="int32")))


def experts(R: int, E: int, size_in: int, size_out: int) -> Kernel:
    """The experts of one of a stack of layers by R rows."""
    kernel = matrix(LAYERS, E, size_in=size_in, size_out=size_out)
    function = partial(fp8_experts.fp8_experts, block=BLOCK)
    sizes = shape(E, dtype="int32")
    return Kernel(function, (shape(R, size_in), *kernel, sizes, shape(dtype="int32")))


def step(B: int, r: int, Vd: int, slots: int = 7) -> Kernel:
    """One slot of a drafted block."""
    words, scalar = shape(B, 2, dtype="uint32"), shape(dtype="int32")
    arrays = (shape(slots, B, Vd, dtype="float32"), shape(B, r), shape(r, Vd))
    return Kernel(markov.markov_step, (*arrays, words, shape(B, dtype="float32"), scalar, scalar))


def statistics(B: int, S: int, V: int) -> Kernel:
    """All rows that a step verifies."""
    logits, tokens = shape(B, S, V, dtype="float32"), shape(B, S, dtype="int32")
    return Kernel(acceptance.row_statistics, (logits, tokens, shape(B, dtype="float32")))


def draw(B: int, V: int, Vd: int) -> Kernel:
    """One row of every sequence."""
    sums = shape(B, dtype="float32")
    arrays = (shape(B, V, dtype="float32"), shape(B, Vd, dtype="float32"), sums, sums)
    rest = (shape(B, dtype="bool"), shape(B, 2, dtype="uint32"), sums)
    ids = () if V == Vd else (shape(Vd, dtype="int32"),)
    return Kernel(acceptance.residual_draw, (*arrays, *rest, *ids))


GLM = [(6144, 2048), (2048, 16384), (6144, 576), (16384, 6144), (6144, 12288), (12288, 6144)]
SHARDS = [(512, 3584), (6144, 1536), (1536, 6144), (256, 6144)]
"""Of eight devices, and an expert's down projection."""
QWEN3 = [(4096, 12288), (4096, 1024)]
REDUCED = "residual_draw, Qwen3-8B, a reduced vocabulary"
KERNELS = {
    **{f"fp8_matmul, {i} to {o}": product(64, i, o) for i, o in (*GLM, *SHARDS, *QWEN3)},
    "fp8_matmul of one row, 6144 to 576": product(1, 6144, 576),
    "fp8_matmul of 512 rows, 16384 to 6144": product(512, 16384, 6144),
    "fp8_matmul, a prompt": product(4096, 6144, 12288),
    "fp8_matmul_w8a8, 6144 to 12288": product(64, 6144, 12288, "fp8_matmul_w8a8"),
    "fp8_matmul_w8a8, 16384 to 6144": product(64, 16384, 6144, "fp8_matmul_w8a8"),
    "fp8_matmul_w8a8, 6144 to 576": product(64, 6144, 576, "fp8_matmul_w8a8"),
    "fp8_matmul_w8a8, a prompt": product(1024, 6144, 12288, "fp8_matmul_w8a8"),
    "fp8_experts, 2 of 256": experts(64, 2, 6144, 2048),
    "fp8_experts, 32 of 256": experts(1024, 32, 6144, 2048),
    "fp8_experts, 32 of 256, down": experts(1024, 32, 2048, 6144),
    "fp8_experts, all of 256": experts(4096, 256, 6144, 2048),
    "markov_step, GLM-5.2": step(BATCH, 256, 154880),
    "markov_step, Qwen3-8B": step(BATCH, 256, 151936),
    "markov_step, a reduced vocabulary": step(8, 256, 32000),
    "row_statistics, GLM-5.2": statistics(BATCH, 8, 154880),
    "row_statistics, Qwen3-8B, five rows": statistics(BATCH, 5, 151936),
    "residual_draw, GLM-5.2": draw(BATCH, 154880, 154880),
    REDUCED: draw(BATCH, 151936, 32000),
}

ODD = {
    "fp8_matmul": product(3, 200, 72),
    "fp8_matmul, two tiles of rows": product(530, 384, 130),
    "fp8_matmul, beyond the last tile": product(40, 2496, 1216),
    "fp8_matmul_w8a8": product(7, 2496, 1216, "fp8_matmul_w8a8"),
    "fp8_experts": experts(5, 3, 200, 130),
    "fp8_experts, two tiles of rows": experts(2000, 300, 200, 200),
    "markov_step": step(3, 17, 777),
    "markov_step, many sequences": step(1024, 256, 5000),
    "row_statistics": statistics(11, 9, 2049),
    "row_statistics, many sequences": statistics(200, 5, 300),
    "residual_draw": draw(11, 2049, 2049),
    "residual_draw, many sequences": draw(70, 600, 70),
}
"""Sizes that no model has and no kernel refuses."""


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_compile_too(name: str, topology: str):
    assert vmem_bytes(compile_kernel(ODD[name], topology)) < 48 * 2**20


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_and_fits(name: str, topology: str):
    compiled = compile_kernel(KERNELS[name], topology)
    assert 0 < vmem_bytes(compiled) < 48 * 2**20
    # Beside its results a call writes nothing the size of a layer: no matrix is turned round, or
    # taken out of its stack of three. XLA brings a reduced vocabulary to the target's first.
    if name != REDUCED:
        read = sum(x.size * x.dtype.itemsize for x in KERNELS[name].shapes)
        assert compiled.memory_analysis().temp_size_in_bytes < max(2**20, read / 4)
