"""The planner's worker in simulated time: the same planner, its latency a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from orbitflow_sglang.planner.evaluation import plan_faults
from orbitflow_sglang.planner.incremental import IncrementalPlanner
from orbitflow_sglang.planner.problem import PlanningProblem
from orbitflow_sglang.planner.worker import Answer


class SimWorker:
    """Answers ``latency_s`` after it was asked; ``None``: after what the solve really took,
    which gives up that runs repeat. One problem at a time; a later one replaces who waits."""

    def __init__(self, clock: Callable[[], float], latency_s: float | None) -> None:
        self.counts: Counter[str] = Counter()
        self.solve_s = 0.0
        self._clock = clock
        self._latency_s = latency_s
        self._planner = IncrementalPlanner()
        self._asked: tuple[PlanningProblem, int | None, int] | None = None
        self._waiting: tuple[PlanningProblem, int | None, int] | None = None
        self._answer: Answer | None = None
        self._valid = True
        self._due_s = 0.0
        self._number = 0

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        """Ask for a plan."""
        if self._answer is not None:
            self.counts["late"] += self._waiting is not None
            self._waiting = problem, in_force, steps
        else:
            self._begin(problem, in_force, steps)

    def poll(self) -> Answer | None:
        """The answer, if its time has come."""
        answer = self._answer
        if answer is None or self._clock() < self._due_s:
            return None
        self._answer = None
        valid = self._valid
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._begin(*waiting)
        return answer if valid else None

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding."""
        return self._answer is not None

    def _begin(self, problem: PlanningProblem, in_force: int | None, steps: int) -> None:
        # A clock must not decide what is found: the solver has a node limit of its own.
        problem = replace(problem, time_limit_s=None)
        if in_force is None:
            self._planner.plan = None
        plan, outcome = self._planner.update(problem, steps)
        self.solve_s += plan.solve_s
        if outcome != "reused":
            self._number += 1
            plan = replace(plan, problem=problem)
            self._planner.plan = plan
        self._answer = Answer(self._number, plan, outcome)
        # As the server does: no answer is believed before it has passed the same check.
        self._valid = outcome == "reused" or not plan_faults(problem, plan.offloaded, plan.paused)
        self.counts[outcome if self._valid else "invalid"] += 1
        latency = plan.solve_s if self._latency_s is None else self._latency_s
        self._due_s = self._clock() + latency
