"""What rounds are expected to take follows what they take, for kinds that never ran too."""

import pytest

from dspark_jax.serve.expected import Expected
from dspark_jax.serve.programs import Shape

PLAIN, SOME, ALL = (Shape(1, budget, 4, False) for budget in (1, 4, 9))
MEASURED = {PLAIN: 1.0, SOME: 2.0, ALL: 3.0}


def heard(expected: Expected, shape: Shape, seconds: float, times: int) -> None:
    for _ in range(times):
        expected.took(shape, seconds)


def test_at_first_it_is_what_was_measured():
    assert [Expected(MEASURED).of(x) for x in MEASURED] == pytest.approx([1.0, 2.0, 3.0])


def test_a_kind_that_runs_is_expected_to_take_what_it_takes():
    expected = Expected(MEASURED)
    heard(expected, PLAIN, 5.0, 200)
    assert expected.of(PLAIN) == pytest.approx(5.0, rel=0.01)


def test_what_slows_all_rounds_is_expected_of_kinds_that_never_ran():
    expected = Expected(MEASURED)
    heard(expected, PLAIN, 2.0, 200)
    assert expected.of(ALL) > 4.0, "a busy host was taken for dear plain rounds"
    assert expected.of(PLAIN) / expected.of(ALL) < 0.5


def test_kinds_that_all_run_are_told_apart():
    expected = Expected(MEASURED)
    for _ in range(2000):
        expected.took(PLAIN, 1.5)
        expected.took(ALL, 9.0)
    assert expected.of(PLAIN) == pytest.approx(1.5, rel=0.05)
    assert expected.of(ALL) == pytest.approx(9.0, rel=0.05)


def test_one_odd_round_changes_little():
    expected = Expected(MEASURED)
    expected.took(PLAIN, 1000.0)
    expected.took(PLAIN, 0.0)
    assert 1.0 < expected.of(PLAIN) < 1.2


def test_much_quicker_rounds_are_forgotten_as_soon_as_slow_ones():
    expected = Expected(MEASURED)
    heard(expected, ALL, 0.3, 20_000)  # a tenth of what was measured on a busy machine
    heard(expected, ALL, 1.5, 100)
    assert expected.of(ALL) == pytest.approx(1.5, rel=0.05)


def test_what_was_not_measured_is_not_learnt():
    expected = Expected({})
    expected.took(PLAIN, 1.0)
    assert expected.of(PLAIN) == 0.0


def test_the_curve_is_straight_between_budgets_and_never_falls():
    expected = Expected(MEASURED | {SOME: 4.0})
    curve = expected.curve(ALL, (4, 9))
    assert len(curve) == 10
    assert curve[4] == curve[9] == pytest.approx(4.0), "more rows cannot be expected to take less"
    assert Expected(MEASURED).curve(ALL, (4, 9))[6] == pytest.approx(2.4)
