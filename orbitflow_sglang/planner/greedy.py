"""A feasible placement in under a millisecond: incumbent, repair and fallback.

Streaming costs the same whoever pays, so what counts is how many pages a step streams and
how evenly they lie over the layers: the ring holds two of the largest layer, and what it
takes has to leave the device as well. Every layer's load is brought to one level, as
water in a basin, beginning with what is offloaded already: that moves the fewest pages.
"""

from __future__ import annotations

import numpy as np

from orbitflow_sglang.planner.evaluation import Memory
from orbitflow_sglang.planner.problem import (
    GAP,
    BoolArray,
    FloatArray,
    IntArray,
    PlanningProblem,
)

WHOLE_LAYER_TRIES = 8


def fill(
    problem: PlanningProblem,
    active: BoolArray,
    start: IntArray,
    *,
    page_ranges: bool,
    movable: BoolArray | None = None,
) -> IntArray:
    """Pages on the host, ``[units, layers]``, that leave the arena room for the active units.

    ``start`` stays where it is and only ``movable`` units (all, when None) offload more;
    paused units are on the host as a whole. Whole layers of units move, or with
    ``page_ranges`` exactly as many pages as needed. The result may not fit: where not
    enough can move, or the host is full.
    """
    pages = problem.pages
    offloaded = np.where(active[:, None], np.minimum(start, pages[:, None]), pages[:, None])
    memory = Memory.of(problem, active)
    loads = offloaded[active].sum(axis=0)
    if memory.room(loads) >= 0:
        return offloaded
    order = _order(problem, active if movable is None else active & movable, offloaded)
    most = loads + (pages[order][:, None] - offloaded[order]).sum(axis=0)
    waiting = problem.layers * int(pages[~active].sum())
    limits = (problem.stream_budget_pages, problem.host_pages and problem.host_pages - waiting)
    target = _targets(memory, loads, most, [limit for limit in limits if limit is not None])
    if page_ranges:
        offloaded[order] = _exactly(pages[order], offloaded[order], target - loads)
        return offloaded
    for _ in range(WHOLE_LAYER_TRIES):  # they overshoot, so the ring grows and asks for more
        filled = offloaded.copy()
        filled[order] = _whole_layers(pages[order], offloaded[order], target - loads)
        missing = -memory.room(filled[active].sum(axis=0))
        if missing <= 0 or (target >= most).all():
            break
        target = np.minimum(target + max(1, missing // max(1, problem.layers - 2)), most)
    return filled


def lower(problem: PlanningProblem, active: BoolArray, start: IntArray) -> IntArray:
    """``start`` with what exceeds the level of an even placement brought to the device.

    Of each layer the units that ``fill`` would offload last come back first. What is
    then missing, ``fill`` offloads from other layers.
    """
    memory = Memory.of(problem, active)
    lowered = np.minimum(start, problem.pages[:, None])
    order = _order(problem, active, lowered)[::-1]
    excess = np.maximum(lowered[active].sum(axis=0) - memory.level, 0)
    streamed = lowered[order]
    before = streamed.cumsum(axis=0) - streamed
    lowered[order] = streamed - np.clip(excess - before, 0, streamed)
    return lowered


def _targets(memory: Memory, loads: IntArray, most: IntArray, limits: list[int]) -> IntArray:
    """Loads, at least the present ``loads`` and at most ``most``, that fit: the least sum.

    The lowest are raised to one level. What rounding leaves over is taken off again where it
    counts, or their sum is above one of ``limits``; else one number of pages for all layers
    is easier to follow.
    """
    level = _level(memory, loads)
    target: IntArray = np.minimum(np.maximum(loads, level), most)
    spare = memory.room(target)
    raised = np.flatnonzero((target == level) & (target > loads))
    total = int(target.sum())
    tolerated = 0.8 * GAP * total if total <= min(limits, default=total) else 0.0
    if tolerated < spare < len(raised):
        # Spread over the depth, so that the link need not hurry anywhere.
        target[raised[np.arange(spare) * len(raised) // spare]] -= 1
    return target


def _level(memory: Memory, loads: IntArray) -> int:
    """The least load to which all layers must rise."""
    peak = int(loads.max(initial=0))
    if memory.level >= peak:
        return memory.level
    # The peak, and with it the ring, stays as it is: fill up below it.
    wanted = memory.need + memory.ring(loads)
    ascending = np.sort(loads)
    count = np.arange(1, len(loads) + 1)
    level = -((ascending.cumsum() - loads.sum() + wanted) // -count)
    return int(level[np.argmax(level <= np.append(ascending[1:], peak))])


def _order(problem: PlanningProblem, who: BoolArray, offloaded: IntArray) -> IntArray:
    """Who is offloaded first: those who are in part already, then the largest."""
    rows = np.flatnonzero(who)
    begun = offloaded[rows].any(axis=1)
    return rows[np.lexsort((-problem.pages[rows], ~begun))]


def _exactly(pages: IntArray, offloaded: IntArray, missing: IntArray) -> IntArray:
    """Each layer gets ``missing`` pages more, unit after unit; the last one gives a part."""
    free = pages[:, None] - offloaded
    before = free.cumsum(axis=0) - free
    filled: IntArray = offloaded + np.clip(missing - before, 0, free)
    return filled


def _whole_layers(pages: IntArray, offloaded: IntArray, missing: IntArray) -> IntArray:
    """As ``_exactly`` with whole layers of units.

    The unit that would be cut gives all of its pages in some of the layers, spread so
    that the layers up to any one hold what they should together, as in drawing a line.
    """
    exact = _exactly(pages, offloaded, missing)
    whole = np.where(exact == pages[:, None], exact, offloaded)
    cut = (exact > offloaded) & (exact < pages[:, None])
    free = pages[:, None] - offloaded
    share: FloatArray = np.divide(exact - offloaded, free, out=np.zeros(cut.shape), where=cut)
    rounded = np.ceil(share.cumsum(axis=1) - 1e-9)
    chosen = cut & (np.diff(rounded, axis=1, prepend=0.0) > 0)
    return np.where(chosen, pages[:, None], whole)
