"""The integer program that says who runs: one model, solved for one objective after another.

For given active units the least streamed pages D are known in closed form, and an even
spread over the layers reaches T = max(L t, D t_b) (``evaluation``). So the prefix rows of
the pipeline, one a layer, collapse into the last, and what is left to decide is who is
paused. Units r with c_r pages a layer, tails included in w_r = L (c_r + tail):

    z_r in {0,1} paused, D >= 0 streamed pages, T step time, v_r >= 0 late tokens
    memory     sum w_r (1 - z_r) - (1 - 2/L) D        <= arena      ring = 2 D/L
    source     D <= sum L c_r (1 - z_r)
    pipeline   T >= L t,  T >= t_b D
    SLO        v_r >= W T / slo_r - deposit_r - W (1 - z_r)
    host       D + sum L c_r z_r <= host
    prefix     z_s <= z_u for each user u of prefix s, z_s >= sum z_u - (users - 1)
    somebody   sum (1 - z_r) >= 1

Objectives, each solved with the ones before as constraints: late tokens; pauses of requests
without an SLO; step time and, all together less than its gap, pauses, of which age and
migration are a fraction.
``docs/planner.md`` has the reasons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from orbitflow_sglang.planner.evaluation import Memory
from orbitflow_sglang.planner.problem import (
    GAP,
    BoolArray,
    FloatArray,
    PlanningProblem,
    slo_and_deposit,
)

NODE_LIMIT = 400  # of a solve: it, and not a clock, ends the search, so that plans repeat
LATE_GAP = 1e-6  # of late tokens, which come before everything else
SLACK = 1e-7  # relative: what an objective may give back for the ones behind it


@dataclass(frozen=True)
class Activation:
    """Who is paused, ``[units]``, and whether every objective was solved to its gap."""

    paused: BoolArray
    proven: bool


def choose_paused(
    problem: PlanningProblem, excluded: BoolArray, late: float, without_slo: int
) -> Activation | None:
    """Who should pause; None: no choice was found within the limits.

    ``excluded`` requests hold nothing and are paused whatever comes of it. ``late`` and
    ``without_slo``, late tokens and pauses of requests without an SLO, are those of a known
    choice, the one to beat.
    """
    model = _Model(problem, excluded)
    until = None if problem.time_limit_s is None else time.monotonic() + problem.time_limit_s
    limits: list[tuple[FloatArray, float]] = []
    point: FloatArray | None = None
    proven = True

    def solve(objective: FloatArray, gap: float = GAP / 2) -> float | None:
        nonlocal point, proven
        left = None if until is None else until - time.monotonic()
        found = model.solve(objective, limits, gap, left)
        if found is None:
            proven = False
            return None
        point, ended = found
        proven &= ended
        return math.fsum(objective * point)

    objective = model.row(late=1.0)
    if late > 0:
        limits.append((objective, late * (1 + SLACK)))
        value = solve(objective, LATE_GAP)
        limits.clear()
        if value is not None and point is not None:
            late, without_slo = value, model.paused_without_slo(point)
    limits.append((objective, late * (1 + SLACK) + SLACK))
    objective = model.row(without_slo=1.0)
    if without_slo > 0 and objective.any():
        value = solve(objective)
        without_slo = without_slo if value is None else round(value)
    if objective.any():
        limits.append((objective, without_slo + 0.5))
    # All pauses together weigh less than the gap of the step time, which is at least 1.
    solve(model.row(step=1.0, pauses=GAP / 2 / (len(problem.units) + 1)))
    if point is None:
        return None
    return Activation(model.paused(point), proven)


class _Model:
    """Times in resident steps and pages in arenas, so that HiGHS's tolerances mean the same.

    Columns: z of each unit, v of each request with an SLO, D, T, M (migration), and Y, whether
    layers are attended in pieces.
    """

    def __init__(self, problem: PlanningProblem, excluded: BoolArray) -> None:
        self._problem = problem
        self._excluded = excluded
        units = len(problem.units)
        slo, deposit = slo_and_deposit(problem)
        self._judged = np.flatnonzero(np.isfinite(slo) & ~excluded)
        judged = len(self._judged)
        self._v = slice(units, units + judged)
        self._d, self._t, self._m = units + judged, units + judged + 1, units + judged + 2
        self._y = units + judged + 3
        self.width = units + judged + 4
        everyone = ~excluded
        memory = Memory.of(problem, problem.with_users(everyone & problem.is_request))
        scale = float(max(problem.arena_pages, 1))
        weight = problem.layers * (problem.pages + problem.tails) / scale
        held = problem.layers * problem.pages / scale
        weight[excluded] = held[excluded] = 0
        least_page = problem.page_transfer_s
        if problem.transfer_setup_s and problem.pages[everyone].max(initial=0):
            least_page += problem.transfer_setup_s / int(problem.pages[everyone].max())
        step = max(problem.resident_step_s, 1e-30)
        page = least_page * scale / step
        self.step_range = max(1.0, page * float(held.sum())) - 1.0
        window = float(problem.window_steps)

        self._matrix: list[FloatArray] = []
        self._upper: list[float] = []
        self._memory(memory, weight, scale)
        self._at_most(held.sum(), z=held, d=1.0)
        self._at_most(0.0, d=page, t=-1.0)
        if problem.host_pages is not None:
            self._at_most(problem.host_pages / scale, z=held, d=1.0)
        pauses, lateness = np.eye(units), np.eye(judged)
        for number, row in enumerate(self._judged):
            rate = window * step / slo[row]
            self._at_most(
                deposit[row] + window, z=window * pauses[row], v=-lateness[number], t=rate
            )
        for prefix, users in problem.users:
            for user in users:
                self._at_most(0.0, z=pauses[prefix] - pauses[user])
            together = pauses[users].sum(axis=0) - pauses[prefix]
            self._at_most(len(users) - 1.0, z=together)
        requests = (problem.is_request & everyone).astype(float)
        self._at_most(requests.sum() - 1, z=requests)
        # |migration| of the active units together: D against what they have on the host.
        present = problem.present.sum(axis=1) / scale
        present[excluded] = 0
        self._at_most(present.sum(), z=present, d=1.0, m=-1.0)
        self._at_most(-present.sum(), z=-present, d=-1.0, m=-1.0)

        self._without_slo = (requests > 0) & ~np.isfinite(slo)
        self._requests = requests
        # Age and migration decide between equal numbers of pauses: in sum below one pause.
        oldest = max((unit.age_s for unit in problem.units), default=0.0)
        age = np.array([unit.age_s for unit in problem.units]) / max(oldest, 1e-30)
        leaves = held - present
        most = max(float(held.sum()), 1e-30)
        self._tie = (0.4 * age / max(1.0, requests.sum()) + 0.25 * leaves / most) * everyone
        self._tie_m = 0.25 / most

    def _memory(self, memory: Memory, weight: FloatArray, scale: float) -> None:
        """What stays fits beside a ring of two layers or, with Y, of its greatest size."""
        arena = self._problem.arena_pages / scale - weight.sum()
        if memory.ring_cap is None:
            ring = (self._problem.ring_pages or 0) / scale
            self._at_most(arena - ring, z=-weight, d=-1.0)
            return
        share = 1 - 2 / self._problem.layers
        if not memory.in_pieces:
            self._at_most(arena, z=-weight, d=-share)
            return
        # Fewer units have fewer tails, and the cap is a little larger: the smallest is taken.
        cap, most = memory.ring_cap / scale, 2 * memory.total / self._problem.layers / scale
        self._at_most(arena, z=-weight, d=-share, y=-most)
        self._at_most(arena - cap + most, z=-weight, d=-1.0, y=most)

    def row(
        self, late: float = 0.0, without_slo: float = 0.0, step: float = 0.0, pauses: float = 0.0
    ) -> FloatArray:
        """An objective or the left side of a limit."""
        row = np.zeros(self.width)
        units = len(self._problem.units)
        row[self._v] = late
        row[:units] = without_slo * self._without_slo + pauses * (self._requests + self._tie)
        row[self._t] = step
        row[self._m] = pauses * self._tie_m
        return row

    def solve(
        self,
        objective: FloatArray,
        limits: Sequence[tuple[FloatArray, float]],
        gap: float,
        time_limit_s: float | None,
    ) -> tuple[FloatArray, bool] | None:
        """The best point found and whether that is proven; None: nothing was found."""
        if time_limit_s is not None and time_limit_s <= 0:
            return None
        units = len(self._problem.units)
        matrix = np.stack([*self._matrix, *(row for row, _ in limits)])
        upper = np.array([*self._upper, *(most for _, most in limits)])
        lowest, highest = np.zeros(self.width), np.full(self.width, np.inf)
        highest[:units] = 1
        lowest[:units] = self._excluded & self._problem.is_request
        lowest[self._t], highest[self._t] = 1.0, 1.0 + self.step_range
        integer = np.zeros(self.width)
        integer[:units] = integer[self._y] = 1
        highest[self._y] = 1
        options: dict[str, float] = {"mip_rel_gap": gap, "node_limit": NODE_LIMIT}
        if time_limit_s is not None:
            options["time_limit"] = time_limit_s
        result = milp(
            objective,
            integrality=integer,
            bounds=Bounds(lowest, highest),
            constraints=LinearConstraint(matrix, -np.inf, upper),
            options=options,
        )
        if result.x is None:
            return None
        return result.x, result.status == 0

    def paused_without_slo(self, point: FloatArray) -> int:
        """How many requests without an SLO are paused at ``point``."""
        return round(math.fsum(self.row(without_slo=1.0) * point))

    def paused(self, point: FloatArray) -> BoolArray:
        """Who is paused at ``point``: a prefix as soon as all that use it are."""
        paused = point[: len(self._problem.units)] > 0.5
        active = self._problem.with_users(~paused & self._problem.is_request)
        chosen: BoolArray = ~active
        return chosen

    def _at_most(self, limit: float, **parts: FloatArray | float) -> None:
        row = np.zeros(self.width)
        where: dict[str, int | slice] = {"z": slice(len(self._problem.units)), "v": self._v}
        where |= {"d": self._d, "t": self._t, "m": self._m, "y": self._y}
        for name, value in parts.items():
            row[where[name]] = value
        self._matrix.append(row)
        self._upper.append(limit)
