from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from problems import problem, problems, seeded

from orbitflow_sglang.planner.evaluation import (
    Memory,
    build_plan,
    lower_bound_s,
    never_fitting,
    plan_faults,
)
from orbitflow_sglang.planner.problem import PlanningProblem, Unit


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("ring", [None, 2, 5])
def test_least_streamed_is_the_least_over_all_loads(layers: int, ring: int | None) -> None:
    everyone = np.array([True])
    for pages, arena in itertools.product(range(6), range(1, layers * 7 + 8)):
        one = problem([pages], layers=layers, arena=arena, ring_pages=ring)
        memory = Memory.of(one, everyone)
        sums = [
            sum(loads)
            for loads in itertools.product(range(pages + 1), repeat=layers)
            if memory.room(np.array(loads)) >= 0
        ]
        if sums:
            assert min(sums) == memory.least_streamed, (pages, arena, memory)
        else:
            assert memory.least_streamed > layers * pages


def test_the_ring_holds_two_of_the_largest_layer_up_to_a_share_of_the_arena() -> None:
    roomy = problem([20], layers=4, arena=79)
    plan = build_plan(roomy, np.array([[5, 5, 5, 5]]), np.array([False]))
    assert (plan.ring_pages, plan.arena_pages_used, plan.fits) == (10, 80 - 20 + 4, True)
    tight = problem([20], layers=4, arena=30)  # 4 tails: 26 pages for 80, 6 of them for a ring
    plan = build_plan(tight, np.array([[17, 17, 17, 17]]), np.array([False]))
    assert Memory.of(tight, np.array([True])).in_pieces
    assert (plan.ring_pages, plan.arena_pages_used, plan.fits) == (6, 16, True)


def test_a_bound_counts_the_fewest_transfers() -> None:
    # 30 pages beyond the arena with a ring of 10; 40 in all: one layer of b and one of a.
    two = problem(
        [10, 30], layers=4, arena=160 + 8 - 30, ring_pages=10, t=1e-9, transfer_setup_s=1.0
    )
    active = np.array([True, True])
    memory = Memory.of(two, active)
    assert memory.least_streamed == 40
    assert lower_bound_s(two, active, memory) == pytest.approx(2 + 40e-4)


@seeded(300)
@given(problems())
def test_no_placement_is_faster_than_the_bound(one: PlanningProblem) -> None:
    rng = np.random.default_rng(0)
    paused = np.zeros(len(one.units), dtype=bool)
    memory = Memory.of(one, ~paused)
    bound = lower_bound_s(one, ~paused, memory)
    for _ in range(20):
        share = rng.random()
        random = rng.integers(0, one.pages[:, None] + 1, (len(one.units), one.layers))
        mask = rng.random(random.shape) < share
        plan = build_plan(one, np.where(mask, random, 0), paused)
        if plan.fits:
            assert plan.step_time_s >= bound * (1 - 1e-9)


def test_faults_name_what_is_wrong() -> None:
    one = problem([10, 10], layers=4, arena=60)
    none = np.zeros((2, 4), dtype=np.int64)
    nobody = np.array([False, False])
    assert plan_faults(one, none, nobody) == ["28 pages more than the arena and a ring hold"]
    assert "shape" in plan_faults(one, none[:1], nobody)[0]
    assert plan_faults(one, none + 11, nobody)[0] == "more pages on the host than a unit has"
    half = none.copy()
    half[0] = 5
    assert "paused" in plan_faults(one, half, np.array([True, False]))[0]
    half[0] = 10
    assert plan_faults(one, half, np.array([True, False])) == []
    full_host = problem([10, 10], layers=4, arena=60, host_pages=39)
    assert plan_faults(full_host, half, np.array([True, False])) == [
        "40 pages exceed the host's 39"
    ]


def test_only_a_mode_that_queues_may_drop_what_waits() -> None:
    none = np.zeros((2, 4), dtype=np.int64)
    waits = np.array([True, False])
    assert plan_faults(problem([10, 10], layers=4, arena=60, mode="queue"), none, waits) == []
    assert plan_faults(problem([10, 10], layers=4, arena=60), none, waits) != []


def test_a_prefix_runs_with_its_users_and_not_without() -> None:
    units = (Unit("a", 2), Unit("p", 3, shared_by=("a",)))
    one = PlanningProblem(2, 100, 1e-3, 1e-4, units)
    none = np.zeros((2, 2), dtype=np.int64)
    assert "prefix" in plan_faults(one, none, np.array([True, False]))[0]


def test_what_never_fits_is_named() -> None:
    units = (Unit("a", 10), Unit("b", 30), Unit("p", 5, shared_by=("a",)))
    # Beside 4 tails and a ring of 6 room for 20 pages; and 40 on the host.
    one = PlanningProblem(4, 30, 1e-3, 1e-4, units, host_pages=40)
    assert never_fitting(one) == ("b",)
    units = (Unit("a", 12), Unit("b", 30), Unit("p", 5, shared_by=("a",)))
    one = PlanningProblem(4, 30, 1e-3, 1e-4, units, host_pages=40)
    assert never_fitting(one) == ("a", "b")


@seeded(200)
@given(problems())
def test_a_plan_recomputed_from_its_placement_is_the_same(one: PlanningProblem) -> None:
    nobody = np.zeros(len(one.units), dtype=bool)
    whole = np.broadcast_to(one.pages[:, None], (len(one.units), one.layers)).copy()
    plan = build_plan(one, whole, nobody)
    assume(plan.fits)
    again = build_plan(one, plan.offloaded, plan.paused)
    assert again.units == plan.units and again.step_time_s == plan.step_time_s
