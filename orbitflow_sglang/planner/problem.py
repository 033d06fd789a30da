"""What is planned and what a plan is.

A problem is planned for the end of its validity window: memory grows until then, and a
plan has to hold its promises throughout. Pages are counted in one layer; a unit has the
same number in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from orbitflow_sglang.planner.patterns import (
    BoolArray,
    FloatArray,
    IntArray,
    parse_pattern,
    pattern_name,
)

__all__ = ["BoolArray", "FloatArray", "IntArray"]

Status = Literal["optimal", "feasible", "paused", "infeasible"]

GAP = 0.01  # a plan this close to its lower bound is called optimal and not improved further


@dataclass(frozen=True)
class Unit:
    """Pages that are placed together: one request's own, or a prefix that several use.

    Whole pages only: the partly filled tail page of a request comes on top, one a layer,
    always on the device.
    """

    id: str
    pages_per_layer: int
    tpot_slo_s: float | None = None
    deposit_tokens: float = 0.0  # generated minus due, now; negative: behind
    shared_by: tuple[str, ...] = ()  # ids of the requests that use it; empty: a request's own
    present: tuple[int, ...] | str = ()  # 1-based layers offloaded now, or the name of a pattern
    growth_pages_per_layer: int = 0  # over the whole window
    age_s: float = 0.0

    @property
    def pages_at_end(self) -> int:
        """Pages in one layer at the end of the validity window."""
        return self.pages_per_layer + self.growth_pages_per_layer


@dataclass(frozen=True)
class PlanningProblem:
    """Units to place in one arena, and what a step costs. Times in seconds."""

    layers: int
    arena_pages: int
    layer_compute_s: float  # t: compute time of one layer of a step of the whole batch
    page_transfer_s: float  # t_b: H2D time of one page of one layer
    units: tuple[Unit, ...]
    mode: str = "orbitflow"
    window_steps: int = 32
    stream_budget_pages: int | None = None  # a step's streamed pages; then nobody is paused
    ring_pages: int | None = None  # None: twice the largest layer, at most a quarter of the arena
    transfer_setup_s: float = 0.0  # for each (unit, layer) that is streamed
    host_pages: int | None = None  # None: as many as are needed
    time_limit_s: float | None = None
    average_pages_per_layer: float | None = None  # of requests seen so far; FlexGen, Select-N

    @cached_property
    def pages(self) -> IntArray:
        """Pages in one layer at the end of the window, ``[units]``."""
        return np.array([unit.pages_at_end for unit in self.units], dtype=np.int64)

    @cached_property
    def pages_now(self) -> IntArray:
        """Pages in one layer now, without growth, ``[units]``."""
        return np.array([unit.pages_per_layer for unit in self.units], dtype=np.int64)

    @cached_property
    def is_request(self) -> BoolArray:
        """A request's own pages, not a prefix that several use, ``[units]``."""
        return np.array([not unit.shared_by for unit in self.units], dtype=bool)

    @cached_property
    def tails(self) -> IntArray:
        """Tail pages in one layer, ``[units]``: one for each request, none for a prefix."""
        return self.is_request.astype(np.int64)

    @cached_property
    def present(self) -> IntArray:
        """Pages on the host now, as far as they still count, ``[units, layers]``."""
        placed = np.zeros((len(self.units), self.layers), dtype=np.int64)
        for row, unit in enumerate(self.units):
            if isinstance(unit.present, str):
                pattern, pages = unit.present, unit.pages_at_end
                placed[row] = parse_pattern(pattern, self.layers, pages, clip=True)
            elif unit.present:
                placed[row, [layer - 1 for layer in unit.present]] = unit.pages_at_end
        return placed

    @cached_property
    def users(self) -> tuple[tuple[int, IntArray], ...]:
        """Each shared prefix, with the requests that use it; as rows of ``units``."""
        row_of = {unit.id: row for row, unit in enumerate(self.units)}
        return tuple(
            (row, np.array([row_of[user] for user in unit.shared_by], dtype=np.int64))
            for row, unit in enumerate(self.units)
            if unit.shared_by
        )

    @property
    def resident_step_s(self) -> float:
        """Compute time of a step: what it takes when nothing is streamed."""
        return self.layers * self.layer_compute_s

    def canonical(self) -> PlanningProblem:
        """The same problem with its units in the order of their ids."""
        return replace(self, units=tuple(sorted(self.units, key=lambda unit: unit.id)))

    def with_users(self, active: BoolArray) -> BoolArray:
        """``active``, ``[units]``, with every prefix active that an active request uses."""
        if not self.users:
            return active
        active = active.copy()
        for row, users in self.users:
            active[row] = active[users].any()
        return active


