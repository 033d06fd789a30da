"""A server in miniature for tests of the controller: steps, memory and nothing else.

It does what the engine does with decisions, with every cost a constant. What it shows about
policies is for ``eval``; here it shows that nobody is lost or left waiting.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.planning import Worker
from orbitflow_sglang.control.policies import find_policy
from orbitflow_sglang.control.view import (
    Machine,
    Observation,
    RequestView,
    StepDecision,
    UnitView,
)
from orbitflow_sglang.slo import SLO

LAYERS, PAGE = 4, 16
STEP_S, REQUEST_S, PREFILL_TOKEN_S, PAGE_S = 0.008, 0.0005, 0.0002, 4e-5
MOST_STEPS = 60_000
NO_SLO = SLO()


class Costs:
    """Constants in the place of ``Feedback``."""

    page_transfer_s = PAGE_S

    def compute_s(self, batch: int, context_tokens: int) -> float:
        return STEP_S + REQUEST_S * batch + 1e-6 * context_tokens

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        return PREFILL_TOKEN_S * tokens

    def planned(self) -> None:
        pass


@dataclass(frozen=True)
class Wanted:
    """One request to come."""

    arrival_s: float
    prompt: int
    output: int
    slo: SLO = NO_SLO


def draw(seed: int, requests: int, slos: Sequence[SLO] = (SLO(),)) -> list[Wanted]:
    chance, now, found = random.Random(seed), 0.0, []
    for _ in range(requests):
        now += chance.expovariate(4.0)
        slo = chance.choice(slos)
        found.append(Wanted(now, chance.randint(10, 700), chance.randint(1, 120), slo))
    return found


@dataclass
class ClosedLoop:
    """Runs ``wanted`` to their ends; what happened is in the lists."""

    policy: str
    wanted: Sequence[Wanted]
    arena_tokens: int = 1024
    max_running: int = 8
    max_paused: int = 6
    worker: Worker | None = None
    decisions: list[StepDecision] = field(default_factory=list)
    finished: list[RequestView] = field(default_factory=list)
    most_running: int = 0
    most_paused: int = 0
    prefills_in_a_row: int = 0  # while others decoded

    def __post_init__(self) -> None:
        spec = find_policy(self.policy)
        main = self.arena_tokens // PAGE * LAYERS
        ring = main // 8 if spec.spills else 0
        host = 10**6 if spec.spills else 0
        paused = self.max_paused if spec.spills else 0
        self.machine = Machine(LAYERS, PAGE, main - ring, ring, host, self.max_running, paused, 256)
        self.controller = Controller(spec, self.machine, Costs(), self.worker)
        self.now, self._next, self._row = 0.0, 0, 0
        self.waiting: list[RequestView] = []
        self.decoding: list[RequestView] = []
        self.paused: list[RequestView] = []
        self.chunked: RequestView | None = None
        self._left = {f"r{i}": wants.output for i, wants in enumerate(self.wanted)}

    @property
    def live(self) -> list[RequestView]:
        return [*self.decoding, *([self.chunked] if self.chunked else []), *self.paused]

    def run(self) -> None:
        for _ in range(MOST_STEPS):
            self._arrive()
            if not (self.live or self.waiting):
                if self._next == len(self.wanted):
                    return
                self.now = self.wanted[self._next].arrival_s
                continue
            self._step()
        raise AssertionError(
            f"stuck: {len(self.finished)} of {len(self.wanted)} served, {len(self.waiting)} "
            f"wait, {len(self.decoding)} decode, {len(self.paused)} are paused"
        )

    def _arrive(self) -> None:
        while self._next < len(self.wanted) and self.wanted[self._next].arrival_s <= self.now:
            wants = self.wanted[self._next]
            view = RequestView(
                f"r{self._next}", wants.arrival_s, wants.slo, wants.prompt, wants.output
            )
            self.waiting.append(view)
            self._next += 1

    def _units(self) -> list[UnitView]:
        return [UnitView(view.rid, view.tokens // PAGE, (view.rid,)) for view in self.live]

    def _step(self) -> None:
        observation = Observation(self.now, [*self.live, *self.waiting], self._units)
        for view in self.paused:
            view.settled = True
        decision = self.controller.decide(observation)
        self.decisions.append(decision)
        self._carry_out(decision)
        self.most_paused = max(self.most_paused, len(self.paused))
        if self._may_prefill(decision):
            self._prefill(decision)
        elif self.decoding:
            self._row = 0
            self._decode()
        else:
            assert self.paused or self.waiting
            self.now += 1e-3
            self.controller.stepped(False, self.now)

    def _carry_out(self, decision: StepDecision) -> None:
        for rid in decision.resume:
            view = next(v for v in self.paused if v.rid == rid)
            self.paused.remove(view)
            view.phase, view.paused_s, view.missing_pages = "decode", None, 0
            self.decoding.append(view)
        for rid in decision.pause:
            view = next(v for v in self.decoding if v.rid == rid)
            self.decoding.remove(view)
            view.phase, view.paused_s, view.settled = "paused", self.now, False
            view.missing_pages = view.tokens // PAGE * LAYERS
            view.pauses += 1
            self.paused.append(view)
        left = decision.fetch_pages
        for rid in decision.fetch:
            view = next(v for v in self.paused if v.rid == rid)
            fetched = min(left, view.missing_pages)
            view.missing_pages -= fetched
            left -= fetched

    def _may_start(self, decision: StepDecision) -> list[RequestView]:
        queue = self.waiting
        if decision.order is not None:
            rank = {rid: place for place, rid in enumerate(decision.order)}
            queue = sorted(queue, key=lambda v: rank[v.rid])
        if decision.admit is not None:
            queue = [view for view in queue if view.rid in decision.admit]
        elif self.machine.host_pages == 0:  # SGLang's own admission, roughly
            held = sum(v.tokens + self._left[v.rid] for v in self.live)
            fits = []
            for view in queue:
                held += view.prompt_tokens + view.max_new_tokens
                if held > self.arena_tokens and (self.live or fits):
                    break
                fits.append(view)
            queue = fits
        return queue[: max(0, self.max_running - len(self.decoding))]

    def _may_prefill(self, decision: StepDecision) -> bool:
        some = self.chunked is not None or bool(self._may_start(decision))
        return some and (decision.prefill or not self.decoding)

    def _prefill(self, decision: StepDecision) -> None:
        budget = min(256, decision.chunk_tokens or 256)
        view = self.chunked
        if view is None:
            view = self._may_start(decision)[0]
            self.waiting.remove(view)
            self.controller.admitted(1)
        done = min(budget, view.prompt_tokens - view.tokens)
        view.tokens += done
        self._row += bool(self.decoding)
        self.prefills_in_a_row = max(self.prefills_in_a_row, self._row)
        self.controller.stepped(True, self.now)
        self.now += 1e-3 + PREFILL_TOKEN_S * done
        self.chunked = view if view.tokens < view.prompt_tokens else None
        view.phase = "prefill" if self.chunked else "decode"
        if not self.chunked:
            self.decoding.append(view)
            self._token(view)

    def _decode(self) -> None:
        self.most_running = max(self.most_running, len(self.decoding))
        compute = Costs().compute_s(len(self.decoding), sum(v.tokens for v in self.decoding))
        self.controller.stepped(False, self.now)
        self.now += max(compute, self.controller.streamed_pages * PAGE_S)
        for view in list(self.decoding):
            view.tokens += 1
            self._token(view)

    def _token(self, view: RequestView) -> None:
        view.times.add(self.now, 1)
        self._left[view.rid] -= 1
        if self._left[view.rid] <= 0:
            self.decoding.remove(view)
            self.finished.append(view)
            self.controller.finished(view)
