"""The learning rate's path: written-out values, its edges, and that impossible settings are refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.config import SettingError
from nestling.schedule import Schedule

SHAPES = st.sampled_from(["cosine", "trapezoid", "constant"])


def test_cosine_is_the_written_formula():
    schedule = Schedule(shape="cosine", floor=0.1)
    for progress in (0.0, 0.25, 0.5, 0.9, 1.0):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert schedule(1000, progress, 2000) == pytest.approx(expected, abs=1e-12)


def test_trapezoid_holds_then_falls_linearly():
    schedule = Schedule(shape="trapezoid", decay=0.4)
    assert schedule(10, 0.0, 100) == 1.0
    assert schedule(10, 0.6, 100) == 1.0
    assert schedule(10, 0.8, 100) == pytest.approx(0.5)
    assert schedule(10, 1.0, 100) == pytest.approx(0.0, abs=1e-12)


def test_warmup_rises_and_is_capped_at_a_tenth_of_the_budget():
    schedule = Schedule(shape="constant", warmup=1000)
    assert schedule(0, 0.0, None) == pytest.approx(0.1)  # never a step with rate 0
    assert schedule(500, 0.0, None) == pytest.approx(0.5)
    assert schedule(1000, 0.0, None) == 1.0
    assert schedule(500, 0.1, 5000) == 1.0
    assert schedule(250, 0.05, 5000) == pytest.approx(0.5)


@given(SHAPES, st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000), st.floats(0, 1))
def test_never_rises_after_the_warmup_and_stays_between_0_and_1(shape, a, b, warmup, floor):
    schedule = Schedule(shape=shape, warmup=warmup, floor=floor)
    low, high = sorted((a, b))
    first, second = (schedule(20_000, progress, 20_000) for progress in (low, high))
    assert 0 <= second <= first + 1e-12 <= 1 + 1e-9


@pytest.mark.parametrize("bad", [{"shape": "cosin"}, {"warmup": -1}, {"decay": 0.0}, {"decay": 1.5}, {"floor": -0.1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(SettingError, match=next(iter(bad))):
        Schedule(**bad)
