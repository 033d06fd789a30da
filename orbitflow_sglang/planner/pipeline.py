"""The pipeline recurrence: how long a step takes when layers are streamed.

One link carries pages in layer order, one layer after another; layer j computes when
layer j-1 has and all its own pages have arrived. A page needs a slot of the staging ring,
and the slots of a layer come free when its compute ends. A layer with more than half a
ring of pages is attended in pieces of half a ring, each with its share of the layer's
compute. The link goes on with the next step's first layers as soon as there is room, so a
step in the middle of many (*cyclic*) is faster than a first one (*cold*).

``trace`` says this in plain loops, one piece after another; ``simulate`` gives the same
times for many plans at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orbitflow_sglang.planner.problem import FloatArray, IntArray

CONVERGED = 1e-9  # relative difference of two steps in a row
FIRST_STEPS = 3
MAX_STEPS = 64
MAX_PIECES = 64  # of a layer; beyond, pages are simulated in groups


class Piece(NamedTuple):
    """One layer, or a part of one, of one step: when its pages crossed the link and its
    compute ran, in seconds from the begin of the first step."""

    step: int
    layer: int  # 1-based
    pages: int
    link_begin_s: float  # of the first page, waits for slots behind it included
    link_end_s: float
    begin_s: float
    end_s: float


def trace(
    pages: Sequence[int],
    layer_compute_s: float,
    page_transfer_s: float,
    ring_pages: int,
    *,
    setup_s: Sequence[float] | None = None,
    steps: int = 1,
    lead_s: float = 0.0,
) -> list[Piece]:
    """Every piece of ``steps`` steps in a row.

    ``pages[j]`` pages of layer j are streamed, after ``setup_s[j]`` seconds of set-up on
    the link. The link begins ``lead_s`` before the first step, with an empty ring: that
    is the slack carried over from the step before. Raises ``ValueError`` where pages are
    streamed without a ring.
    """
    if ring_pages < 1 and any(pages):
        raise ValueError("streaming needs a ring of at least one page")
    half = max(1, ring_pages // 2)
    link = -lead_s
    computed = 0.0
    found = []
    # Pages whose slots come free together, and when; the first are the next to be reused.
    slots: deque[list[float]] = deque([[ring_pages, -np.inf]])
    for step in range(steps):
        for layer, count in enumerate(pages):
            left = count
            while True:
                size = left if count <= half else min(half, left)
                begin = link
                if left == count:
                    link += 0.0 if setup_s is None else setup_s[layer]
                wanted = size
                while wanted:
                    free, since = slots[0]
                    taken = min(wanted, int(free))
                    link = max(link, since) + taken * page_transfer_s
                    wanted -= taken
                    if taken == free:
                        slots.popleft()
                    else:
                        slots[0][0] -= taken
                start = max(computed, link) if size else computed
                computed = start + layer_compute_s * (size / count if count else 1.0)
                if size:
                    slots.append([size, computed])
                found.append(Piece(step, layer + 1, size, begin, link, start, computed))
                left -= size
                if left <= 0:
                    break
    return found


def step_ends(
    pages: Sequence[int],
    layer_compute_s: float,
    page_transfer_s: float,
    ring_pages: int,
    *,
    setup_s: Sequence[float] | None = None,
    steps: int = 1,
    lead_s: float = 0.0,
) -> list[float]:
    """When each step of ``trace`` ends, in seconds from the begin of the first."""
    ends = [0.0] * steps
    for piece in trace(
        pages, layer_compute_s, page_transfer_s, ring_pages,
        setup_s=setup_s, steps=steps, lead_s=lead_s,
    ):  # fmt: skip
        ends[piece.step] = piece.end_s
    return ends


def simulate(
    pages: IntArray,
    layer_compute_s: float,
    page_transfer_s: float,
    ring_pages: IntArray,
    *,
    setup_s: FloatArray | None = None,
    steps: int = 1,
    lead_s: float = 0.0,
) -> FloatArray:
    """``step_ends`` for B plans at once: pages ``[B, layers]``, rings ``[B]``.

    Returns ``[B, steps]`` seconds. A piece's last page, number P of all so far, waits for
    whatever is later: the link, or a slot. Page n takes the slot of page n - ring, so
    with C the end of the compute that freed that slot, the rest of the piece follows at
    the link's rate: C + (P - n + 1) t_b.
    """
    plans = len(pages)
    count, share, begins = _pieces(pages, ring_pages)
    stages = count.shape[1]
    setup = np.zeros(pages.shape) if setup_s is None else setup_s
    setup = np.where(begins >= 0, np.take_along_axis(setup, np.maximum(begins, 0), axis=1), 0.0)
    compute = layer_compute_s * share
    total = np.concatenate([np.zeros((plans, 1), np.int64), count.cumsum(axis=1)], axis=1)
    period = total[:, -1]
    rows = np.arange(plans)
    # Stage numbers run through all steps: P(k stages + j) = k period + total[j].
    ends = np.full((plans, stages * steps + 1), -np.inf)  # of stage i - 1, at i
    freed = np.zeros(plans, dtype=np.int64)  # stages whose slots have been taken into account
    link = np.full(plans, -lead_s)
    computed = np.zeros(plans)
    for number in range(stages * steps):
        step, stage = divmod(number, stages)
        before = step * period + total[:, stage]
        last = before + count[:, stage]
        link = link + setup[:, stage] + count[:, stage] * page_transfer_s
        while True:
            # The next stage to free slots covers pages up to `covered` of the ring's reuse.
            done, inner = np.divmod(freed, stages)
            reach = done * period + total[rows, inner] + ring_pages
            waits = reach < last
            if not waits.any():
                break
            rest = last - np.maximum(before, reach)
            late = ends[rows, freed + 1] + rest * page_transfer_s
            link = np.where(waits, np.maximum(link, late), link)
            covered = done * period + total[rows, inner + 1] + ring_pages
            advance = waits & (covered < last)
            freed = freed + advance
            if not advance.any():
                break
        computed = np.where(count[:, stage] > 0, np.maximum(computed, link), computed)
        computed = computed + compute[:, stage]
        ends[:, number + 1] = computed
    return ends[:, stages::stages]


def _pieces(pages: IntArray, ring_pages: IntArray) -> tuple[IntArray, FloatArray, IntArray]:
    """Pages, share of a layer's compute, and layer whose set-up comes first (or -1), of
    each stage, ``[B, stages]``; plans with fewer stages are filled up with empty ones."""
    half = np.maximum(1, ring_pages // 2)[:, None]
    number = np.where(pages > half, -(-pages // half), 1)
    stages = int(number.sum(axis=1).max(initial=0))
    plans, layers = pages.shape
    count = np.zeros((plans, stages), dtype=np.int64)
    share = np.zeros((plans, stages))
    begins = np.full((plans, stages), -1, dtype=np.int64)
    for row in range(plans):
        layer = np.repeat(np.arange(layers), number[row])
        order = np.arange(len(layer)) - np.repeat(number[row].cumsum() - number[row], number[row])
        whole = pages[row, layer]
        split = number[row, layer] > 1
        size = np.minimum(whole - order * half[row], np.where(split, half[row], whole))
        used = len(layer)
        count[row, :used] = size
        share[row, :used] = np.where(whole > 0, size / np.maximum(whole, 1), 1.0)
        begins[row, :used] = np.where(order == 0, layer, -1)
    return count, share, begins


def cyclic_step_s(
    pages: IntArray,
    layer_compute_s: float,
    page_transfer_s: float,
    ring_pages: int,
    *,
    setup_s: FloatArray | None = None,
) -> float:
    """Time of a step in the middle of many, seconds; ``pages`` and ``setup_s``: ``[layers]``."""
    compute = len(pages) * layer_compute_s
    peak = int(pages.max(initial=0))
    if peak == 0:
        return compute
    setup = np.zeros(len(pages)) if setup_s is None else setup_s
    transfer = setup + pages * page_transfer_s
    slowest = float(transfer.max())
    if 2 * peak <= ring_pages and slowest <= layer_compute_s:
        return compute  # each layer arrives while the one before computes
    if 2 * peak <= ring_pages and float(transfer.min()) == slowest:
        return len(pages) * slowest  # link-bound: the ring has room for the next layer
    steps = FIRST_STEPS
    group = -(-peak // (MAX_PIECES * max(1, ring_pages // 2)))
    grouped, ring = -(-pages // group), max(2, ring_pages // group)
    while True:
        ends = step_ends(
            grouped.tolist(), layer_compute_s, page_transfer_s * group, ring,
            setup_s=setup.tolist(), steps=steps,
        )  # fmt: skip
        last, before = ends[-1] - ends[-2], ends[-2] - ends[-3]
        if abs(last - before) <= CONVERGED * last:
            return last
        if steps >= MAX_STEPS:  # a period of several steps: their mean
            half = steps // 2
            return (ends[-1] - ends[-1 - half]) / half
        steps *= 2


def cold_step_s(pages: IntArray, layer_compute_s: float, page_transfer_s: float) -> float:
    """A first step with a ring that holds everything, seconds (method notes, c).

    T = L t + max_j [cumD(j) t_b - (j-1) t]+
    """
    layers = len(pages)
    due = np.cumsum(pages) * page_transfer_s - np.arange(layers) * layer_compute_s
    return layers * layer_compute_s + max(0.0, float(due.max(initial=0.0)))
