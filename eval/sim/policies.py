"""Policies by name: the server's, and those that only the simulator can compare with.

paper-uniform                                    as `paper`, with one distance for all
flexgen, select-n, distn-single, next-layer      placed as in the planner, else as static:d
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eval.sim.job import Job
from orbitflow_sglang.control.policies import PolicySpec, find_policy
from orbitflow_sglang.control.view import Machine
from orbitflow_sglang.planner.modes import find_mode
from orbitflow_sglang.planner.policies import BoolArray, fit, make_policy
from orbitflow_sglang.planner.problem import PlanningProblem, Unit

UNIFORM, REQUEST_WISE = "paper-uniform", "paper-request-wise"
PLACED = (REQUEST_WISE, "flexgen", "select-n", "distn-single", "next-layer")


def find(name: str) -> PolicySpec:
    """The policy of that name. Raises ``ValueError`` that says which there are."""
    if name == UNIFORM:
        rules = frozenset({"feedback"})
        return PolicySpec(name, rules, streaming="all", victim="longest", mode=name)
    if name in PLACED:
        return PolicySpec(name, placing="all-host")  # it spills; ``Placing`` goes by the name
    try:
        return find_policy(name)
    except ValueError as error:
        raise ValueError(f"{error}; or {', '.join((UNIFORM, *PLACED))}") from None


class Placing:
    """What the server does under a policy that only places layers. ``step_s`` says what a step
    of so many requests and tokens takes with everything resident."""

    def __init__(
        self,
        spec: PolicySpec,
        machine: Machine,
        step_s: Callable[[int, int], float],
        page_transfer_s: float,
    ) -> None:
        self._name = spec.name
        self._policy = None if spec.name in PLACED else make_policy(spec.placing or "")
        self._machine = machine
        self._step_s = step_s
        self._page_transfer_s = page_transfer_s
        self._placed: list[tuple[str, int]] | None = None
        self._seen_pages, self._seen = 0, 0  # of requests that have come so far, in one layer

    @property
    def spills(self) -> bool:
        """Whether anything is ever placed on the host."""
        return self._policy is None or self._policy.spills

    def place(self, jobs: Sequence[Job]) -> None:
        """Say where the pages of ``jobs`` are to be, when these have changed."""
        now = [(job.rid, job.closed) for job in jobs]
        if not self.spills or not jobs or now == self._placed:
            return
        known = {rid for rid, _ in self._placed or ()}
        new = [job.closed for job in jobs if job.rid not in known]
        self._seen_pages, self._seen = self._seen_pages + sum(new), self._seen + len(new)
        self._placed = now
        machine = self._machine
        pages = np.array([job.closed for job in jobs], dtype=np.int64)
        device = machine.main_pages - 2 * machine.layers * len(jobs)  # tails, and the next page
        preferred = self._preferred(jobs, pages)
        placement = fit(preferred, pages, max(0, device), machine.host_pages)
        for row, job in enumerate(jobs):
            job.goal = np.where(placement[row], np.iinfo(np.int64).max, 0)

    def _preferred(self, jobs: Sequence[Job], pages: np.ndarray) -> BoolArray:
        machine = self._machine
        if self._policy is not None:
            return self._policy.place(len(jobs), machine.layers)
        tokens = sum(job.view.tokens for job in jobs)
        problem = PlanningProblem(
            layers=machine.layers,
            arena_pages=machine.main_pages,
            layer_compute_s=self._step_s(len(jobs), tokens) / machine.layers,
            page_transfer_s=self._page_transfer_s,
            units=tuple(Unit(job.rid, int(count)) for job, count in zip(jobs, pages, strict=True)),
            mode="paper" if self._name == REQUEST_WISE else self._name,
            ring_pages=machine.ring_pages,
            average_pages_per_layer=self._seen_pages / max(1, self._seen),
        )
        plan = find_mode(problem.mode)(problem)
        if self._name == REQUEST_WISE and (plan.paused.any() or not plan.fits):
            plan = find_mode("distn-single")(problem)
        offloaded: BoolArray = plan.offloaded > 0
        return offloaded
