"""Planning as the batch changes: reuse what holds, repair what changed, solve the rest.

A plan is made for the end of its window, so growth inside it needs nothing. When requests
arrive or finish, the units that stay keep their layers and only new ones give way; a full
solve follows where that is more than the gap above the bound, or somebody is late or
paused. Problems that were solved before are looked up.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import fields, replace
from typing import Literal

import numpy as np

from orbitflow_sglang.planner.evaluation import build_plan, plan_faults
from orbitflow_sglang.planner.greedy import fill
from orbitflow_sglang.planner.problem import GAP, BoolArray, Plan, PlanningProblem
from orbitflow_sglang.planner.solver import greedy, solve

Outcome = Literal["reused", "repaired", "cached", "solved"]
Source = Literal["planned", "kept", "greedy"]
CACHED_PLANS = 256
_MACHINE = tuple(field.name for field in fields(PlanningProblem) if field.name != "units")


class IncrementalPlanner:
    """Plans one batch after another. ``plan`` is the one in force; ``outcomes`` counts."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.outcomes: Counter[Outcome] = Counter()
        self._steps = 0  # since the plan in force was made
        self._cache: OrderedDict[PlanningProblem, Plan] = OrderedDict()

    def update(self, problem: PlanningProblem, steps: int = 1) -> tuple[Plan, Outcome]:
        """The plan for ``problem``, ``steps`` steps after the last call, and how it was found.

        Where the plan in force has placed a unit, that is its ``present``.
        """
        self._steps += steps
        plan = self.plan
        in_window = plan is not None and self._steps < plan.problem.window_steps
        if plan is not None and in_window and covers(plan.problem, problem):
            self.outcomes["reused"] += 1
            return plan, "reused"
        begun = time.perf_counter()
        plan, outcome = self._find(placed_as(problem, self.plan))
        self.plan, self._steps = replace(plan, solve_s=time.perf_counter() - begun), 0
        self.outcomes[outcome] += 1
        return self.plan, outcome

    def _find(self, problem: PlanningProblem) -> tuple[Plan, Outcome]:
        if self.plan is not None and (plan := repair(problem, self.plan)) is not None:
            return plan, "repaired"
        if (known := self._cache.get(problem)) is not None:
            self._cache.move_to_end(problem)
            return known, "cached"
        plan = solve(problem)
        self._cache[problem] = plan
        if len(self._cache) > CACHED_PLANS:
            self._cache.popitem(last=False)
        return plan, "solved"


def covers(made: PlanningProblem, problem: PlanningProblem) -> bool:
    """Whether a plan for ``made`` is one for ``problem``: the same units, grown no further than
    was planned for, in the same machine."""
    if made is problem:
        return True
    if len(made.units) != len(problem.units) or any(
        getattr(made, name) != getattr(problem, name) for name in _MACHINE
    ):
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
    if plan.paused.any():
        return None
    known = {unit.id for unit in plan.problem.units}
    new = np.array([unit.id not in known for unit in problem.units], dtype=bool)
    repaired = _filled(problem, np.zeros(len(problem.units), dtype=bool), new)
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
        if plan.fits and covers(plan.problem, problem):
            return plan, source
        now = placed_as(problem, plan)
        paused_ids = {unit.id for unit in plan.units if unit.paused}
        paused = np.array([unit.id in paused_ids for unit in problem.units], dtype=bool)
        paused = ~problem.with_users(~paused & problem.is_request)
        carried = _filled(now, paused, np.ones(len(paused), dtype=bool))
        runs = not (paused & problem.is_request).all() or not problem.is_request.any()
        if runs and not plan_faults(problem, carried.offloaded, paused):
            return replace(carried, problem=problem), source
    return greedy(problem), "greedy"


def _filled(problem: PlanningProblem, paused: BoolArray, movable: BoolArray) -> Plan:
    offloaded = fill(problem, ~paused, problem.present, page_ranges=True, movable=movable)
    return build_plan(problem, offloaded, paused)
