"""What a placement needs and costs, and the bound that no placement beats.

With a set of units active, memory and time depend on the *loads* alone: the pages that
each layer streams, whoever owns them. That is what makes planning fast: the least sum of
loads that memory allows is known in closed form, and spreading it evenly reaches the
bound max(L t, D t_b) of a pipelined step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orbitflow_sglang.planner.pipeline import cyclic_step_s
from orbitflow_sglang.planner.problem import (
    GAP,
    BoolArray,
    FloatArray,
    IntArray,
    Plan,
    PlanningProblem,
    Status,
)

MIN_RING_PAGES = 2  # one is read while the next one arrives
RING_SHARE = 4  # the ring takes at most one page in so many of what tails leave of the arena
HOLDING_NOTHING = ("queue", "retract")  # modes whose waiting requests keep no KV


@dataclass(frozen=True)
class Memory:
    """Pages that the active units take, and the least that has to be streamed.

    The ring is as given, or it holds two of the largest layer up to a share of the arena;
    beyond that layers are attended in pieces. So a request larger than the arena decodes
    all the same, and keeps most of the arena for what stays.
    """

    layers: int
    total: int  # pages of all layers, were everything resident
    tails: int
    need: int  # total + tails + a ring of given size, beyond the arena
    ring_cap: int | None  # most pages of a ring that follows the plan; None: of given size

    @staticmethod
    def of(problem: PlanningProblem, active: BoolArray) -> Memory:
        total = problem.layers * int(problem.pages[active].sum())
        tails = problem.layers * int(problem.tails[active].sum())
        need = total + tails + (problem.ring_pages or 0) - problem.arena_pages
        cap = None if problem.ring_pages is not None else int(_ring_cap(problem, np.array(tails)))
        return Memory(problem.layers, total, tails, need, cap)

    def ring(self, loads: IntArray) -> int:
        """Pages of a ring that follows the plan; 0 where it is of given size."""
        return 0 if self.ring_cap is None else min(2 * int(loads.max(initial=0)), self.ring_cap)

    @cached_property
    def least_streamed(self) -> int:
        """Pages that any placement streams in a step, at least."""
        cap = None if self.ring_cap is None else np.array([self.ring_cap])
        return int(_least_streamed(self.layers, np.array([self.need]), cap)[0])

    @property
    def level(self) -> int:
        """The load of every layer at which an even placement fits."""
        return -(-self.least_streamed // self.layers)

    @property
    def in_pieces(self) -> bool:
        """Whether an even placement has more than half a ring of pages in a layer."""
        return self.ring_cap is not None and 2 * self.level > self.ring_cap

    def room(self, loads: IntArray) -> int:
        """Arena pages left with these loads; negative: what is missing."""
        return int(loads.sum()) - self.ring(loads) - self.need


def _ring_cap(problem: PlanningProblem, tails: IntArray) -> IntArray:
    return np.maximum(MIN_RING_PAGES, (problem.arena_pages - tails) // RING_SHARE)


def _least_streamed(layers: int, need: IntArray, cap: IntArray | None) -> IntArray:
    """``Memory.least_streamed`` of many."""
    least = need
    if cap is not None:
        least = need + cap
        if layers > 2:
            # D pages have a layer with at least ceil(D/L), of which the ring holds two.
            level = -(-need // (layers - 2))
            least = np.minimum(least, np.maximum((level - 1) * layers + 1, need + 2 * level))
    return np.where(need > 0, least, 0)


def step_time_s(
    problem: PlanningProblem, offloaded: IntArray, active: BoolArray, ring_pages: int
) -> float:
    """Time of a step in the middle of many, from the pipeline recurrence."""
    streamed = offloaded[active]
    setup = None
    if problem.transfer_setup_s:
        setup = problem.transfer_setup_s * (streamed > 0).sum(axis=0)
    loads = streamed.sum(axis=0)
    return cyclic_step_s(
        loads, problem.layer_compute_s, problem.page_transfer_s, ring_pages, setup_s=setup
    )


def lower_bound_s(problem: PlanningProblem, active: BoolArray, memory: Memory) -> float:
    """Step time that no plan for these units beats: max(L t, link time of the least bytes)."""
    streamed = memory.least_streamed
    link = streamed * problem.page_transfer_s
    if streamed and problem.transfer_setup_s:
        # The fewest transfers take the largest units, each at most once a layer.
        sizes = -np.sort(-problem.pages[active])
        reach = problem.layers * np.concatenate([[0], sizes.cumsum()])
        full = int(np.searchsorted(reach, streamed, side="right")) - 1
        transfers = problem.layers * full
        if full < len(sizes) and sizes[full]:
            transfers += math.ceil((streamed - int(reach[full])) / int(sizes[full]))
        link += transfers * problem.transfer_setup_s
    return max(problem.resident_step_s, link)


def bounds(
    problem: PlanningProblem, sets: BoolArray, excluded: BoolArray
) -> tuple[IntArray, FloatArray]:
    """For each of many sets of active units, ``[sets, units]``: pages that host and units
    lack for any placement, and the lower bound of the step time, without set-up."""
    totals = problem.layers * (sets @ problem.pages)
    tails = problem.layers * (sets @ problem.tails)
    need = totals + tails + (problem.ring_pages or 0) - problem.arena_pages
    cap = None if problem.ring_pages is not None else _ring_cap(problem, tails)
    streamed = _least_streamed(problem.layers, need, cap)
    missing = np.maximum(streamed - totals, 0)
    if problem.host_pages is not None:
        waiting = problem.layers * ((~sets & ~excluded) @ problem.pages)
        missing += np.maximum(waiting + streamed - problem.host_pages, 0)
    return missing, np.maximum(problem.resident_step_s, streamed * problem.page_transfer_s)


def memory_faults(
    problem: PlanningProblem, offloaded: IntArray, paused: BoolArray, memory: Memory
) -> list[str]:
    """What does not fit, in words."""
    loads = offloaded[~paused].sum(axis=0)
    faults = []
    if (loads > 0).any() and problem.ring_pages == 0:
        faults.append("pages are streamed without a ring")
    if memory.room(loads) < 0:
        faults.append(f"{-memory.room(loads)} pages more than the arena and a ring hold")
    on_host = int(offloaded.sum())
    if problem.host_pages is not None and on_host > problem.host_pages:
        faults.append(f"{on_host} pages exceed the host's {problem.host_pages}")
    return faults


def never_fitting(problem: PlanningProblem) -> tuple[str, ...]:
    """Requests that arena and host together cannot hold, each with all that it uses."""
    alone = np.diag(problem.is_request)
    for prefix, users in problem.users:
        alone[users, prefix] = True
    # Everybody else is not there, so nobody waits on the host.
    missing, _ = bounds(problem, alone, np.ones(len(problem.units), dtype=bool))
    never = (missing > 0) & problem.is_request
    return tuple(problem.units[row].id for row in np.flatnonzero(never))


def holding_nothing(problem: PlanningProblem, never: tuple[str, ...]) -> BoolArray:
    """Units that are not in memory at all, ``[units]``: the requests of ``never``, and a
    prefix that only such requests use."""
    nothing = np.array([unit.id in never for unit in problem.units], dtype=bool)
    for row, users in problem.users:
        nothing[row] = nothing[users].all()
    return nothing


def build_plan(
    problem: PlanningProblem,
    offloaded: IntArray,
    paused: BoolArray,
    *,
    never_fits: tuple[str, ...] = (),
) -> Plan:
    """The plan for a placement, with everything recomputed from it."""
    active = ~paused
    memory = Memory.of(problem, active)
    loads = offloaded[active].sum(axis=0)
    ring = memory.ring(loads) if problem.ring_pages is None else problem.ring_pages
    streamed = int(loads.sum())
    step = step_time_s(problem, offloaded, active, ring) if ring or not streamed else math.inf
    bound = lower_bound_s(problem, active, memory)
    over_budget = problem.stream_budget_pages is not None and streamed > problem.stream_budget_pages
    placed = not over_budget and not memory_faults(problem, offloaded, paused, memory)
    status: Status
    if never_fits or not placed:
        status = "infeasible"
    elif paused.any():
        status = "paused"
    else:
        status = "optimal" if step <= (1 + GAP) * bound else "feasible"
    return Plan(
        problem=problem,
        offloaded=offloaded,
        paused=paused,
        fits=placed,
        status=status,
        step_time_s=step,
        lower_bound_s=bound,
        arena_pages_used=memory.total - streamed + memory.tails,
        ring_pages=ring,
        never_fits=never_fits,
    )


def plan_faults(problem: PlanningProblem, offloaded: IntArray, paused: BoolArray) -> list[str]:
    """Why a placement must not be adopted, recomputed from it alone; empty if it may.

    A paused unit is on the host as a whole; where the mode or memory lets it wait
    without KV, it may hold nothing.
    """
    shape = (len(problem.units), problem.layers)
    if offloaded.shape != shape or paused.shape != shape[:1]:
        return [f"placement of shape {offloaded.shape} instead of {shape}"]
    faults = []
    pages = problem.pages[:, None]
    if (offloaded < 0).any() or (offloaded > pages).any():
        faults.append("more pages on the host than a unit has")
    for row, users in problem.users:
        if paused[row] != paused[users].all():
            faults.append("a prefix runs without its users, or they without it")
    if problem.mode in HOLDING_NOTHING:
        waits = np.ones(len(paused), dtype=bool)
    else:
        waits = holding_nothing(problem, never_fitting(problem))
    held = paused & (offloaded.any(axis=1) | ~waits)
    if (offloaded[held] != pages[held]).any():
        faults.append("a paused unit has pages on the device")
    streamed, budget = int(offloaded[~paused].sum()), problem.stream_budget_pages
    if budget is not None and streamed > budget:
        faults.append(f"{streamed} pages a step exceed the budget of {budget}")
    return faults + memory_faults(problem, offloaded, paused, Memory.of(problem, ~paused))
