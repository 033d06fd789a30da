"""The mode ``orbitflow``: who runs, and which pages of whom are streamed.

1. Everything active, placed by the greedy fill. Kept unless somebody is late or a
   pause that costs nothing would make the step faster.
2. Else the integer program says who is paused (``milp``), with a greedy choice as the
   one to beat.
3. The active units are placed: as little as possible is moved among placements whose
   step time is within the gap of the bound, whole layers where they reach it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from orbitflow_sglang.planner.evaluation import (
    Memory,
    bounds,
    build_plan,
    holding_nothing,
    lower_bound_s,
    never_fitting,
)
from orbitflow_sglang.planner.greedy import fill, lower
from orbitflow_sglang.planner.milp import choose_paused
from orbitflow_sglang.planner.problem import (
    GAP,
    BoolArray,
    IntArray,
    Plan,
    PlanningProblem,
    late_tokens,
    slo_and_deposit,
)

LATE_TOLERANCE = 1e-6  # tokens: less is rounding


def solve(problem: PlanningProblem) -> Plan:
    """The best plan that is found; its gap says how far from the bound it may be.

    Never raises for a well-formed problem: where memory cannot hold what the caller wants
    active, the status is ``infeasible`` and the plan is the nearest there is.
    """
    begun = time.perf_counter()
    ordered = problem.canonical()
    plan = _solve_ordered(ordered).in_order_of(problem)
    return replace(plan, solve_s=time.perf_counter() - begun)


def objective(plan: Plan) -> tuple[bool, float, int, float, int, int]:
    """What is compared, in this order: does it fit, late tokens, pauses of requests without
    an SLO, step time, pauses, migration. Less is better."""
    problem = plan.problem
    paused = plan.paused & problem.is_request
    slo, _ = slo_and_deposit(problem)
    return (
        not plan.fits,
        float(plan.late.sum()),
        int((paused & np.isinf(slo)).sum()),
        plan.step_time_s,
        int(paused.sum()),
        plan.migration_pages,
    )


def compare(one: Plan, other: Plan, gap: float = GAP) -> int:
    """Below 0 where ``one`` is better, above where ``other`` is; step times and migrations
    within the gap of each other are equal."""
    a, b = objective(one), objective(other)
    tolerances = (0.0, LATE_TOLERANCE, 0.0, gap * min(a[3], b[3]), 0.0, gap * max(a[5], b[5]))
    for left, right, tolerance in zip(a, b, tolerances, strict=True):
        if abs(left - right) > tolerance:
            return -1 if left < right else 1
    return 0


def place(problem: PlanningProblem, paused: BoolArray, never: tuple[str, ...] = ()) -> Plan:
    """The best placement found for the units that are not ``paused``.

    Whole layers, which are fewer transfers and simpler to follow, where they are as good
    within the gap; else parts of layers.
    """
    bound = lower_bound_s(problem, ~paused, Memory.of(problem, ~paused))
    best: Plan | None = None
    for page_ranges in (True, False):
        for offloaded in _candidates(problem, ~paused, page_ranges):
            offloaded[holding_nothing(problem, never)] = 0
            moved = int(np.abs(offloaded - problem.present).sum())
            if best is not None and not page_ranges and moved > (1 + GAP) * best.migration_pages:
                continue
            plan = build_plan(problem, offloaded, paused, never_fits=never)
            # Step times and migrations within the gap are equal, and whole layers come last.
            if best is None or _rated(plan, bound, page_ranges) <= _rated(best, bound, page_ranges):
                best = plan
    assert best is not None
    return best


def _rated(plan: Plan, bound_s: float, exactly: bool) -> tuple[bool, float, float, int]:
    """How good a placement is; ``exactly``: by its migration too."""
    late = round(float(plan.late.sum()), 6)
    step = max(plan.step_time_s, (1 + GAP) * bound_s)
    return not plan.fits, late, step, plan.migration_pages if exactly else 0


def greedy(problem: PlanningProblem) -> Plan:
    """All that is not late in vain: a plan from sorting and filling alone, in under 1 ms."""
    never = never_fitting(problem)
    excluded = holding_nothing(problem, never)
    paused = greedy_paused(problem, excluded)
    offloaded = fill(problem, ~paused, problem.present, page_ranges=True)
    offloaded[excluded] = 0
    return build_plan(problem, offloaded, paused, never_fits=never)


def greedy_paused(problem: PlanningProblem, excluded: BoolArray) -> BoolArray:
    """Who pauses, when somebody is late or memory is short.

    Of the sets that leave out the first k, in the order of what a page of them gains by
    running, the best for late tokens, pauses without an SLO, and step time.
    """
    everyone = problem.with_users(problem.is_request & ~excluded)
    rows = np.flatnonzero(problem.is_request & ~excluded)
    if problem.stream_budget_pages is not None or len(rows) < 2:
        return ~everyone
    slo, deposit = slo_and_deposit(problem)
    window = problem.window_steps
    step = lower_bound_s(problem, everyone, Memory.of(problem, everyone))
    if not late_tokens(problem, step, ~everyone)[rows].any():
        missing, _ = bounds(problem, everyone[None], excluded)
        if missing[0] == 0:
            return ~everyone
    gain = np.clip(window * step / slo[rows] - deposit[rows], 0, window)
    gain[np.isinf(slo[rows])] = window
    ages = np.array([problem.units[row].age_s for row in rows])
    order = rows[np.lexsort((ages, gain / (problem.pages[rows] + 1.0)))]
    # Row k of the sets pauses the first k.
    sets = np.tile(everyone, (len(order), 1))
    sets[:, order] = np.tri(len(order), k=0, dtype=bool).T
    for prefix, users in problem.users:
        sets[:, prefix] = sets[:, users].any(axis=1)
    missing, steps = bounds(problem, sets, excluded)
    late = window * steps[:, None] / slo - deposit - np.where(sets, window, 0)
    late[:, excluded] = 0
    totals = np.maximum(late, 0).sum(axis=1)
    idle = (~sets[:, rows] & np.isinf(slo[rows])).sum(axis=1)
    best = np.lexsort((np.arange(len(order)), steps, idle, totals.round(6), missing > 0))[0]
    paused: BoolArray = ~sets[best]
    return paused


# --- inside -------------------------------------------------------------------


def _solve_ordered(problem: PlanningProblem) -> Plan:
    never = never_fitting(problem)
    excluded = holding_nothing(problem, never)
    everyone = problem.with_users(problem.is_request & ~excluded)
    plan = place(problem, ~everyone, never)
    if problem.stream_budget_pages is not None or not _pause_may_help(problem, plan, everyone):
        return plan
    quick = greedy_paused(problem, excluded)
    late, idle = _rated_pauses(problem, quick, excluded)
    if plan.fits:
        _, late_now, idle_now, *_ = objective(plan)
        late, idle = min((late, idle), (late_now, idle_now))
    activation = choose_paused(problem, excluded, late, idle)
    if activation is not None:
        chosen = plan if (activation.paused == plan.paused).all() else None
        chosen = chosen or place(problem, activation.paused, never)
        if chosen.fits and activation.proven:
            return chosen if compare(chosen, plan) <= 0 else plan
        plan = chosen if compare(chosen, plan) < 0 else plan
    # Nothing was found or proven. Or it does not fit: the program counts parts of pages, which
    # matters when the last page of the host is in use.
    other = place(problem, quick, never)
    return other if compare(other, plan) < 0 else plan


def _rated_pauses(
    problem: PlanningProblem, paused: BoolArray, excluded: BoolArray
) -> tuple[float, int]:
    """Late tokens and pauses without an SLO of a choice, at the bound of its step time."""
    missing, steps = bounds(problem, ~paused[None], excluded)
    if missing[0] > 0:
        return np.inf, len(problem.units)
    slo, _ = slo_and_deposit(problem)
    late = late_tokens(problem, float(steps[0]), paused)
    late[excluded] = 0
    return float(late.sum()), int((paused & problem.is_request & np.isinf(slo) & ~excluded).sum())


def _pause_may_help(problem: PlanningProblem, plan: Plan, everyone: BoolArray) -> bool:
    """Whether a pause could be better than running all: somebody is late, memory is short,
    or the step is slowed by transfers and somebody has a deposit for the whole window."""
    if int((everyone & problem.is_request).sum()) < 2:
        return False
    if not plan.fits or plan.late[everyone].any():
        return True
    if plan.step_time_s <= (1 + GAP) * problem.resident_step_s:
        return False
    slo, deposit = slo_and_deposit(problem)
    due = problem.window_steps * problem.resident_step_s / slo
    return bool((np.isfinite(slo) & everyone & (due <= deposit)).any())


def _candidates(
    problem: PlanningProblem, active: BoolArray, page_ranges: bool
) -> Iterator[IntArray]:
    """Placements that move little, then ones that stream little."""
    present = problem.present
    yield fill(problem, active, present, page_ranges=page_ranges)
    if not present[active].any():
        return
    yield fill(problem, active, lower(problem, active, present), page_ranges=page_ranges)
    yield fill(problem, active, np.zeros_like(present), page_ranges=page_ranges)
