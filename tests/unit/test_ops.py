"""Which of kernel and reference runs an op, that it is said, and that forcing is not ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import fp8, ops
from dspark_jax.ops import Backend, backend_of


class Device:
    """As much of a device as the choice depends on."""

    def __init__(self, platform: str, capability: str | None = None):
        self.platform = platform
        if capability is not None:
            self.compute_capability = capability


def attention_inputs(d: int = 32):
    rng = np.random.default_rng(0)

    def draw(*shape: int):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    cache = draw(9, 2, 8, d), draw(9, 2, 8, d)
    pages = jnp.arange(1, 9).reshape(2, 4)
    return draw(2, 4, 4, d), draw(2, 4, 2, d), draw(2, 4, 2, d), *cache, pages, jnp.array([0, 19])


HOW = {"window": None, "causal": False}


@pytest.mark.parametrize(
    ("device", "file", "told"),
    [
        (Device("tpu"), "tpu", {}),
        (Device("gpu", "9.0"), "gpu", {"arch": "sm_90a"}),
        (Device("cuda", "10.3"), "gpu", {"arch": "sm_103a"}),
        (Device("gpu", "8.0"), None, {}),
        (Device("cpu"), None, {}),
    ],
)
def test_the_device_at_hand_names_the_kernels(device: Device, file: str | None, told: dict):
    assert backend_of(device, "auto")[:2] == (file, told)
    assert backend_of(device, "reference").file is None


def test_why_there_are_no_kernels_is_said():
    assert "8.0" in backend_of(Device("gpu", "8.0"), "auto").why_not
    assert "cpu" in backend_of(Device("cpu"), "auto").why_not


def test_a_cpu_runs_the_reference_and_says_so():
    with ops.using("auto"):
        ops.block_attention(*attention_inputs(), **HOW)
        assert ops.picked() == {"block_attention": "reference (none is for a cpu)"}
        assert "reference" in ops.told(ops.picked())


def test_forced_kernels_run_interpreted_on_a_cpu_and_agree():
    given = attention_inputs()
    with ops.using("reference"):
        expected = jax.jit(lambda *x: ops.block_attention(*x, **HOW))(*given)
    with ops.using("pallas"):
        found = jax.jit(lambda *x: ops.block_attention(*x, **HOW))(*given)
        assert ops.picked() == {"block_attention": "tpu kernel"}
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_a_contiguous_cache_is_one_page_each():
    query, key, value, keys, values, _, length = attention_inputs()
    given = (query, key, value, keys[:2], values[:2], None, jnp.minimum(length, 8))
    with ops.using("reference"):
        expected = ops.block_attention(*given, **HOW)
    with ops.using("pallas"):
        found = ops.block_attention(*given, **HOW)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_kernels_demanded_in_vain_are_an_error_and_not_the_reference():
    with ops.using("pallas"), pytest.raises(ValueError, match="block_attention.*--kernels auto"):
        ops.block_attention(*attention_inputs(d=31), **HOW)


def test_shapes_no_kernel_takes_go_to_the_reference_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ops, "backend_of", lambda *_: Backend("tpu", {"interpret": True}))
    with ops.using("auto"):
        ops.block_attention(*attention_inputs(d=31), **HOW)
        assert "31" in ops.picked()["block_attention"]


def test_a_stacked_fp8_matrix_is_multiplied_by_the_kernel_as_by_the_reference():
    rng = np.random.default_rng(1)
    stack = fp8.quantise(jnp.asarray(rng.standard_normal((3, 256, 384)), jnp.float32), (128, 128))
    x = jnp.asarray(rng.standard_normal((2, 5, 256)), jnp.float32)
    one = fp8.BlockScaled(stack.values, stack.scales, stack.block, jnp.int32(2))
    expected = x @ fp8.dequantise(one, jnp.float32)
    for choice in ("reference", "pallas"):
        with ops.using(choice):
            np.testing.assert_allclose(fp8.matmul(x, one), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [96, 128, 200])
def test_cache_rows_are_as_wide_as_a_tpu_copies_them(size: int, monkeypatch: pytest.MonkeyPatch):
    assert ops.row_width(size) == size
    monkeypatch.setattr(ops, "default_device", lambda: Device("tpu"))
    assert ops.row_width(size) == -(-size // 128) * 128
