"""One entry for every policy that places layers: a problem goes in, a plan comes out.

``orbitflow`` is ours, ``paper`` and ``paper-uniform`` are the authors' model. The others
are what people run or compare with, each by the rule of its source. They do not know of SLOs;
only ``queue`` and ``retract`` have somebody wait, so what others place may not fit: the status
then says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from orbitflow_sglang.planner.evaluation import build_plan
from orbitflow_sglang.planner.paper import solve_paper, solve_paper_uniform
from orbitflow_sglang.planner.patterns import distance_mask
from orbitflow_sglang.planner.policies import make_policy
from orbitflow_sglang.planner.problem import BoolArray, IntArray, Plan, PlanningProblem
from orbitflow_sglang.planner.solver import solve

Mode = Callable[[PlanningProblem], Plan]
MODE_HELP = (
    "orbitflow, paper, paper-uniform, next-layer, flexgen, select-n, distn-single, static:d, "
    "all-host, random:SEED, resident, queue or retract"
)


def make_plan(problem: PlanningProblem) -> Plan:
    """Plan by the mode of the problem. Raises ``ValueError`` for a mode that is not there.

    Units are put in the order of their ids first, so that theirs does not matter.
    """
    begun = time.perf_counter()
    ordered = problem.canonical()
    plan = find_mode(problem.mode)(ordered).in_order_of(problem)
    return replace(plan, solve_s=time.perf_counter() - begun)


def find_mode(name: str) -> Mode:
    """The planner of that name. Raises ``ValueError`` that says which names there are."""
    if name in _MODES:
        return _MODES[name]
    try:
        policy = make_policy(name)
    except ValueError:
        raise ValueError(f"{name!r} is none of {MODE_HELP}") from None

    def placed(problem: PlanningProblem) -> Plan:
        return _offload(problem, policy.place(len(problem.units), problem.layers))

    return placed


def _next_layer(problem: PlanningProblem) -> Plan:
    """DeepSpeed-Inference: all layers on the host; while one computes the next one arrives."""
    return _offload(problem, np.ones(problem.layers, dtype=bool))


def _flexgen(problem: PlanningProblem) -> Plan:
    """FlexGen+: as many layers on the device as it holds were each request of average length.

    Per layer b = sum of max(c_r, average) + 1, tails included in c_r; every request keeps
    floor(N / b) layers. The authors take the average over the whole trace, which only an
    oracle knows.
    """
    per_layer = int(np.ceil(np.maximum(_lengths(problem), _average(problem))).sum())
    return _offload(problem, _even(problem, per_layer + len(problem.units)))


def _distn_single(problem: PlanningProblem) -> Plan:
    """Dynamic heuristic: FlexGen+ on the present lengths alone, with two pages to spare each."""
    per_layer = int(_lengths(problem).sum()) + 2 * len(problem.units)
    return _offload(problem, _even(problem, per_layer))


def _even(problem: PlanningProblem, per_layer: int) -> BoolArray:
    """The one distance at which the arena holds the layers that stay, at least 1."""
    layers = problem.layers
    off = layers - min(layers, problem.arena_pages // max(1, per_layer))
    if off == 0:
        return np.zeros(layers, dtype=bool)
    return distance_mask(max(1, layers // off - 1), layers)


def _select_n(problem: PlanningProblem) -> Plan:
    """Select-N: distance L/n, n the times that a pass of transfers fits into one of compute.

    As the authors implement it: n = floor(compute of a step / transfer of all layers), with
    lengths of at least the average; L itself stands for no offloading, and n < 1 for a
    distance of 1. Neither SLO nor memory enters.
    """
    layers = problem.layers
    pages = float(np.maximum(_lengths(problem), _average(problem)).sum())
    transfer = layers * pages * problem.page_transfer_s
    times = int(min(layers, problem.resident_step_s / transfer)) if transfer else layers
    distance = max(1, layers // times) if times >= 1 else 1
    return _offload(problem, distance_mask(distance, layers))


def _queue(problem: PlanningProblem) -> Plan:
    """No offloading: in the order of age, requests run as long as all fit; the rest waits."""
    order = _by_age(problem)
    running = 0
    while running < len(order) and _resident(problem, order[: running + 1]).fits:
        running += 1
    return _resident(problem, order[:running])


def _retract(problem: PlanningProblem) -> Plan:
    """Stock SGLang: what does not fit is thrown away, the youngest first, and computed again.

    SGLang retracts who has the fewest output tokens; age stands for them here.
    """
    order = _by_age(problem)
    running = len(order)
    while running > 1 and not _resident(problem, order[:running]).fits:
        running -= 1
    return _resident(problem, order[:running])


def _by_age(problem: PlanningProblem) -> list[int]:
    """Requests, the oldest first."""
    requests = np.flatnonzero(problem.is_request).tolist()
    return sorted(requests, key=lambda row: -problem.units[row].age_s)


def _resident(problem: PlanningProblem, running: list[int]) -> Plan:
    active = np.zeros(len(problem.units), dtype=bool)
    active[running] = True
    active = problem.with_users(active)
    offloaded = np.zeros((len(problem.units), problem.layers), dtype=np.int64)
    return build_plan(problem, offloaded, ~active)


def _lengths(problem: PlanningProblem) -> IntArray:
    """Pages in one layer now, the tail counted as one."""
    return problem.pages_now + problem.tails


def _average(problem: PlanningProblem) -> float:
    given = problem.average_pages_per_layer
    if given is not None:
        return given
    return float(_lengths(problem).mean()) if problem.units else 0.0


def _offload(problem: PlanningProblem, mask: BoolArray) -> Plan:
    """All run; ``mask``, ``[layers]`` or ``[units, layers]``, says what is on the host."""
    offloaded = np.where(mask, problem.pages[:, None], 0)
    return build_plan(problem, offloaded, np.zeros(len(problem.units), dtype=bool))


_MODES: dict[str, Mode] = {
    "orbitflow": solve,
    "paper": solve_paper,
    "paper-uniform": solve_paper_uniform,
    "next-layer": _next_layer,
    "flexgen": _flexgen,
    "select-n": _select_n,
    "distn-single": _distn_single,
    "queue": _queue,
    "retract": _retract,
}
