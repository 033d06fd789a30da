from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from problems import problem, problems, random_problem, seeded

from orbitflow_sglang.planner.evaluation import plan_faults
from orbitflow_sglang.planner.incremental import IncrementalPlanner, adopt, placed_as
from orbitflow_sglang.planner.problem import GAP, PlanningProblem, Unit
from orbitflow_sglang.planner.solver import greedy, solve


def grown(one: PlanningProblem, pages: int) -> PlanningProblem:
    units = (
        replace(
            unit,
            pages_per_layer=unit.pages_per_layer + pages,
            growth_pages_per_layer=max(0, unit.growth_pages_per_layer - pages),
        )
        for unit in one.units
    )
    return replace(one, units=tuple(units))


def growing(*pages: int, arena: int = 1500, t_b: float = 1e-6) -> PlanningProblem:
    units = tuple(
        Unit(f"r{number}", count, growth_pages_per_layer=2) for number, count in enumerate(pages)
    )
    return PlanningProblem(8, arena, 1e-3, t_b, units)


def test_growth_within_the_window_costs_nothing() -> None:
    planner = IncrementalPlanner()
    one = growing(100, 100)
    plan, outcome = planner.update(one)
    assert outcome == "solved"
    assert planner.update(grown(one, 1)) == (plan, "reused")
    assert planner.update(grown(one, 2)) == (plan, "reused")
    beyond = grown(one, 3)
    again, outcome = planner.update(beyond)
    assert outcome in ("repaired", "solved") and again is not plan
    assert plan_faults(beyond, again.offloaded, again.paused) == []


def test_a_plan_ends_with_its_window() -> None:
    planner = IncrementalPlanner()
    one = growing(100, 100)
    planner.update(one)
    assert planner.update(one, steps=31)[1] == "reused"
    assert planner.update(one, steps=1)[1] != "reused"


def test_an_arrival_is_offloaded_itself_and_others_stay() -> None:
    planner = IncrementalPlanner()
    before, _ = planner.update(growing(100, 80, arena=1800))
    after, outcome = planner.update(growing(100, 80, 120, arena=1800))
    assert outcome == "repaired"
    assert (after.offloaded[:2] == before.offloaded).all()
    assert after.offloaded[2].any()


def test_a_finish_moves_nothing_while_nobody_waits_for_the_link() -> None:
    planner = IncrementalPlanner()
    planner.update(growing(100, 80, 120, arena=1300))
    one = growing(100, 80, arena=1300)
    plan, outcome = planner.update(one)
    assert outcome == "repaired" and plan.migration_pages == 0


def test_what_a_repair_leaves_too_slow_is_solved() -> None:
    planner = IncrementalPlanner()
    planner.update(growing(100, 80, 120, arena=1300, t_b=1e-4))
    plan, outcome = planner.update(growing(100, 80, arena=1300, t_b=1e-4))
    assert outcome == "solved" and plan.gap <= GAP


def test_a_problem_seen_before_is_looked_up() -> None:
    planner = IncrementalPlanner()
    rng = np.random.default_rng(1)
    one = random_problem(rng, 8, 32)
    solved, _ = planner.update(one)
    planner.plan = None
    found, outcome = planner.update(one)
    assert outcome == "cached"
    assert (found.offloaded == solved.offloaded).all()


