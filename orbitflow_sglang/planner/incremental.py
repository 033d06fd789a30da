"""Planning as the batch changes: reuse what holds, repair what changed, solve the rest.

A plan is made for the end of its window, so growth inside it needs nothing. When requests
arrive or finish, the units that stay keep their layers and only new ones give way; a full
solve follows where that is more than the gap above the bound, or somebody is late or
paused. Problems that were solved before are looked up.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Literal

import numpy as np

from orbitflow_sglang.planner.evaluation import (
    build_plan,
    holding_nothing,
    never_fitting,
    plan_faults,
)
from orbitflow_sglang.planner.greedy import fill, lower
from orbitflow_sglang.planner.modes import make_plan
from orbitflow_sglang.planner.problem import GAP, BoolArray, IntArray, Plan, PlanningProblem
from orbitflow_sglang.planner.solver import greedy

Outcome = Literal["reused", "repaired", "cached", "solved"]
Source = Literal["planned", "kept", "greedy"]
CACHED_PLANS = 256
DRIFT = 0.05  # a plan made for other times than these, as a share, is made anew
_SAME = ("layers", "arena_pages", "mode", "window_steps", "ring_pages", "host_pages")
_LIKE = ("layer_compute_s", "page_transfer_s", "transfer_setup_s")


class IncrementalPlanner:
    """Plans one batch after another. ``plan`` is the one in force; ``outcomes`` counts."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.steps = 0  # since the plan in force was made
        self.outcomes: Counter[Outcome] = Counter()
        self._cache: OrderedDict[PlanningProblem, Plan] = OrderedDict()

    def update(self, problem: PlanningProblem, steps: int = 1) -> tuple[Plan, Outcome]:
        """The plan for ``problem``, ``steps`` steps after the last call, and how it was found.

        Where the plan in force has placed a unit, that is its ``present``.
        """
        self.steps += steps
        plan = self.plan
        in_window = plan is not None and self.steps < plan.problem.window_steps
        if plan is not None and in_window and covers(plan, problem):
            self.outcomes["reused"] += 1
            return plan, "reused"
        begun = time.perf_counter()
        plan, outcome = self._find(placed_as(problem, self.plan))
        self.plan, self.steps = replace(plan, solve_s=time.perf_counter() - begun), 0
        self.outcomes[outcome] += 1
        return self.plan, outcome

    def _find(self, problem: PlanningProblem) -> tuple[Plan, Outcome]:
        if self.plan is not None and (plan := repair(problem, self.plan)) is not None:
            return plan, "repaired"
        # Age decides between equals only, and never stays the same.
        ageless = replace(problem, units=tuple(replace(u, age_s=0.0) for u in problem.units))
        if (known := self._cache.get(ageless)) is not None:
            self._cache.move_to_end(ageless)
            return known, "cached"
        plan = make_plan(problem)
        self._cache[ageless] = plan
        if len(self._cache) > CACHED_PLANS:
            self._cache.popitem(last=False)
        return plan, "solved"


def covers(plan: Plan, problem: PlanningProblem) -> bool:
    """Whether ``plan`` is one for ``problem``: the same units, grown no further than was
    planned for, on the same machine, whose times have not drifted."""
    made, budget = plan.problem, problem.stream_budget_pages
    if made is problem:
        return True
    if len(made.units) != len(problem.units) or not plan.fits:
        return False
    if any(getattr(made, name) != getattr(problem, name) for name in _SAME):
        return False
    if (budget is None) != (made.stream_budget_pages is None):
        return False
    if budget is not None and plan.streamed_pages > budget:
        return False
    for name in _LIKE:
        was, now = getattr(made, name), getattr(problem, name)
        if abs(was - now) > DRIFT * was:
            return False
    return all(
        old.id == new.id
        and old.tpot_slo_s == new.tpot_slo_s
        and old.shared_by == new.shared_by
        and new.pages_per_layer <= old.pages_at_end
        for old, new in zip(made.units, problem.units, strict=True)
    )


def placed_as(problem: PlanningProblem, plan: Plan | None) -> PlanningProblem:
    """``problem`` with its units present where ``plan`` placed those of the same id.

    A layer that was offloaded whole still is when the unit has grown.
    """
    if plan is None:
        return problem
    planned = {unit.id: unit.pattern for unit in plan.units}
    units = (replace(unit, present=planned.get(unit.id, unit.present)) for unit in problem.units)
    return replace(problem, units=tuple(units))


def repair(problem: PlanningProblem, plan: Plan) -> Plan | None:
    """``plan`` for a changed batch with as little moved as can be; None: not good enough.

    Who was there stays in place, and newcomers are offloaded as far as room is missing.
    The units of ``problem`` are present where ``plan`` has them.
    """
    if plan.paused.any() or problem.mode != "orbitflow":
        return None
    known = {unit.id for unit in plan.problem.units}
    new = np.array([unit.id not in known for unit in problem.units], dtype=bool)
    repaired = _filled(problem, problem.present, np.zeros(len(problem.units), dtype=bool), new)
    good = repaired.fits and not repaired.late.any() and repaired.gap <= GAP
    return repaired if good else None


def adopt(problem: PlanningProblem, answer: Plan | None, last: Plan | None) -> tuple[Plan, Source]:
    """What the engine runs with now: the worker's ``answer`` where it fits the batch as it
    is, else the ``last`` plan where that does, else a greedy one.

    Either has passed ``plan_faults`` for the batch that it was made for. For another one it
    is made to fit and checked again: requests that finished meanwhile are left out, and
    newcomers are offloaded where room is missing.
    """
    candidates: tuple[tuple[Plan | None, Source], ...] = ((answer, "planned"), (last, "kept"))
    for plan, source in candidates:
        if plan is None:
            continue
        if covers(plan, problem):
            return plan, source
        carried = _carried(problem, plan)
        if carried is not None:
            return carried, source
    plan = greedy(problem)
    if not plan.fits:
        # More is on the host than may be streamed now, for which the budget has shrunk.
        nowhere = tuple(replace(unit, present=()) for unit in problem.units)
        anew = greedy(replace(problem, units=nowhere))
        plan = replace(anew, problem=problem) if anew.fits else plan
    return plan, "greedy"


def _carried(problem: PlanningProblem, plan: Plan) -> Plan | None:
    """``plan`` made to fit another batch; None: that cannot be."""
    now = placed_as(problem, plan)
    paused_ids = {unit.id for unit in plan.units if unit.paused}
    paused = np.array([unit.id in paused_ids for unit in problem.units], dtype=bool)
    paused = ~problem.with_users(~paused & problem.is_request)
    if problem.is_request.any() and (paused | ~problem.is_request).all():
        return None
    everyone = np.ones(len(paused), dtype=bool)
    for start in (now.present, lower(now, ~paused, now.present)):
        carried = _filled(now, start, paused, everyone)
        if carried.fits and not plan_faults(problem, carried.offloaded, paused):
            return replace(carried, problem=problem)
    return None


def _filled(
    problem: PlanningProblem, start: IntArray, paused: BoolArray, movable: BoolArray
) -> Plan:
    never = never_fitting(problem)
    offloaded = fill(problem, ~paused, start, page_ranges=True, movable=movable)
    offloaded[holding_nothing(problem, never)] = 0
    return build_plan(problem, offloaded, paused, never_fits=never)
