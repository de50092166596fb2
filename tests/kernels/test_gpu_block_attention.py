"""Block attention on (interpreted) GPUs: the shapes and tolerance of the other kernels.

Shapes are those of test_block_attention.py in bfloat16, the only type that the GPU kernels take.
Tolerance: the one explained there. Tiles have 64 rows, so longer contexts are added.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.block_attention import gpu, reference
from dspark_jax.pallas_kernels.gpu_target import plgpu
from tests.kernels.gpu_interpreter import ARCHITECTURES, needs_interpreter, run
from tests.kernels.test_block_attention import CASES, TOLERANCE, Case, arrays

pytestmark = needs_interpreter

SHARED = {name: case._replace(dtype="bfloat16") for name, case in CASES.items()}
MORE = {
    "more tiles than are held": Case((430, 0), size=64, pages=7, d=96, K=2, shared=1),
    "several share a context": Case((1030,), size=64, pages=17, shared=1, K=3),
    "window of several tiles": Case(
        (300, 129), size=32, pages=10, window=150, causal=True, shared=1
    ),
}
BEYOND = Case((70, 128), size=64, pages=2)
"""Then told that the second sequence has 900 rows, as a row that is nobody's may be."""
QUICK = {"no context", "odd lengths", "more tiles than are held", "several share a context"}
REFUSED = {"pages of several tiles"}
"""Pages of 80 rows, one tile of 64 and a bit: a server's pages are powers of two."""


def settings(case: Case) -> dict[str, Any]:
    return {"window": case.window, "causal": case.causal}


def each() -> list[Any]:
    both = (SHARED | MORE).items()
    return [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in both
        if name not in REFUSED
    ]


def agrees(case: Case, found: Any, given: tuple[Any, ...]) -> bool:
    wanted = reference.block_attention(*given, **settings(case))
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    pair = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.allclose(*pair, rtol=0, atol=TOLERANCE["bfloat16"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", each())
def test_the_kernel_agrees_with_the_reference(case: Case, arch: str):
    given = arrays(case)
    assert gpu.unsupported(*given, **settings(case)) is None
    found, fault = run(gpu.block_attention, *given, **settings(case), arch=arch)
    assert not fault and agrees(case, found, given)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_context_may_be_wider_than_a_head(arch: str):
    case = Case((20,), d=32, K=2, shared=1)
    query, key, value, *context, pages, length = arrays(case)
    wide = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 32))) for x in context]
    given = (query, key, value, *wide, pages, length)
    found, fault = run(gpu.block_attention, *given, **settings(case), arch=arch)
    assert not fault and agrees(case, found, given)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_beyond_a_context_is_read_into_it(arch: str):
    """What is not visible may be anything finite, and pages that are not reached even NaN."""
    case = Case((17,), size=64, pages=3, shared=1)
    given = arrays(case)
    used = given[5][0, 0]
    beyond = jnp.arange(64)[:, None] >= 17
    context = [
        jnp.full_like(x, jnp.nan).at[used].set(jnp.where(beyond, 1e4, x[used])) for x in given[3:5]
    ]
    found, _ = run(
        gpu.block_attention, *given[:3], *context, *given[5:], **settings(case), arch=arch
    )
    assert agrees(case, found, given)


def test_what_cannot_be_run_is_said():
    case = SHARED["pages of several tiles"]
    assert "80 rows" in str(gpu.unsupported(*arrays(case), **settings(case)))
    for wrong in (
        Case((3,), dtype="float32"),
        Case((3,), d=48),
        Case((3,), d=160),
        Case((3,), K=9, ratio=8),
        Case((3,), size=12),
    ):
        shapes = jax.eval_shape(lambda wrong=wrong: arrays(wrong))
        said = gpu.unsupported(*shapes, **settings(wrong))
        assert said is not None and said.endswith(".")
    assert (
        gpu.unsupported(*arrays(Case((3,), K=9, ratio=8)), **settings(case), arch="sm_100a") is None
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("forgotten", ["barrier_wait", "commit_smem"])
def test_what_is_not_waited_for_is_noticed(
    forgotten: str, arch: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    case = Case((300,), size=64, pages=5, d=128, K=2, shared=1)
    _, fault = run(gpu.block_attention, *arrays(case), **settings(case), arch=arch)
    assert fault


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_length_beyond_the_table_reads_nothing_beyond_it(arch: str):
    given = arrays(BEYOND)
    length = given[-1].at[1].set(900)
    found, fault = run(gpu.block_attention, *given[:-1], length, **settings(BEYOND), arch=arch)
    assert not fault and agrees(BEYOND, found, given)


@pytest.mark.parametrize("size", [24, 40, 48, 56])
def test_one_page_that_fills_no_tile_is_refused(size: int):
    given = arrays(Case((9,), size=size, pages=1))
    assert "pages" in (gpu.unsupported(*given, **settings(BEYOND)) or "")