@dataclass(frozen=True)
class UnitPlan:
    """Where one unit lives. A paused unit is not streamed."""

    id: str
    pattern: str
    offloaded_layers: tuple[int, ...]  # 1-based; those with at least one page on the host
    paused: bool
    slo_met: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """Placements of a batch, with what they cost. Rows are the units of ``problem``."""

    problem: PlanningProblem
    offloaded: IntArray  # pages on the host, [units, layers]
    paused: BoolArray  # on the host as a whole, or holding nothing (never_fits, queue, retract)
    fits: bool  # arena, host and budget hold what is active
    status: Status
    step_time_s: float
    lower_bound_s: float  # of the step time, for the units that are not paused
    arena_pages_used: int  # resident + tails + growth (by ``paper`` resident), without the ring
    ring_pages: int
    never_fits: tuple[str, ...] = ()  # requests that no plan can hold
    solve_s: float = field(default=0.0)

    def in_order_of(self, problem: PlanningProblem) -> Plan:
        """This plan with the units in the order of ``problem``, which has the same."""
        if [unit.id for unit in self.problem.units] == [unit.id for unit in problem.units]:
            return self
        row_of = {unit.id: row for row, unit in enumerate(self.problem.units)}
        rows = [row_of[unit.id] for unit in problem.units]
        units = tuple(self.problem.units[row] for row in rows)
        reordered = replace(self.problem, units=units)
        return replace(
            self, problem=reordered, offloaded=self.offloaded[rows], paused=self.paused[rows]
        )

    @property
    def stall_s(self) -> float:
        """Step time beyond compute."""
        return max(0.0, self.step_time_s - self.problem.resident_step_s)

    @property
    def gap(self) -> float:
        """How far the step time is above its lower bound, as a share of the bound."""
        if self.lower_bound_s <= 0:
            return 0.0
        return max(0.0, self.step_time_s / self.lower_bound_s - 1)

    @property
    def streamed_pages(self) -> int:
        """Pages that one step brings to the device."""
        return int(self.offloaded[~self.paused].sum())

    @property
    def migration_pages(self) -> int:
        """Pages of one layer that change place when the plan is adopted."""
        return int(np.abs(self.offloaded - self.problem.present).sum())

    @cached_property
    def late(self) -> FloatArray:
        """Tokens that each unit lacks at the end of the window, ``[units]``."""
        return late_tokens(self.problem, self.step_time_s, self.paused)

    @cached_property
    def units(self) -> tuple[UnitPlan, ...]:
        """The plan in words, unit by unit."""
        return tuple(
            UnitPlan(
                id=unit.id,
                pattern=pattern_name(self.offloaded[row], unit.pages_at_end),
                offloaded_layers=tuple((np.flatnonzero(self.offloaded[row]) + 1).tolist()),
                paused=bool(self.paused[row]),
                slo_met=bool(self.late[row] == 0),
            )
            for row, unit in enumerate(self.problem.units)
        )


def late_tokens(problem: PlanningProblem, step_time_s: float, paused: BoolArray) -> FloatArray:
    """Tokens that each unit lacks at the end of the window, ``[units]``.

    Due are window x step time / SLO tokens, and the deposit counts; a paused unit
    generates none. A unit without an SLO is never late.
    """
    window = problem.window_steps
    slo, deposit = slo_and_deposit(problem)
    late = window * step_time_s / slo - deposit - np.where(paused, 0, window)
    # Rounding in the last digits is not a token.
    return np.where(late > 1e-9 * window, late, 0.0)


def slo_and_deposit(problem: PlanningProblem) -> tuple[FloatArray, FloatArray]:
    """TPOT targets in seconds, infinite where there is none, and deposits; ``[units]``."""
    slo = [np.inf if unit.tpot_slo_s is None else unit.tpot_slo_s for unit in problem.units]
    deposit = [0.0 if unit.tpot_slo_s is None else unit.deposit_tokens for unit in problem.units]
    return np.array(slo), np.array(deposit)
