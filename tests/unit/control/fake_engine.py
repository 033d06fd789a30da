"""An engine without a model: requests as views, time as arithmetic. It does what SGLang does with
the controller's decisions, and checks each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.controller import MIN_RUN_STEPS, Controller
from orbitflow_sglang.control.planning import Worker
from orbitflow_sglang.control.policies import find_policy
from orbitflow_sglang.control.view import (
    NOTHING,
    Machine,
    Observation,
    RequestView,
    StepDecision,
    UnitView,
)
from orbitflow_sglang.slo import SLO

MOST_IDLE_STEPS = 4  # while somebody is left: pauses settle, and pages come back, step by step
MOST_STEPS = 60_000
URGENT = re.compile(r"pause (\S+): (\S+) is urgent")

MACHINE = Machine(
    layers=4,
    page_size=16,
    main_pages=4 * 64,  # 1,024 tokens
    ring_pages=16,
    host_pages=4 * 256,
    max_running=12,
    max_paused=12,
    max_chunk_tokens=256,
)


@dataclass
class ConstantCosts:
    """Steps and transfers that never drift."""

    page_transfer_s: float = 2e-4
    forward_s: float = 0.01
    request_s: float = 0.001
    prefill_token_s: float = 1e-4
    slowdown: float = 1.0  # of steps as they go, over compute alone
    plans: int = 0

    def compute_s(self, batch: int, context_tokens: int) -> float:
        return self.forward_s + self.request_s * batch + 1e-6 * context_tokens

    def step_s(self, batch: int, context_tokens: int) -> float:
        return self.slowdown * self.compute_s(batch, context_tokens)

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        return self.prefill_token_s * tokens

    def planned(self) -> None:
        self.plans += 1


@dataclass(frozen=True)
class Job:
    """A request to come."""

    prompt: int
    output: int
    arrival_s: float = 0.0
    slo: SLO = field(default_factory=SLO)


class Stuck(AssertionError):
    """Somebody is left, and nothing happens."""


class FakeEngine:
    """Serves ``jobs`` under a policy until all have ended. ``decisions`` keeps what was said."""

    def __init__(
        self,
        policy: str,
        jobs: Sequence[Job],
        machine: Machine = MACHINE,
        costs: ConstantCosts | None = None,
        worker: Worker | None = None,
    ) -> None:
        spec = find_policy(policy)
        self.machine = machine
        self.costs = costs or ConstantCosts()
        self.controller = Controller(spec, machine, self.costs, worker)
        self.now = 0.0
        self.decisions: list[StepDecision] = []
        self.finished: dict[str, RequestView] = {}
        self.retractions = 0
        self.most_running = self.most_paused = 0
        self._spills = spec.spills
        self._jobs = sorted(enumerate(jobs), key=lambda numbered: numbered[1].arrival_s)
        self._live: dict[str, RequestView] = {}
        self._missing: dict[str, int] = {}
        self._resumed_at: dict[str, int] = {}
        self._idle = self._deferred = 0

    # --- the run -----------------------------------------------------------------

    def run(self) -> None:
        """Until everybody has ended; raises ``Stuck`` when that would never be."""
        for _ in range(MOST_STEPS):
            self._arrive()
            if not self._live:
                if not self._jobs:
                    return
                self.now = self._jobs[0][1].arrival_s
                continue
            self.step()
        raise Stuck(f"{len(self._live)} requests are still there: {self._picture()}")

    def step(self) -> StepDecision:
        """One step of the engine."""
        observation = Observation(self.now, list(self._live.values()), self._units)
        decision = self.controller.decide(observation)
        self.decisions.append(decision)
        for view in self._phase("paused"):
            view.settled = True
        self._resume(decision)
        self._pause(decision)
        self._check(decision)
        if self._prefill(decision):
            self._idle = self._deferred = 0
        elif self._decode():
            self._idle = 0
            self._deferred += bool(self._phase("prefill"))
            assert self._deferred <= rules.MAX_STEPS_BETWEEN_CHUNKS, "a prompt is not gone on with"
        else:
            self.now += 1e-3
            self._idle += 1
            if self._idle > MOST_IDLE_STEPS:
                raise Stuck(f"nothing runs: {self._picture()}")
        self._fetch(decision)
        return decision

    def _phase(self, *phases: str) -> list[RequestView]:
        return [view for view in self._live.values() if view.phase in phases]

    def _arrive(self) -> None:
        while self._jobs and self._jobs[0][1].arrival_s <= self.now:
            number, job = self._jobs.pop(0)
            rid = f"r{number}"
            self._live[rid] = RequestView(rid, job.arrival_s, job.slo, job.prompt, job.output)

    # --- what a decision does ----------------------------------------------------

    def _resume(self, decision: StepDecision) -> None:
        for rid in decision.resume:
            view = self._live[rid]
            assert view.phase == "paused", f"{rid} is resumed and was not paused"
            view.phase, view.paused_s, view.missing_pages = "decode", None, 0
            self._resumed_at[rid] = view.generated
            self._missing.pop(rid, None)

    def _pause(self, decision: StepDecision) -> None:
        for rid in decision.pause:
            view = self._live[rid]
            assert view.phase == "decode", f"{rid} is paused in phase {view.phase}"
            view.phase, view.paused_s, view.settled = "paused", self.now, False
            view.pauses += 1
            self._missing[rid] = view.missing_pages = self._pages(view)

    def _fetch(self, decision: StepDecision) -> None:
        left = decision.fetch_pages
        for view in self._phase("paused"):
            if view.rid not in decision.fetch:
                self._missing[view.rid] = self._pages(view)
                view.missing_pages = self._missing[view.rid]
                continue
            moved = min(left, self._missing[view.rid])
            left -= moved
            self._missing[view.rid] -= moved
            view.missing_pages = self._missing[view.rid]

    def _prefill(self, decision: StepDecision) -> bool:
        """SGLang's choice of a prefill batch; whether there is one."""
        decoding = self._phase("decode")
        if not decision.prefill and decoding:
            return False
        left = self.machine.max_chunk_tokens
        if decision.chunk_tokens is not None:
            left = min(left, decision.chunk_tokens)
        batch, started = self._phase("prefill"), 0
        for view in self._queue(decision):
            if sum(v.prompt_tokens - v.tokens for v in batch) >= left:
                break
            if len(decoding) + len(batch) >= self.machine.max_running:
                break
            if not self._has_slots(view):
                break
            view.phase = "prefill"
            batch.append(view)
            started += 1
        self.controller.admitted(started)
        if not batch:
            return False
        self.controller.stepped(True)
        done = 0
        for view in batch:
            tokens = min(left - done, view.prompt_tokens - view.tokens)
            view.tokens += tokens
            done += tokens
        self.now += self.costs.prefill_s(done, 0)
        for view in batch:
            if view.tokens == view.prompt_tokens:
                view.phase = "decode"
                self._token(view)
        return True

    def _queue(self, decision: StepDecision) -> list[RequestView]:
        waiting = self._phase("waiting")
        if decision.order is not None:
            rank = {rid: place for place, rid in enumerate(decision.order)}
            waiting.sort(key=lambda view: rank.get(view.rid, len(rank)))
        if decision.admit is not None:
            waiting = [view for view in waiting if view.rid in decision.admit]
        return waiting

    def _decode(self) -> bool:
        self._make_slots()
        decoding = self._phase("decode")
        if not decoding:
            return False
        self.controller.stepped(False)
        compute = self.costs.compute_s(len(decoding), sum(view.tokens for view in decoding))
        self.now += max(compute, self.controller.streamed_pages * self.costs.page_transfer_s)
        for view in decoding:
            view.tokens += 1
            self._token(view)
        return True

    def _token(self, view: RequestView) -> None:
        view.times.add(self.now, 1)
        if view.generated >= view.max_new_tokens:
            self.finished[view.rid] = self._live.pop(view.rid)
            self.controller.finished(view)

    # --- slots -------------------------------------------------------------------

    @property
    def _capacity(self) -> int:
        pages = self.machine.main_pages + (self.machine.host_pages if self._spills else 0)
        return pages // self.machine.layers * self.machine.page_size

    def _slots(self, tokens: int) -> int:
        return -(-tokens // self.machine.page_size) * self.machine.page_size

    def _held(self, grow: int = 0) -> int:
        return sum(
            self._slots(max(view.tokens, view.prompt_tokens if view.phase == "prefill" else 0))
            + (self._slots(view.tokens + grow) - self._slots(view.tokens))
            * (view.phase == "decode")
            for view in self._phase("decode", "prefill", "paused")
        )

    def _has_slots(self, view: RequestView) -> bool:
        """SGLang wants slots for all that a newcomer may say, and for a part of what is still
        to come of those that decode; it does not see those that are paused."""
        to_come = sum(v.max_new_tokens - v.generated for v in self._phase("decode"))
        wanted = self._slots(view.prompt_tokens) + view.max_new_tokens - view.generated
        return self._held() + wanted + int(0.3 * to_come) <= self._capacity

    def _make_slots(self) -> None:
        while self._held(grow=1) > self._capacity:
            paused, decoding = self._phase("paused"), self._phase("decode")
            assert paused or len(decoding) > 1, "one request alone has no slots"
            victim = min(paused or decoding, key=lambda view: view.generated)
            victim.prompt_tokens += victim.generated
            victim.phase, victim.tokens, victim.paused_s = "waiting", 0, None
            victim.settled, victim.missing_pages = True, 0
            self.retractions += 1

    # --- what must hold ------------------------------------------------------------

    def _pages(self, view: RequestView) -> int:
        return view.tokens // self.machine.page_size * self.machine.layers

    def _units(self) -> list[UnitView]:
        return [
            UnitView(view.rid, view.tokens // self.machine.page_size, (view.rid,))
            for view in self._phase("decode", "prefill", "paused")
        ]

    def _check(self, decision: StepDecision) -> None:
        spec = self.controller.spec
        active, paused = self._phase("decode", "prefill"), self._phase("paused")
        self.most_running = max(self.most_running, len(active))
        self.most_paused = max(self.most_paused, len(paused))
        assert len(active) <= self.machine.max_running
        assert len(paused) <= self.machine.max_paused
        for reason in decision.reasons:
            if (found := URGENT.match(reason)) is not None:
                victim, urgent = (self._pace(rid) for rid in found.groups())
                assert victim >= urgent, f"a strict request left for a loose one: {reason}"
        assert self.controller.budget_pages <= self.machine.host_pages
        plan = self.controller.planning.plan
        if plan is not None and plan.problem.stream_budget_pages is not None:
            budget, host = plan.problem.stream_budget_pages, plan.problem.host_pages
            # What its window may still need can be more than the host has: then nothing does.
            assert budget > host or plan.streamed_pages <= budget
        if decision is NOTHING or spec.overflow != "pause" or spec.streaming == "all":
            return
        pages = sum(self._pages(view) for view in active)
        room = self.machine.main_pages + self.controller.budget_pages
        full = len(paused) >= self.machine.max_paused
        if pages > room and len(active) > 1 and not full:
            assert not [view.rid for view in active if self._could_pause(view)], (pages, room)

    def _could_pause(self, view: RequestView) -> bool:
        ran = view.generated - self._resumed_at.get(view.rid, -MIN_RUN_STEPS)
        return view.phase == "decode" and view.generated > 0 and ran >= MIN_RUN_STEPS

    def _pace(self, rid: str) -> float:
        pace = self._live[rid].slo.pace_s
        return math.inf if pace is None else pace

    def _picture(self) -> dict[str, tuple[str, int, int]]:
        return {v.rid: (v.phase, v.tokens, v.generated) for v in self._live.values()}
