"""The integer program that chooses one placement from a list for each unit.

It is the authors' model (arXiv 2601.10729 and the code published with it) in a smaller
form: their layer-wise transfer variables can be eliminated, because a transfer is best
done as early as the link allows. The step time is that of a cold first pass, or that of a
step in the middle of many on a link that never waits for the ring:

    cold    T = L t + max_j [cumD(j) t_b - (j-1) t]+        one row for each layer j
    cyclic  T = max(L t, D t_b)                             the last row alone

Rows that do not bind are most of them, so a cold problem starts with the last row and
gets those that its solution breaks, until none is broken. Units with the same columns
are counted instead of told apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from orbitflow_sglang.planner.problem import FloatArray, IntArray

NODE_LIMIT = 20_000  # of a solve: it, and not a clock, ends a search that does not
TOLERANCE = 1e-9  # a row broken by less, relative to a layer's compute, is kept


@dataclass(frozen=True)
class Columns:
    """Placements to choose from, for one unit or several that are alike."""

    rows: tuple[int, ...]  # the units
    offloaded: IntArray  # pages on the host, [columns, layers]
    resident: IntArray  # pages in the arena, all layers, [columns]


@dataclass(frozen=True)
class Choice:
    """What the solver chose: a column for every unit, and what it knows of the optimum."""

    columns: tuple[int, ...]  # by unit
    step_s: float
    bound_s: float  # no choice is faster
    proven: bool  # within the gap asked for
    solves: int


def solve_columns(
    groups: Sequence[Columns],
    *,
    layer_compute_s: float,
    page_transfer_s: float,
    arena_pages: int,
    ring_per_peak: float = 0.0,
    cyclic: bool = False,
    gap: float = 1e-9,
    time_limit_s: float | None = None,
) -> Choice | None:
    """The choice of least step time whose resident pages fit the arena; None: none fits.

    With ``ring_per_peak`` the arena also holds a ring of that many times the largest
    layer. Raises ``TimeoutError`` when the limit passes before anything was found.
    """
    layers = groups[0].offloaded.shape[1]
    model = _Model(groups, layer_compute_s, page_transfer_s, arena_pages, ring_per_peak)
    rows = [layers - 1]
    until = None if time_limit_s is None else time.monotonic() + time_limit_s
    bound = 0.0
    solves = 0
    best: tuple[float, FloatArray] | None = None
    while True:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            break
        try:
            result = model.solve(rows, cyclic, gap, left)
        except TimeoutError:
            if best is None:
                raise
            break
        solves += 1
        if result is None:
            if best is None and solves == 1:
                return None
            break
        counts, lower, proven = result
        bound = max(bound, lower)
        excess = model.excess(counts, cyclic)
        stall = max(0.0, float(excess.max()))
        if best is None or stall < best[0]:
            best = (stall, counts)
        broken = np.flatnonzero(excess > max(bound, 0.0) + gap * layers + TOLERANCE)
        missing = [int(row) for row in broken if row not in rows]
        if cyclic or not missing or not proven:
            break
        if best[0] - bound <= gap * layers + TOLERANCE:
            break
        rows += [max(missing, key=lambda row: excess[row]), missing[0], missing[-1]]
        rows = sorted(set(rows))
    if best is None:
        raise TimeoutError(f"no solution within {time_limit_s:g} s")
    stall, counts = best
    unit_columns = model.assign(counts)
    step = (layers + stall) * layer_compute_s
    lower_bound = (layers + min(bound, stall)) * layer_compute_s
    proven = step - lower_bound <= max(gap, TOLERANCE) * step
    return Choice(unit_columns, step, lower_bound, proven, solves)


class _Model:
    """Times in units of a layer's compute, so that HiGHS's tolerances mean the same anywhere."""

    def __init__(
        self,
        groups: Sequence[Columns],
        layer_compute_s: float,
        page_transfer_s: float,
        arena_pages: int,
        ring_per_peak: float,
    ) -> None:
        self._groups = groups
        self._layers = groups[0].offloaded.shape[1]
        self._cost = page_transfer_s / layer_compute_s
        self._arena = arena_pages
        self._ring = ring_per_peak
        self._loads = np.concatenate([group.offloaded for group in groups]).astype(float)
        self._resident = np.concatenate([group.resident for group in groups]).astype(float)
        self._sizes = [len(group.offloaded) for group in groups]
        self._begins = np.concatenate([[0], np.cumsum(self._sizes)])
        self._due = self._loads.cumsum(axis=1) * self._cost  # [columns, layers]

    def solve(
        self,
        rows: Sequence[int],
        cyclic: bool,
        gap: float,
        time_limit_s: float | None,
    ) -> tuple[FloatArray, float, bool] | None:
        """Counts of every column, a bound of the stall, and whether the gap was reached."""
        columns = len(self._resident)
        ring = self._ring > 0
        width = columns + 1 + ring  # the stall, and the largest layer
        constraints = []
        one = np.zeros((len(self._groups), width))
        for number in range(len(self._groups)):
            one[number, self._begins[number] : self._begins[number + 1]] = 1
        units = np.array([len(group.rows) for group in self._groups], dtype=float)
        constraints.append(LinearConstraint(one, units, units))
        memory = np.zeros((1, width))
        memory[0, :columns] = self._resident
        if ring:
            memory[0, -1] = self._ring
        constraints.append(LinearConstraint(memory, -np.inf, self._arena))
        pipeline = np.zeros((len(rows), width))
        pipeline[:, :columns] = self._due[:, rows].T
        pipeline[:, columns] = -1
        hidden = self._hidden(cyclic)[rows]
        constraints.append(LinearConstraint(pipeline, -np.inf, hidden))
        if ring:
            peak = np.zeros((self._layers, width))
            peak[:, :columns] = self._loads.T
            peak[:, -1] = -1
            constraints.append(LinearConstraint(peak, -np.inf, 0))
        upper = np.full(width, np.inf)
        upper[:columns] = np.repeat(units, self._sizes)
        integrality = np.zeros(width)
        integrality[:columns] = 1
        objective = np.zeros(width)
        objective[columns] = 1
        options: dict[str, float] = {"mip_rel_gap": gap, "node_limit": NODE_LIMIT}
        if time_limit_s is not None:
            options["time_limit"] = time_limit_s
        result = milp(
            objective, integrality=integrality, bounds=Bounds(0, upper),
            constraints=constraints, options=options,
        )  # fmt: skip
        if result.x is None:
            if result.status == 2:
                return None
            raise TimeoutError("no solution within the limits")
        counts: FloatArray = np.round(result.x[:columns])
        lower = float(result.mip_dual_bound) if result.mip_dual_bound is not None else 0.0
        return counts, lower, result.status == 0

    def excess(self, counts: FloatArray, cyclic: bool) -> FloatArray:
        """By how much the transfers due by each layer exceed what compute hides, ``[layers]``."""
        # Not by BLAS, whose last digits differ between processors.
        due: FloatArray = (counts[:, None] * self._due).sum(axis=0) - self._hidden(cyclic)
        return due[-1:] if cyclic else due

    def _hidden(self, cyclic: bool) -> FloatArray:
        hidden = np.arange(self._layers, dtype=float)
        if cyclic:
            hidden[-1] = self._layers
        return hidden

    def assign(self, counts: FloatArray) -> tuple[int, ...]:
        """The column of each unit."""
        chosen: dict[int, int] = {}
        for number, group in enumerate(self._groups):
            block = counts[self._begins[number] : self._begins[number + 1]].astype(int)
            chosen.update(zip(group.rows, np.repeat(np.arange(len(block)), block), strict=True))
        return tuple(int(chosen[row]) for row in sorted(chosen))
