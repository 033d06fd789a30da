"""Which step the time between two launches is put down to."""

from __future__ import annotations

import pytest

from orbitflow_sglang.engine.step_clock import Launched, StepClock, Totals

pytestmark = pytest.mark.unit


def step(number: int) -> Launched:
    return Launched(False, number, 0, 0, 0.0)


def at(seconds: float) -> Totals:
    return Totals(seconds, seconds / 10, int(100 * seconds), seconds / 2)


def told(clock: StepClock, number: int, seconds: float, under_way: int) -> tuple[int, float] | None:
    found = clock.ended(at(seconds), under_way)
    clock.launched(step(number))
    if found is None:
        return None
    launched, took = found
    for counted, expected in ((took.stall_s, 0.1), (took.h2d_bytes, 100), (took.h2d_busy_s, 0.5)):
        assert counted == pytest.approx(expected * took.at_s)
    return launched.batch, took.at_s


def test_where_steps_have_ended_before_the_next_is_launched_each_takes_until_then() -> None:
    clock = StepClock()
    assert told(clock, 1, 10, 0) is None
    assert told(clock, 2, 13, 0) == (1, 3)
    assert told(clock, 3, 14, 0) == (2, 1)


def test_where_launches_run_ahead_it_is_the_step_before_the_last_that_has_ended() -> None:
    clock = StepClock()
    assert told(clock, 1, 10, 0) is None
    assert told(clock, 2, 11, 1) is None  # 1 still runs
    assert told(clock, 3, 14, 1) == (1, 4)  # alone since 10
    assert told(clock, 4, 19, 1) == (2, 5)  # since 1 ended


def test_two_that_ended_between_two_launches_tell_nothing() -> None:
    clock = StepClock()
    told(clock, 1, 10, 0)
    told(clock, 2, 11, 1)
    assert told(clock, 3, 18, 0) is None
    assert told(clock, 4, 20, 0) == (3, 2)


def test_behind_an_idle_time_the_clock_starts_anew() -> None:
    clock = StepClock()
    told(clock, 1, 10, 0)
    clock.forget()
    assert told(clock, 2, 99, 0) is None
    assert told(clock, 3, 101, 0) == (2, 2)
