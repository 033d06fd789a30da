"""The baselines, against their sources' rules worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from problems import problem, problems, seeded

from orbitflow_sglang.planner.modes import find_mode, make_plan
from orbitflow_sglang.planner.problem import Plan, PlanningProblem, Unit


def patterns(mode: str, *args: object, **more: object) -> list[str]:
    plan = make_plan(problem(*args, mode=mode, **more))  # type: ignore[arg-type]
    return [unit.pattern for unit in plan.units]


def test_next_layer_has_everything_on_the_host() -> None:
    assert patterns("next-layer", [10, 20]) == ["all", "all"]


def test_static_is_one_distance_whatever_the_arena() -> None:
    assert patterns("static:2", [10, 20], arena=10_000) == ["distance:2", "distance:2"]
    assert patterns("static:2", [10, 20], arena=1) == ["distance:2", "distance:2"]


def test_flexgen_keeps_the_layers_that_requests_of_average_length_leave_room_for() -> None:
    # With tails 11 and 31, 21 on average: b = 21 + 31 + 2 = 54; 32 layers: 1,200 // 54 = 22
    # stay, 10 leave: floor(32 / 10) - 1 = 2.
    assert patterns("flexgen", [10, 30], layers=32, arena=1200) == ["distance:2"] * 2
    # With an average of 40 given: b = 82, 14 stay, 18 leave, floor(32 / 18) - 1 = 0: 1.
    assert (
        patterns("flexgen", [10, 30], layers=32, arena=1200, average_pages_per_layer=40.0)
        == ["distance:1"] * 2
    )
    assert patterns("flexgen", [10, 30], layers=32, arena=54 * 32) == ["resident"] * 2


def test_distn_single_looks_at_present_lengths_with_two_pages_to_spare() -> None:
    # b = 11 + 31 + 2 x 2 = 46; 1,200 // 46 = 26 stay, 6 leave: floor(32 / 6) - 1 = 4.
    assert patterns("distn-single", [10, 30], layers=32, arena=1200) == ["distance:4"] * 2
    assert patterns("distn-single", [10, 30], layers=32, arena=46 * 32) == ["resident"] * 2


def test_select_n_divides_layers_by_the_passes_of_transfers_that_fit_compute() -> None:
    # Compute 32 ms; a pass moves 32 x 42 pages. t_b = 5 us: 6.7 ms, n = 4, d = 32 // 4 = 8.
    more = {"layers": 32, "arena": 1, "t": 1e-3}
    assert patterns("select-n", [20, 20], t_b=5e-6, **more) == ["distance:8"] * 2
    assert patterns("select-n", [20, 20], t_b=1e-3, **more) == ["distance:1"] * 2
    assert patterns("select-n", [20, 20], t_b=1e-9, **more) == ["distance:1"] * 2
    # n = 1: a distance of L, which is none.
    assert patterns("select-n", [20, 20], t_b=2e-5, **more) == ["resident"] * 2


def ages(*units: tuple[str, int, float]) -> PlanningProblem:
    made = tuple(Unit(name, pages, age_s=age) for name, pages, age in units)
    return PlanningProblem(4, 100, 1e-3, 1e-4, made)


def running(plan: Plan) -> list[str]:
    return [unit.id for unit in plan.units if not unit.paused]


def with_mode(mode: str, one: PlanningProblem) -> PlanningProblem:
    return PlanningProblem(
        one.layers, one.arena_pages, one.layer_compute_s, one.page_transfer_s, one.units, mode
    )


def test_a_queue_stops_at_the_first_that_does_not_fit() -> None:
    # Arena of 25 pages a layer. In the order of age: a (11 with its tail), c does not fit.
    one = ages(("a", 10, 9.0), ("b", 5, 1.0), ("c", 20, 5.0))
    plan = make_plan(with_mode("queue", one))
    assert running(plan) == ["a"]
    assert plan.fits and plan.status == "paused" and not plan.offloaded.any()


def test_retraction_gives_up_the_youngest() -> None:
    plan = make_plan(with_mode("retract", ages(("a", 10, 1.0), ("b", 5, 9.0), ("c", 11, 5.0))))
    assert running(plan) == ["b", "c"]
    alone = make_plan(with_mode("retract", ages(("a", 90, 1.0))))
    assert running(alone) == ["a"] and alone.status == "infeasible"


def test_resident_and_all_host_are_what_the_server_calls_so() -> None:
    assert patterns("resident", [10, 20], arena=1) == ["resident"] * 2
    assert patterns("all-host", [10, 20]) == ["all"] * 2


@pytest.mark.parametrize("name", ["", "orbit", "static:", "static:0", "random:x", "swap+order"])
def test_an_unknown_mode_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="is none of orbitflow, paper"):
        find_mode(name)


ALL = (
    "orbitflow", "paper", "paper-uniform", "next-layer", "flexgen", "select-n", "distn-single",
    "static:3", "all-host", "random:1", "resident", "queue", "retract",
)  # fmt: skip


@pytest.mark.parametrize("mode", [mode for mode in ALL if mode != "random:1"])
@seeded(25)
@given(problems())
def test_the_order_of_units_does_not_matter(mode: str, one: PlanningProblem) -> None:
    one = replace(one, mode=mode)
    plan, other = make_plan(one), make_plan(replace(one, units=one.units[::-1]))
    assert (plan.offloaded == other.offloaded[::-1]).all()
    assert (plan.paused == other.paused[::-1]).all()


def test_a_distance_beyond_every_layer_offloads_nothing() -> None:
    assert patterns("static:99999999999999999999", [10]) == ["resident"]
    far = replace(problem([10], arena=50), units=(Unit("a", 10, present="distance:9" + 30 * "9"),))
    assert not far.present.any()


def test_a_small_ring_costs_no_time_to_simulate() -> None:
    """10,000 pages through a ring of 2 would be 160,000 pieces a step."""
    plan = make_plan(problem([10_000], layers=32, arena=40, ring_pages=2))
    assert plan.step_time_s == pytest.approx(plan.lower_bound_s, rel=0.02)


@pytest.mark.parametrize("mode", ALL)
@seeded(40)
@given(problems())
def test_every_mode_answers_every_problem(mode: str, one: PlanningProblem) -> None:
    plan = find_mode(mode)(one)
    assert plan.offloaded.shape == (len(one.units), one.layers)
    assert plan.status in ("optimal", "feasible", "paused", "infeasible")
    assert np.isfinite(plan.step_time_s)
    assert plan.gap >= 0 and plan.stall_s >= 0
    assert len(plan.units) == len(one.units)
