"""What rejection sampling needs of a vocabulary, on (interpreted) GPUs.

The GPU kernels take vocabularies that their copies can cut, so most shapes are their own; data, the
definition in float64 and the tolerances are those of test_acceptance.py. A kernel multiplies by the
reciprocal of a temperature, so a logit is rounded twice, each time by 2^-24 of itself.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.pallas_kernels.acceptance import gpu
from dspark_jax.pallas_kernels.gpu_target import plgpu
from dspark_jax.sampling import largest
from tests.kernels.gpu_interpreter import needs_interpreter, run
from tests.kernels.test_acceptance import CASES, Case, Rows, log_sum, rows, scaled, sums

pytestmark = needs_interpreter

SHORT = Case(3, 8, 448, 448, jnp.float32)
EACH = [
    pytest.param(SHORT, 132, id="a tile cut short, in parts"),
    pytest.param(Case(5, 3, 320, 200, jnp.float32), 1, id="folded, a reduced vocabulary"),
    pytest.param(Case(16, 5, 272, 272, jnp.bfloat16), 1, id="bfloat16, tiles of rows"),
    pytest.param(Case(1, 1, 4096, 4096, jnp.float32), 1, id="one row", marks=pytest.mark.slow),
    pytest.param(Case(3, 8, 4224, 4224, jnp.float32), 1, id="many tiles", marks=pytest.mark.slow),
    pytest.param(Case(70, 2, 640, 80, jnp.bfloat16), 9, id="sequences", marks=pytest.mark.slow),
]
"""Sizes, and cores that tiles are shared among."""
SHAPES = pytest.mark.parametrize(("case", "cores"), EACH, indirect=["cores"])


@pytest.fixture
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with as many."""
    monkeypatch.setitem(gpu.gpu_target.CORES, "sm_90a", request.param)


def drawn_by(given: Rows) -> tuple[Any, ...]:
    """What a draw for the first row of every sequence takes."""
    p_logits = given.logits[:, 0]
    lse = [
        jnp.asarray(log_sum(scaled(x, given.temperature)), jnp.float32)
        for x in (p_logits, given.q_logits)
    ]
    judged = (given.refused, given.words, given.temperature, given.target_id)
    return (p_logits, given.q_logits, *lse, *judged)


@SHAPES
@pytest.mark.usefixtures("cores")
def test_a_row_knows_its_best_entry_and_its_tokens_probability(case: Case):
    given = rows(case)
    assert gpu.unsupported_row_statistics(*given[:3]) is None
    found, fault = run(gpu.row_statistics, *given[:3])
    assert not fault
    exact = scaled(given.logits, given.temperature)
    lse, tokens = log_sum(exact), np.asarray(given.tokens)
    assert np.array_equal(found.best, largest(given.logits))
    assert np.all(np.abs(found.lse - lse) <= 2.0**-17)
    own = np.take_along_axis(exact, tokens.clip(0)[..., None], axis=-1)[..., 0] - lse
    possible = (tokens >= 0) & np.isfinite(own)
    allowed = 2.0**-17 + 2.0**-23 * np.abs(np.where(possible, own, 0))
    log_p = np.asarray(found.log_p)
    assert np.all((np.abs(log_p - np.where(possible, own, 0)) <= allowed) | ~possible)
    assert np.all(log_p[~possible] < -1e29) and np.any(possible) == (case.S > 1)


@SHAPES
@pytest.mark.usefixtures("cores")
def test_a_draw_has_the_largest_sum_of_what_may_be_drawn(case: Case):
    given = rows(case)
    arguments = drawn_by(given)
    assert gpu.unsupported_residual_draw(*arguments) is None
    drawn, fault = run(gpu.residual_draw, *arguments)
    assert not fault
    (least, most), every = sums(given), np.arange(case.B)
    assert np.all(most[every, drawn] >= least.max(axis=1))
    winner = least.argmax(axis=1)
    rivals = np.where(np.arange(case.V) == winner[:, None], -np.inf, most)
    clear = least.max(axis=1) > rivals.max(axis=1)
    assert np.mean(clear) > 0.9
    assert np.array_equal(np.asarray(drawn)[clear], winner[clear])


def test_the_first_of_equals_is_found_wherever_the_vocabulary_is_cut():
    """Equal logits on both sides of a fold, of a tile and of a block, at temperature 0."""
    B, V = 1, 512
    logits = jnp.zeros((B, 8, V)).at[:, :, 37:].set(3.0)
    heat, tokens = jnp.zeros(B), jnp.full((B, 8), V - 1)
    found, _ = run(gpu.row_statistics, logits, tokens, heat)
    assert np.all(found.best == 37)
    none, words = jnp.zeros(B), jnp.ones((B, 2), jnp.uint32)
    given = (logits[:, 0], logits[:, 0], none, none, jnp.ones(B, bool), words, heat)
    drawn, _ = run(gpu.residual_draw, *given)
    assert np.all(drawn == 37)


def test_where_nothing_is_left_the_draw_is_the_targets():
    given = rows(SHORT)
    alike = given._replace(q_logits=given.logits[:, 0], refused=jnp.ones(3, bool))
    accepted = alike._replace(refused=jnp.zeros(3, bool))
    ours, theirs = (run(gpu.residual_draw, *drawn_by(x))[0] for x in (alike, accepted))
    assert np.array_equal(ours, theirs)


def test_a_row_ignores_its_neighbours():
    given = rows(SHORT)
    spoilt = given._replace(
        logits=given.logits.at[:2].set(jnp.nan), q_logits=given.q_logits.at[:2].set(jnp.nan)
    )
    ours, theirs = (run(gpu.residual_draw, *drawn_by(x))[0] for x in (given, spoilt))
    assert ours[2] == theirs[2]
    ours, theirs = (run(gpu.row_statistics, *x[:3])[0] for x in (given, spoilt))
    assert all(np.array_equal(one[2], other[2]) for one, other in zip(ours, theirs, strict=True))


def test_what_cannot_be_run_is_said():
    for case in CASES:
        given = rows(case)
        runs = case.V in (4096, 4200)
        said = gpu.unsupported_row_statistics(*given[:3])
        assert said is None if runs else str(said).endswith(".")
        said = gpu.unsupported_residual_draw(given.logits[:, 0], given.q_logits)
        assert said is None if case.V == 4096 else str(said).endswith(".")
    given = rows(SHORT)
    for wrong in (
        gpu.unsupported_row_statistics(given.logits[:, 0], *given[1:3]),
        gpu.unsupported_row_statistics(given.logits.astype(jnp.float16), *given[1:3]),
        gpu.unsupported_residual_draw(given.logits, given.q_logits),
        gpu.unsupported_residual_draw(given.logits[:, 0], given.q_logits.astype(jnp.float16)),
    ):
        assert wrong is not None and wrong.endswith(".")


@pytest.mark.parametrize("forgotten", ["barrier_wait", "commit_smem"])
@pytest.mark.parametrize("operation", ["row_statistics", "residual_draw"])
def test_what_is_not_waited_for_is_noticed(
    operation: str, forgotten: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plgpu, forgotten, lambda *_: None)
    monkeypatch.setitem(gpu.gpu_target.CORES, "sm_90a", 1)
    given = rows(Case(8, 1, 8192, 8192, jnp.float32))  # a place in shared memory is used twice
    arguments = given[:3] if operation == "row_statistics" else drawn_by(given)
    _, fault = run(getattr(gpu, operation), *arguments)
    assert fault
