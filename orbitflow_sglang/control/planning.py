"""Plans for the batch as it is: asked of the worker one step ahead, adopted when they come."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from orbitflow_sglang.control.view import Machine, RequestView, UnitView
from orbitflow_sglang.planner.evaluation import Memory
from orbitflow_sglang.planner.incremental import adopt, placed_as
from orbitflow_sglang.planner.problem import IntArray, Plan, PlanningProblem, Unit
from orbitflow_sglang.planner.worker import Answer

WINDOW_STEPS = 32
REMEMBERED_SOLVES = 1024
WORKER_LIMIT_S = 1.0  # of a solve: the batch has changed by then


class Worker(Protocol):
    """What plans in the background: ``planner.worker.PlannerWorker``, or a simulated one."""

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        """Ask for a plan; returns at once."""

    def poll(self) -> Answer | None:
        """The answer that has come, if any; returns at once."""

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding."""


class Planning:
    """The plan in force, and how it came about. Nothing here blocks."""

    def __init__(self, machine: Machine, mode: str, worker: Worker | None) -> None:
        self.plan: Plan | None = None
        self.sources: Counter[str] = Counter()
        self.solves, self.solve_s = 0, 0.0  # of the worker's plans that were put in force
        self.solve_times: deque[float] = deque(maxlen=REMEMBERED_SOLVES)  # not yet reported
        self._machine = machine
        self._mode = mode
        self.worker = worker
        self._number: int | None = None  # of the plan in force, to the worker
        self._steps = 0  # since it was adopted

    def problem(
        self,
        requests: Sequence[RequestView],
        units: Sequence[UnitView],
        step_s: float,
        page_transfer_s: float,
        budget_pages: int | None,
        paused_pages: int,
        now: float,
    ) -> PlanningProblem:
        """The planning problem of the active ``requests`` and the ``units`` that they use;
        ``step_s``: compute of a step with everything resident."""
        machine = self._machine
        size = machine.page_size
        own = {unit.id: unit.pages for unit in units}
        active = {view.rid for view in requests}
        made = []
        for view in requests:
            tokens = view.tokens
            end = max(tokens + WINDOW_STEPS, view.prompt_tokens if view.phase == "prefill" else 0)
            growth = end // size - tokens // size
            pages = own.get(view.rid, tokens // size)
            made.append(
                Unit(
                    view.rid, pages, tpot_slo_s=view.slo.pace_s,
                    deposit_tokens=view.deposit_s(now) / (view.slo.pace_s or 1.0),
                    growth_pages_per_layer=growth, age_s=max(0.0, now - view.arrival_s),
                )
            )  # fmt: skip
        for unit in units:
            users = tuple(user for user in unit.users if user in active)
            if len(unit.users) > 1 and users:
                made.append(Unit(unit.id, unit.pages, shared_by=users))
        problem = PlanningProblem(
            layers=machine.layers,
            arena_pages=machine.main_pages + machine.ring_pages,
            layer_compute_s=step_s / machine.layers,
            page_transfer_s=page_transfer_s,
            units=tuple(made),
            mode=self._mode,
            window_steps=WINDOW_STEPS,
            ring_pages=machine.ring_pages,
            host_pages=max(0, machine.host_pages - paused_pages),
            time_limit_s=WORKER_LIMIT_S,
        )
        problem = placed_as(problem, self.plan)
        if budget_pages is None:
            return problem
        everyone = np.ones(len(made), dtype=bool)
        least = Memory.of(problem, everyone).least_streamed
        return replace(problem, stream_budget_pages=max(budget_pages, least))

    def ask(self, problem: PlanningProblem) -> Plan:
        """A plan for ``problem`` now; the worker is asked for a better one."""
        if self.worker is not None:
            self.worker.submit(problem, self._number, self._steps)
        return self._adopt(problem, None)

    def news(self, problem: Callable[[], PlanningProblem]) -> Plan | None:
        """The worker's plan made to fit ``problem()``, if one has come and differs."""
        self._steps += 1
        answer = None if self.worker is None else self.worker.poll()
        if answer is None or answer.plan is self.plan:
            return None
        return self._adopt(problem(), answer)

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding."""
        return self.worker is not None and self.worker.busy

    def forget(self) -> None:
        """Everything is on the device: no plan is in force."""
        self.plan, self._number, self._steps = None, None, 0

    def _adopt(self, problem: PlanningProblem, answer: Answer | None) -> Plan:
        plan, source = adopt(problem, None if answer is None else answer.plan, self.plan)
        self.sources[source] += 1
        if answer is not None and source == "planned" and answer.outcome != "reused":
            self.solves += 1
            self.solve_s += answer.plan.solve_s
            self.solve_times.append(answer.plan.solve_s)
        same = answer is not None and plan is answer.plan
        if plan is not self.plan:
            self._number = answer.number if same and answer is not None else None
            self._steps = 0
        self.plan = plan
        return plan


def placement_of(plan: Plan) -> Mapping[str, IntArray]:
    """Pages on the host per layer, for the units that have any and are not paused."""
    return {
        unit.id: plan.offloaded[row]
        for row, unit in enumerate(plan.problem.units)
        if not plan.paused[row] and plan.offloaded[row].any()
    }
