"""The authors' model, exactly (arXiv 2601.10729; ``docs/planner.md`` has it in full).

Every request is offloaded at one distance d >= 1, the widest for its number of layers;
memory counts resident layers of the present context, not the ring, nor tails, nor growth;
the step time is that of a pass that begins with nothing on its way:

    T = L t + max_j [cumD(j) t_b - (j - 1) t]+     cumD(j) = sum_r c_r floor(j / (d_r + 1))

SLO and deposit do not enter the choice. They are looked at behind it, and only set the
status. When memory has no plan, the longest request is paused, until it has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from orbitflow_sglang.planner.columns import Choice, Columns, solve_columns
from orbitflow_sglang.planner.evaluation import never_fitting
from orbitflow_sglang.planner.patterns import distance_mask, widest_distances
from orbitflow_sglang.planner.pipeline import cold_step_s
from orbitflow_sglang.planner.problem import (
    BoolArray,
    IntArray,
    Plan,
    PlanningProblem,
    Status,
    slo_and_deposit,
)

VIOLATION_BUDGET = 2.0  # the authors' constant, whatever the number of requests
SHORTEST_WINDOW = 32  # steps; with deposits, fewest tokens are late in the shortest window
EXACT = 1e-9  # gap of the step time, relative
SOON = 1e-2  # the same for an engine, whose requests wait: 0.2 % slower steps, four times sooner


def solve_paper(problem: PlanningProblem) -> Plan:
    """The plan of least step time in the authors' model."""
    return _solve(problem, _request_wise)


def solve_paper_uniform(problem: PlanningProblem) -> Plan:
    """The same with one distance for all requests."""
    return _solve(problem, _uniform)


def distance_columns(pages: int, layers: int) -> tuple[IntArray, IntArray]:
    """Pages on the host ``[distances, layers]``, and in the arena ``[distances]``, of a unit."""
    masks = np.array([distance_mask(d, layers) for d in widest_distances(layers)])
    masks = masks.reshape(-1, layers)
    return masks * pages, (layers - masks.sum(axis=1)) * pages


def group_by_size(pages: IntArray, layers: int) -> list[Columns]:
    """Units with as many pages have the same columns: they are counted, not told apart."""
    groups = []
    for size in sorted({int(c) for c in pages}):
        rows = tuple(int(row) for row in np.flatnonzero(pages == size))
        groups.append(Columns(rows, *distance_columns(size, layers)))
    return groups


def _request_wise(problem: PlanningProblem, pages: IntArray) -> Choice | None:
    try:
        return solve_columns(
            group_by_size(pages, problem.layers),
            layer_compute_s=problem.layer_compute_s,
            page_transfer_s=problem.page_transfer_s,
            arena_pages=problem.arena_pages,
            gap=EXACT if problem.ring_pages is None else SOON,
            time_limit_s=problem.time_limit_s,
        )
    except TimeoutError:  # nothing at all in time: one distance for all needs no search
        found = _uniform(problem, pages)
        return found and replace(found, bound_s=problem.resident_step_s, proven=False)


def _uniform(problem: PlanningProblem, pages: IntArray) -> Choice | None:
    loads, resident = distance_columns(int(pages.sum()), problem.layers)
    times = [
        cold_step_s(load, problem.layer_compute_s, problem.page_transfer_s)
        if kept <= problem.arena_pages
        else np.inf
        for load, kept in zip(loads, resident, strict=True)
    ]
    best = int(np.argmin(times))
    if np.isinf(times[best]):
        return None
    return Choice((best,) * len(pages), times[best], times[best], proven=True, solves=0)


def _solve(
    problem: PlanningProblem, choose: Callable[[PlanningProblem, IntArray], Choice | None]
) -> Plan:
    begun = time.perf_counter()
    asked, problem = problem, _as_the_authors(problem)
    active = problem.with_users(problem.is_request)
    pages = problem.pages_now
    if problem.layers < 2:  # no distance offloads a single layer
        return _plan(problem, np.zeros((len(pages), problem.layers), np.int64), active, None)
    least = int(distance_columns(1, problem.layers)[1].min())  # layers that no distance offloads
    while True:
        rows = np.flatnonzero(active)
        # Under overload most tries fail, and on this alone: no solver is asked for those.
        fits = least * int(pages[rows].sum()) <= problem.arena_pages
        choice = choose(problem, pages[rows]) if len(rows) and fits else None
        if choice is not None or int((active & problem.is_request).sum()) <= 1:
            break
        running = np.flatnonzero(active & problem.is_request)
        # The longest with all that it uses; the last of equals.
        active[running[::-1][np.argmax(_lengths(problem)[running[::-1]])]] = False
        active = problem.with_users(active & problem.is_request)
    offloaded = np.zeros((len(pages), problem.layers), dtype=np.int64)
    # Who is paused is on the host as a whole, with all that it grew by until then.
    offloaded[~active] = asked.pages[~active][:, None]
    for number, row in enumerate(rows):
        loads, _ = distance_columns(int(pages[row]), problem.layers)
        # With nothing that fits, the most that the model can offload.
        offloaded[row] = loads[0 if choice is None else choice.columns[number]]
    plan = _plan(problem, offloaded, active, choice)
    return replace(plan, problem=asked, solve_s=time.perf_counter() - begun)


def _as_the_authors(problem: PlanningProblem) -> PlanningProblem:
    """``problem`` without growth. An engine, which says how large its ring is, also needs room
    for ring, tails and growth: as the authors' scheduler does, it hands over the rest."""
    kept = 0
    if problem.ring_pages is not None:
        more = int((problem.tails + problem.pages - problem.pages_now).sum())
        kept = problem.ring_pages + problem.layers * more
    units = tuple(replace(unit, growth_pages_per_layer=0) for unit in problem.units)
    return replace(problem, units=units, arena_pages=max(0, problem.arena_pages - kept))


def _lengths(problem: PlanningProblem) -> IntArray:
    lengths = problem.pages_now.copy()
    for row, users in problem.users:
        lengths[users] += problem.pages_now[row]
    return lengths


def _plan(
    problem: PlanningProblem, offloaded: IntArray, active: BoolArray, choice: Choice | None
) -> Plan:
    loads = offloaded[active].sum(axis=0)
    step = cold_step_s(loads, problem.layer_compute_s, problem.page_transfer_s)
    used = problem.layers * int(problem.pages_now[active].sum()) - int(loads.sum())
    slo, deposit = slo_and_deposit(problem)
    late = np.maximum(0.0, 1 - slo[active] / step - deposit[active] / SHORTEST_WINDOW)
    fits = used <= problem.arena_pages and (choice is not None or problem.layers < 2)
    status: Status
    if not fits or float(late[np.isfinite(late)].sum()) > VIOLATION_BUDGET:
        status = "infeasible"
    elif not active.all():
        status = "paused"
    else:
        status = "optimal" if choice is None or choice.proven else "feasible"
    return Plan(
        problem=problem,
        offloaded=offloaded,
        paused=~active,
        fits=fits,
        status=status,
        step_time_s=step,
        lower_bound_s=step if choice is None else min(step, choice.bound_s),
        arena_pages_used=used,
        ring_pages=2 * int(loads.max(initial=0)),
        never_fits=() if fits else never_fitting(problem),
    )
