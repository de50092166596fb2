"""Drafting through a Markov head on (interpreted) GPUs: the definition and tolerance of the others.

The GPU kernel multiplies bfloat16 and vocabularies of multiples of 16, so the shapes are its own;
data, the definition in float64 and the tolerance are those of test_markov.py.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.gpu_target import plgpu
from dspark_jax.pallas_kernels.markov import gpu, reference
from tests.kernels.gpu_interpreter import ARCHITECTURES, needs_interpreter, run
from tests.kernels.test_markov import CASES, Case, G, arguments, exact

pytestmark = needs_interpreter

SHORT = Case(3, 64, 336, jnp.bfloat16)
EACH = [
    pytest.param(SHORT, 1, id="a tile cut short, in parts"),
    pytest.param(SHORT, 1000, id="a tile cut short, at once"),
    pytest.param(Case(1, 64, 320, jnp.bfloat16), 1000, id="one sequence", marks=pytest.mark.slow),
    pytest.param(Case(9, 256, 128, jnp.bfloat16), 1000, id="the rank of the published drafts"),
    pytest.param(Case(130, 32, 192, jnp.bfloat16), 1, id="many sequences", marks=pytest.mark.slow),
]
"""Sizes, and how many tiles of the vocabulary a block of the grid has."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("case", "share"), EACH)
def test_a_step_draws_the_largest_sum_and_knows_its_probability(
    case: Case, arch: str, share: int, monkeypatch: pytest.MonkeyPatch
):
    # Cores that tiles are shared among.
    monkeypatch.setitem(gpu.gpu_target.CORES, arch, 1000 // share)
    given = arguments(case)
    assert gpu.unsupported(*given) is None
    drawn, fault = run(gpu.markov_step, *given, arch=arch)
    assert not fault
    scaled, sums, off = exact(case)
    entry, rows, bound = np.asarray(drawn.entry), np.arange(case.B), off.max(axis=1)
    most = sums.max(axis=1)
    second = np.partition(sums, -2, axis=1)[:, -2]
    clear = most - second > 2 * bound
    assert np.mean(clear) > 0.9 and np.all(sums[rows, entry] >= most - 2 * bound)
    assert np.array_equal(entry[clear], sums.argmax(axis=1)[clear])
    assert np.all(np.abs(drawn.score - most) <= bound)
    peak = scaled.max(axis=1)
    log_q = scaled[rows, entry] - peak - np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
    assert np.all(np.abs(reference.log_probability(drawn) - log_q) <= 4 * bound + 2.0**-17)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_first_of_equals_is_drawn(arch: str):
    base, mixed, w2, words, temperature, *rest = arguments(SHORT)
    equal = base.at[:, :, 5].set(50).at[:, :, 6].set(50).at[:, :, -1].set(50)
    drawn, _ = run(gpu.markov_step, equal, 0 * mixed, w2, words, 0 * temperature, *rest, arch=arch)
    assert np.all(drawn.entry == 5) and np.all(np.abs(drawn.others - 2) < 1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_block_is_the_references(arch: str):
    B, D, V, Vd, r = 2, 8, 200, 64, 16
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    given = (
        *(normal(B, G, Vd).astype(jnp.float32), normal(B, G, D), jnp.array([4, 7]), normal(B, r)),
        jnp.asarray(rng.integers(2**32, size=(B, 2)), jnp.uint32),
        *(jnp.array([0.0, 0.7]), normal(V, r), normal(r, Vd), normal(D + r, r), normal(r)),
        jnp.asarray(np.sort(rng.choice(V, Vd, replace=False)), jnp.int32),
    )
    drafted, fault = run(gpu.markov_block, *given, head_type="gated", arch=arch)
    wanted = reference.markov_block(*given, head_type="gated")
    assert not fault and np.array_equal(drafted.tokens, wanted.tokens)
    assert np.allclose(drafted.log_q, wanted.log_q, atol=1e-4)


def test_what_cannot_be_run_is_said():
    for case in CASES:
        said = gpu.unsupported(*arguments(case))
        assert said is not None and said.endswith(".")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_not_waited_for_is_noticed(arch: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plgpu, "barrier_wait", lambda *_: None)
    _, fault = run(gpu.markov_step, *arguments(Case(1, 16, 16, jnp.bfloat16)), arch=arch)
    assert fault
