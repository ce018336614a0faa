"""A budget in minutes ends near its time with a complete schedule, on steady, slowing and quickening machines."""

import itertools
import math

import pytest

from nestling.config import SettingError
from nestling.learn.budget import CALIBRATION_STEPS, Budget


def simulate(budget, seconds_of_step, tokens_per_step=1000, steps=10_000):
    """Run the budget's clock; returns seconds, the progress before each step, and the steps after which the total changed."""
    tokens, seconds, path, changes = 0, 0.0, [], []
    for step in range(steps):
        if budget.total is not None and tokens >= budget.total:
            return seconds, path, changes
        path.append(budget.progress(tokens))
        tokens += tokens_per_step
        seconds += seconds_of_step(step, seconds)
        if budget.observe(tokens, seconds):
            changes.append(step + 1)
    raise AssertionError("the run does not end")


def test_tokens_are_exact_and_never_look_at_the_clock():
    budget = Budget(tokens=10_500)
    _, path, changes = simulate(budget, lambda step, seconds: 10.0**step)
    assert len(path) == 11
    assert changes == []
    assert path[5] == pytest.approx(5000 / 10_500)


def test_a_steady_machine_is_calibrated_once():
    budget = Budget(minutes=2)
    seconds, path, changes = simulate(budget, lambda step, seconds: 3.0 if step == 0 else 0.25)
    assert changes == [CALIBRATION_STEPS]  # the slow first step did not count
    assert seconds == pytest.approx(120, rel=0.02)
    assert path[-1] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.5, 3.0])
def test_a_machine_that_changes_speed_still_ends_in_time_with_a_smooth_schedule(factor):
    budget = Budget(minutes=2)
    seconds, path, changes = simulate(budget, lambda step, seconds: 0.25 * (factor if seconds > 50 else 1))
    assert len(changes) > 1
    assert seconds == pytest.approx(120, rel=0.08)
    assert path[-1] == pytest.approx(1, abs=0.03)
    rises = [b - a for a, b in itertools.pairwise(path)]
    assert min(rises) >= 0
    assert max(rises) < 0.02  # bent, never broken


def test_calibration_is_shorter_where_steps_are_long():
    budget = Budget(minutes=1)
    seconds, path, changes = simulate(budget, lambda step, seconds: 4.0)
    assert changes[0] == 2
    assert seconds == pytest.approx(60, abs=4.0)
    assert len(path) > 10


def test_a_restored_budget_goes_on_as_the_original():
    def half(budget, start):
        tokens, out = start, []
        for step in range(start // 1000, start // 1000 + 40):
            tokens += 1000
            budget.observe(tokens, 1.0 * step + (step > 30) * 5.0 * (step - 30))
            out.append((budget.total, budget.progress(tokens)))
        return out

    one = Budget(minutes=3)
    half(one, 0)
    other = Budget(**one.state_dict())
    assert half(one, 40_000) == half(other, 40_000)


@pytest.mark.parametrize(
    "bad",
    [{}, {"tokens": 5, "minutes": 1.0}, {"tokens": 0}, {"minutes": 0.0}, {"minutes": math.inf}, {"minutes": math.nan}],
)
def test_impossible_budgets_are_refused(bad):
    with pytest.raises(SettingError, match=r"tokens|minutes"):
        Budget(**bad)