@seeded(60)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=3, max_size=12))
def test_every_plan_of_a_changing_batch_may_be_adopted(seed: int, changes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    one = random_problem(rng, 4, 16, tightness=(0.4, 0.9), largest=60)
    planner = IncrementalPlanner()
    for number, change in enumerate(changes):
        units = list(one.units)
        if change == 0:
            units.append(Unit(f"new{number}", int(rng.integers(1, 60))))
        elif change == 1 and len(units) > 1:
            units.pop(int(rng.integers(len(units))))
        elif change == 2:
            units = list(grown(one, int(rng.integers(0, 4))).units)
        one = replace(one, units=tuple(units))
        plan, _ = planner.update(one)
        if solve(one).fits:
            assert plan_faults(one, plan.offloaded, plan.paused) == []


def test_times_that_drift_little_keep_the_plan_and_others_do_not() -> None:
    planner = IncrementalPlanner()
    one = growing(100, 80)
    planner.update(one)
    near = replace(one, layer_compute_s=one.layer_compute_s * 1.01)
    assert planner.update(near)[1] == "reused"
    far = replace(one, layer_compute_s=one.layer_compute_s * 1.2)
    assert planner.update(far)[1] != "reused"


def test_a_smaller_budget_than_the_plan_streams_asks_for_another() -> None:
    planner = IncrementalPlanner()
    one = replace(growing(100, 80, arena=1300), stream_budget_pages=10**6)
    plan, _ = planner.update(one)
    assert planner.update(replace(one, stream_budget_pages=plan.streamed_pages))[1] == "reused"
    assert planner.update(replace(one, stream_budget_pages=1))[1] != "reused"


def test_other_modes_are_planned_by_their_own_rule() -> None:
    planner = IncrementalPlanner()
    one = replace(growing(100, 80, arena=1300), mode="static:3")
    assert [unit.pattern for unit in planner.update(one)[0].units] == ["distance:3"] * 2


# --- adoption -------------------------------------------------------------------


def test_an_answer_for_the_batch_as_it_is_is_taken() -> None:
    one = growing(100, 80, arena=1300)
    answer = solve(one)
    plan, source = adopt(one, answer, None)
    assert source == "planned"
    assert (plan.offloaded == answer.offloaded).all()


def test_an_answer_is_made_to_fit_a_batch_that_has_changed() -> None:
    answer = solve(growing(100, 80, arena=1300))
    now = growing(100, 80, 150, arena=1300)
    plan, source = adopt(now, answer, None)
    assert source == "planned"
    assert plan_faults(now, plan.offloaded, plan.paused) == []
    fewer = replace(now, units=now.units[1:2])
    plan, source = adopt(fewer, answer, None)
    assert (len(plan.units), source) == (1, "planned")


def test_an_answer_that_cannot_fit_gives_way_to_the_last_plan_and_that_to_greedy() -> None:
    one = problem([100, 100], layers=8, arena=900, host_pages=1000)
    good = solve(one)
    before = replace(one, arena_pages=901)
    wrong = replace(good, problem=before, paused=np.array([True, True]))
    assert adopt(one, wrong, good)[1] == "kept"
    plan, source = adopt(one, wrong, wrong)
    assert source == "greedy"
    assert (plan.offloaded == greedy(one).offloaded).all()
    assert adopt(one, None, None)[1] == "greedy"


def test_a_plan_above_the_budget_is_lowered_or_dropped() -> None:
    units = tuple(Unit(name, 100, present=(1, 2, 3, 4, 5, 6)) for name in "ab")
    one = PlanningProblem(8, 1300, 1e-3, 1e-7, units, stream_budget_pages=10**6)
    last = solve(one)
    assert last.streamed_pages == 1200
    now = replace(one, stream_budget_pages=600)
    plan, source = adopt(now, None, last)
    assert source == "kept" and plan.fits and plan.streamed_pages <= 600


def test_a_request_that_never_fits_does_not_cost_the_others_their_plan() -> None:
    one = problem([30, 500], layers=4, arena=200, host_pages=300)
    answer = solve(one)
    now = replace(one, units=(*one.units, Unit("c", 1)))
    plan, source = adopt(now, answer, None)
    assert source == "planned" and plan.fits
    assert plan.paused.tolist() == [False, True, False]


@seeded(150)
@given(problems(), problems())
def test_whatever_is_adopted_fits_where_greedy_does(
    one: PlanningProblem, other: PlanningProblem
) -> None:
    plan, _ = adopt(one, solve(other) if other.layers == one.layers else None, None)
    if greedy(one).fits:
        assert plan_faults(one, plan.offloaded, plan.paused) == []


def test_layers_offloaded_whole_stay_so_as_a_unit_grows() -> None:
    one = growing(100, 80, arena=1300)
    plan = solve(one)
    later = placed_as(grown(one, 2), plan)
    whole = plan.offloaded == one.pages[:, None]
    assert (later.present[whole] == np.broadcast_to(later.pages[:, None], whole.shape)[whole]).all()
