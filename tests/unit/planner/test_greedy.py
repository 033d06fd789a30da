from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import problem, problems, seeded

from orbitflow_sglang.planner.evaluation import Memory, build_plan, plan_faults
from orbitflow_sglang.planner.greedy import fill, lower
from orbitflow_sglang.planner.problem import IntArray, PlanningProblem
from orbitflow_sglang.planner.solver import greedy


def everyone(one: PlanningProblem) -> np.ndarray:
    return np.ones(len(one.units), dtype=bool)


def none_offloaded(one: PlanningProblem) -> IntArray:
    return np.zeros((len(one.units), one.layers), dtype=np.int64)


def test_a_fill_from_nothing_streams_the_least_within_rounding() -> None:
    one = problem([400, 250], layers=8, arena=4000)
    filled = fill(one, everyone(one), none_offloaded(one), page_ranges=True)
    memory = Memory.of(one, everyone(one))
    assert memory.room(filled.sum(axis=0)) >= 0
    assert int(filled.sum()) <= memory.least_streamed * 1.01


@seeded(300)
@given(problems())
def test_a_fill_fits_wherever_everything_on_the_host_does(one: PlanningProblem) -> None:
    nobody = ~everyone(one)
    whole = np.broadcast_to(one.pages[:, None], none_offloaded(one).shape).copy()
    memory = Memory.of(one, everyone(one))
    assume(memory.room(whole.sum(axis=0)) >= 0)
    for start in (none_offloaded(one), one.present):
        filled = fill(one, ~nobody, start, page_ranges=True)
        # What is there may lie so unevenly that its ring has no room: then it is lowered.
        if memory.room(filled.sum(axis=0)) < 0:
            filled = fill(one, ~nobody, lower(one, ~nobody, start), page_ranges=True)
        assert memory.room(filled.sum(axis=0)) >= 0
        assert (filled >= 0).all() and (filled <= one.pages[:, None]).all()


@seeded(200)
@given(problems(), st.booleans())
def test_a_fill_only_adds_and_only_to_units_that_may_move(
    one: PlanningProblem, page_ranges: bool
) -> None:
    movable = np.arange(len(one.units)) % 2 == 0
    start = np.minimum(one.present, one.pages[:, None])
    filled = fill(one, everyone(one), start, page_ranges=page_ranges, movable=movable)
    assert (filled >= start).all()
    assert (filled[~movable] == start[~movable]).all()
    if not page_ranges:
        assert ((filled == start) | (filled == one.pages[:, None])).all()


def test_whole_layers_are_spread_over_the_depth() -> None:
    one = problem([100], layers=12, arena=900)
    filled = fill(one, everyone(one), none_offloaded(one), page_ranges=False)
    layers = np.flatnonzero(filled[0])
    assert len(layers) >= 4
    gaps = np.diff(layers)
    assert gaps.max() - gaps.min() <= 1


def test_the_largest_unit_is_offloaded_first() -> None:
    one = problem([50, 300, 20], layers=8, arena=2500)
    filled = fill(one, everyone(one), none_offloaded(one), page_ranges=True)
    assert filled[1].any() and not filled[[0, 2]].any()


def test_what_is_offloaded_already_stays_and_little_is_added() -> None:
    one = problem([100, 100], layers=8, arena=1300, ring_pages=20)
    start = none_offloaded(one)
    start[1, :3] = 100
    filled = fill(one, everyone(one), start, page_ranges=True)
    assert (filled[1, :3] == 100).all()
    assert int(np.abs(filled - start).sum()) == 1616 + 20 - 1300 - 300


def test_a_request_larger_than_the_arena_is_attended_in_pieces() -> None:
    one = problem([400], layers=8, arena=400)
    plan = greedy(one)
    assert plan.fits and Memory.of(one, everyone(one)).in_pieces
    assert 2 <= plan.ring_pages < 2 * 400
    assert plan.arena_pages_used + plan.ring_pages <= 400


@seeded(200)
@given(problems())
def test_lowering_takes_nothing_to_the_host(one: PlanningProblem) -> None:
    start = np.minimum(one.present, one.pages[:, None])
    lowered = lower(one, everyone(one), start)
    assert (lowered <= start).all() and (lowered >= 0).all()
    level = Memory.of(one, everyone(one)).level
    assert (lowered.sum(axis=0) <= np.maximum(level, 0)).all()


@seeded(300)
@given(problems())
def test_a_greedy_plan_that_says_it_fits_may_be_adopted(one: PlanningProblem) -> None:
    plan = greedy(one)
    if plan.fits:
        assert plan_faults(one, plan.offloaded, plan.paused) == []
    assert build_plan(one, plan.offloaded, plan.paused).step_time_s == pytest.approx(
        plan.step_time_s
    )
