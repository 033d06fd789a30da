"""A server in simulated time, step by step.

It does with the controller's decisions what SGLang and the residency store do with them, and
times each step by the cost model: compute from ``hardware``, the pipeline recurrence with
its ring for what is streamed, the link's other direction for what leaves the device. Nothing
here decides: policies, plans, feedback, deposits and pacing are the server's own objects.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.sim.hardware import Chunk, Hardware
from eval.sim.job import Job
from eval.sim.memory import Memory
from eval.sim.policies import Placing, find
from eval.sim.sglang import Admission, retraction_order
from eval.sim.worker import SimWorker
from eval.workload.requests import TraceRequest
from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.feedback import Feedback
from orbitflow_sglang.control.view import (
    NOTHING,
    Machine,
    Observation,
    RequestView,
    StepDecision,
    UnitView,
)
from orbitflow_sglang.planner.pipeline import cyclic_step_s, step_ends
from orbitflow_sglang.planner.problem import IntArray

IDLE_S = 1e-3  # that a scheduler with nothing to run waits before it looks again
MOST_IDLE = 100_000
RATIO_DIGITS = 3  # to which step times of the recurrence are looked up


@dataclass(frozen=True)
class Setup:
    """What is the same for every policy of a comparison."""

    hardware: Hardware
    known_lengths: bool = False  # whether max_new_tokens is what a request will say
    output_limit: int | None = None  # max_new_tokens where it is not; None: from the trace
    mixed: bool = False  # prompt chunks and decode tokens in one step
    planner_latency_s: float | None = 0.005  # None: as measured, which gives up repeatability
    link_jitter: float = 0.0  # standard deviation of the logarithm of a step's link rate
    cold: bool = False  # each step's first transfers begin with it: no look-ahead across steps
    ring_counted: bool = True  # False: the ring comes beside the arena, as the authors have it


class Stuck(RuntimeError):
    """Requests are left, and nothing happens."""


class Simulation:
    """Serves ``trace`` under a policy. ``run`` returns the jobs in order of arrival."""

    def __init__(
        self, setup: Setup, policy: str, trace: Sequence[TraceRequest], seed: int = 0
    ) -> None:
        self.setup, self.hardware = setup, setup.hardware
        self.spec = find(policy)
        self.now = 0.0
        self.steps: Counter[str] = Counter()
        self.stall_s = 0.0
        self.retractions = 0
        self.errors: list[tuple[float, float]] = []  # predicted and measured decode steps, s
        hardware, spills = self.hardware, self.spec.spills
        ring = self.spec.ring_pages(hardware.arena_pages, hardware.layers)
        extra = 0 if setup.ring_counted else ring
        self.memory = Memory(
            arena_pages=hardware.arena_pages + extra,
            ring_pages=ring,
            host_pages=hardware.host_pages if spills else 0,
            layers=hardware.layers,
            d2h_page_s=hardware.d2h_page_s,
        )
        self.machine = Machine(
            layers=hardware.layers,
            page_size=hardware.page_size,
            main_pages=self.memory.main_pages,
            ring_pages=ring,
            host_pages=self.memory.host_pages,
            max_running=hardware.max_running,
            max_paused=hardware.max_running if spills else 0,
            max_chunk_tokens=hardware.chunk_tokens,
        )
        self.feedback = Feedback(hardware.profile, enabled=self.spec.has("feedback"))
        self.worker: SimWorker | None = None
        if self.spec.streaming != "none" and self.spec.placing is None:
            self.worker = SimWorker(lambda: self.now, setup.planner_latency_s)
        self.controller = Controller(self.spec, self.machine, self.feedback, self.worker)
        self.placing: Placing | None = None
        if self.spec.placing:
            self.placing = Placing(self.spec, self.machine, hardware.step_s, hardware.h2d_page_s)
        self.admission = Admission(setup.known_lengths)
        self.refused: list[Job] = []  # that no memory could ever hold
        self.jobs = self._jobs(trace)
        self._to_come = sorted(self.jobs, key=lambda job: (job.view.arrival_s, job.order))[::-1]
        self._live: dict[str, Job] = {}
        self._idle = 0
        self._full = False  # SGLang's ``batch_is_full``: nobody starts until somebody leaves
        self._random = random.Random(seed)
        self._steps_s: dict[tuple[bytes, float], float] = {}
        self._fetching: tuple[str, ...] = ()
        self._fetch_pages = 0

    def _jobs(self, trace: Sequence[TraceRequest]) -> list[Job]:
        longest = max((one.output_tokens for one in trace), default=1)
        limit = self.setup.output_limit or 1 << (longest - 1).bit_length()
        jobs = []
        for order, one in enumerate(trace):
            allowed = one.output_tokens if self.setup.known_lengths else limit
            view = RequestView(one.rid, one.arrival_s, one.slo, one.input_tokens, allowed)
            layers, size = self.hardware.layers, self.hardware.page_size
            jobs.append(Job(view, one.output_tokens, order, one.input_tokens, layers, size))
        return jobs

    # --- the run -----------------------------------------------------------------

    def run(self) -> list[Job]:
        """Until everybody has ended. Raises ``Stuck`` when that would never be."""
        while self._live or self._to_come:
            self._arrive()
            if self._live:
                self._step()
            elif self._to_come:
                self.now = self._to_come[-1].view.arrival_s
        return self.jobs

    def _arrive(self) -> None:
        while self._to_come and self._to_come[-1].view.arrival_s <= self.now:
            job = self._to_come.pop()
            if self._slots(job.asked_tokens + job.output_tokens) > self.capacity:
                self.refused.append(job)
            else:
                self._live[job.rid] = job

    @property
    def capacity(self) -> int:
        """Logical slots: tokens that device and host hold together."""
        pages = self.memory.main_pages + self.memory.host_pages
        return pages // self.machine.layers * self.machine.page_size

    def _slots(self, tokens: int) -> int:
        return -(-tokens // self.machine.page_size) * self.machine.page_size

    def _step(self) -> None:
        by_phase = self._by_phase()
        decision = self._decide(by_phase)
        self._resume(decision)
        self._pause(decision)
        self._fetching, self._fetch_pages = decision.fetch, decision.fetch_pages
        decoding = [job for job in self._live.values() if job.view.phase == "decode"]
        chunks = self._prefill_batch(decision, decoding)
        if chunks:
            self._prefill(chunks, decoding if self._mixes(decoding) else [])
        elif decoding:
            self._decode(decision, decoding)
        else:
            self._wait()
            return
        self._idle = 0

    def _by_phase(self) -> dict[str, list[Job]]:
        found: dict[str, list[Job]] = {"waiting": [], "prefill": [], "decode": [], "paused": []}
        for job in self._live.values():
            found[job.view.phase].append(job)
        return found

    def _wait(self) -> None:
        self.admission.idle()
        self._fetch(IDLE_S)
        self._pass(IDLE_S)
        self._idle += 1
        if self._idle > MOST_IDLE:
            phases = Counter(job.view.phase for job in self._live.values())
            raise Stuck(f"{self.spec.name}: nothing runs, with {dict(phases)}")

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.memory.pass_time(seconds)

    # --- decisions ---------------------------------------------------------------

    def _decide(self, by_phase: dict[str, list[Job]]) -> StepDecision:
        if self.placing is not None:
            self.placing.place([*by_phase["decode"], *by_phase["prefill"]])
            return NOTHING
        paused = by_phase["paused"]
        for job in paused:
            job.view.settled = True
            job.view.missing_pages = job.on_host
        views = [job.view for job in self._live.values()]
        decision = self.controller.decide(Observation(self.now, views, self._units))
        if decision.placement is not None:
            for job in (*by_phase["decode"], *by_phase["prefill"], *paused):
                job.goal = decision.placement.get(job.rid)
        for rid in decision.mirror:
            self.memory.mirror(self._live[rid], decision.mirror_pages)
        return decision

    def _units(self) -> list[UnitView]:
        return [
            UnitView(job.rid, job.closed, (job.rid,))
            for job in self._live.values()
            if job.view.phase != "waiting"
        ]

    def _resume(self, decision: StepDecision) -> None:
        for rid in decision.resume:
            job = self._live[rid]
            self.memory.bring_back(job)
            job.view.phase, job.view.paused_s, job.view.missing_pages = "decode", None, 0
            self.steps["resumes"] += 1

    def _pause(self, decision: StepDecision) -> None:
        for rid in decision.pause:
            job = self._live[rid]
            if job.view.phase != "decode":
                continue
            self.memory.set_aside(job)
            job.view.phase, job.view.paused_s, job.view.settled = "paused", self.now, False
            job.view.pauses += 1
            self._full = False
            self.steps["pauses"] += 1

    # --- prefill -----------------------------------------------------------------

    def _prefill_batch(
        self, decision: StepDecision, decoding: Sequence[Job]
    ) -> list[tuple[Job, int]]:
        """SGLang's choice of prompts to go on with, and by how many tokens."""
        if not decision.prefill and decoding:
            return []
        left = self.machine.max_chunk_tokens - (len(decoding) if self.setup.mixed else 0)
        if decision.chunk_tokens is not None:
            left = min(left, decision.chunk_tokens)
        batch: list[tuple[Job, int]] = []
        for job in self._live.values():
            if job.view.phase == "prefill" and left > 0:
                batch.append((job, min(left, job.view.prompt_tokens - job.view.tokens)))
                left -= batch[-1][1]
        self._full = self._full and bool(decoding)
        started = 0
        queue = self._queue(decision) if left > 0 and not self._full else []
        if queue:
            held = self._held()
            room = self.capacity - held - self.admission.reserved(decoding)
            # Chunks that are somebody's last: with these they begin to say something.
            room -= sum(self.admission.to_come(job) for job, _ in batch)
            for job in queue:
                crowded = len(decoding) + len(batch) >= self.machine.max_running
                wanted = self.admission.wanted(job)
                # With nobody else there, who fits at all may start.
                alone = not held and not batch
                short = wanted >= room and not alone
                if left <= 0 or crowded or short:
                    self._full = left > 0 and bool(batch or decoding)
                    break
                batch.append((job, min(left, job.view.prompt_tokens)))
                left -= batch[-1][1]
                room -= wanted
                job.view.phase = "prefill"
                started += 1
        self.controller.admitted(started)
        return batch

    def _queue(self, decision: StepDecision) -> list[Job]:
        waiting = [job for job in self._live.values() if job.view.phase == "waiting"]
        if decision.order is not None:
            rank = {rid: place for place, rid in enumerate(decision.order)}
            waiting.sort(key=lambda job: rank.get(job.rid, len(rank)))
        if decision.admit is not None:
            waiting = [job for job in waiting if job.rid in decision.admit]
        return waiting

    def _held(self) -> int:
        """Logical slots that live requests hold, or have been promised for their prompts."""
        held = 0
        for job in self._live.values():
            view = job.view
            if view.phase != "waiting":
                tokens = max(view.tokens, view.prompt_tokens if view.phase == "prefill" else 0)
                held += self._slots(tokens)
        return held

    def _prefill(self, batch: Sequence[tuple[Job, int]], decoding: Sequence[Job]) -> None:
        self.controller.stepped(True)
        self.steps["prefill"] += 1
        for job, tokens in batch:
            pages = (job.view.tokens + tokens) // job.page_size - job.closed
            job.view.tokens += tokens
            job.computed += tokens
            self._closed(job, pages)
        stall = self._make_room()
        jobs = [job for job, _ in batch]
        chunks = tuple(Chunk(tokens, job.view.tokens - tokens) for job, tokens in batch)
        context = sum(job.view.tokens for job in decoding)
        compute, seconds = self._forward([*jobs, *decoding], len(decoding), context, chunks)
        self.feedback.prefill_chunk(
            sum(tokens for _, tokens in batch),
            compute,
            sum(chunk.context_tokens for chunk in chunks),
        )
        self._pass(stall + seconds)
        self._arrived([*jobs, *decoding])
        for job in decoding:
            self._token(job, seconds)
        for job in jobs:
            if job.view.tokens >= job.view.prompt_tokens:
                job.view.phase = "decode"
                self._token(job, seconds, grows=False)

    # --- decoding ----------------------------------------------------------------

    def _decode(self, decision: StepDecision, decoding: list[Job]) -> None:
        if not self.spec.spills:
            decoding = self._make_slots(decoding)
        self.controller.stepped(False)
        self.steps["decode"] += 1
        limit = decision.move_pages if self.placing is None else self.memory.arena_pages
        placed = [job for job in decoding if job.goal is not None or job.host is not None]
        for job in placed:  # what comes back is read in this step, and stays behind it
            limit -= self.memory.settle(job, limit, 0)
        stall = self._make_room()
        context = sum(job.view.tokens for job in decoding)
        predicted = max(
            self.feedback.step_s(len(decoding), context),
            self.controller.streamed_pages * self.feedback.page_transfer_s,
        )
        moved = self.memory.h2d_pages
        compute, seconds = self._forward(decoding, len(decoding), context, ())
        moved = self.memory.h2d_pages - moved
        measured = seconds + stall
        self.errors.append((predicted, measured))
        self.feedback.decode_step(len(decoding), context, measured, measured - compute, moved > 0)
        if self.feedback.take_drift():
            self.controller.drifted()
        self._pass(measured)
        self._arrived(decoding)
        for job in decoding:
            self._token(job, measured)
        self.admission.decoded()

    def _mixes(self, decoding: Sequence[Job]) -> bool:
        """Whether those that decode do so beside chunks of prompts; not without slots for it."""
        free = self.capacity - self._held()
        return self.setup.mixed and (self.spec.spills or self._next_slots(decoding) <= free)

    def _next_slots(self, jobs: Sequence[Job]) -> int:
        """Slots that a token more of each takes."""
        size = self.machine.page_size
        return sum(size for job in jobs if job.view.tokens % size == 0)

    def _make_slots(self, decoding: list[Job]) -> list[Job]:
        """Requests are thrown out until those that stay have a slot for their next token."""
        free = self.capacity - self._held()
        stays = list(decoding)
        thrown = False
        for job in retraction_order(decoding):
            if self._next_slots(stays) <= free or len(stays) == 1:
                break
            free += self._slots(job.view.tokens)
            stays.remove(job)
            self.memory.release(job)
            job.drop()
            self._live[job.rid] = self._live.pop(job.rid)  # last in line
            self.retractions += 1
            thrown = True
        if thrown:
            self._full = False
            self.admission.retracted(stays)
        return stays

    def _token(self, job: Job, step_s: float, grows: bool = True) -> None:
        """One more token of ``job`` has been computed; with ``grows`` the last one got its KV."""
        view = job.view
        if job.token_s:
            job.step_s.append(step_s)
        if grows:
            view.tokens += 1
            if view.tokens % job.page_size == 0:
                self._closed(job, 1)
        view.times.add(self.now, 1)
        job.token_s.append(self.now)
        if view.generated >= job.output_tokens:
            del self._live[job.rid]
            self._full = False
            self.memory.release(job)
            self.controller.finished(view)

    def _closed(self, job: Job, pages: int) -> None:
        """So many pages of ``job`` have been filled; those of offloaded layers leave."""
        if not pages or job.goal is None:
            return
        host = np.zeros(job.layers, np.int64) if job.host is None else job.host
        more = np.minimum(job.goal, job.closed) - host
        grown = np.clip(more, 0, pages)
        if grown.any():
            self.memory.offload(job, host + grown)

    # --- memory and time ---------------------------------------------------------

    def _room(self) -> int:
        used = self.memory.used(self._live.values()) + math.ceil(self.memory.backlog)
        return self.memory.main_pages - used

    def _make_room(self) -> float:
        """Seconds until what the next step needs of the arena is free."""
        over = -self._room()
        if over <= 0 or not self.spec.spills:
            return 0.0
        backlog = math.ceil(self.memory.backlog)
        waits = min(over, backlog)
        if over > waits:
            live = [job for job in self._live.values() if job.view.phase in ("decode", "prefill")]
            short = over - waits - self.memory.squeeze(live, over - waits)
            if short > 0 and any(job.resident for job in live):
                raise Stuck(f"{self.spec.name}: {short} pages have no room")
            waits += math.ceil(self.memory.backlog) - backlog
        return waits * self.memory.d2h_page_s

    def _forward(
        self, jobs: Sequence[Job], batch: int, context: int, chunks: tuple[Chunk, ...]
    ) -> tuple[float, float]:
        """Compute, and all of the step, seconds."""
        loads: IntArray | None = None
        for job in jobs:
            if job.host is not None:
                loads = job.host.copy() if loads is None else loads + job.host
        streamed = 0 if loads is None else int(loads.sum())
        fetched = self._fetch(math.inf)
        compute = self.hardware.step_s(batch, context, chunks, streamed + fetched)
        if not streamed + fetched:
            return compute, compute
        page_s = self.hardware.h2d_page_s
        if self.setup.link_jitter:
            page_s *= self._random.lognormvariate(0.0, self.setup.link_jitter)
        seconds = compute if loads is None else self._recurrence(loads, compute, page_s)
        seconds = max(seconds, (streamed + fetched) * page_s)
        self.memory.h2d_pages += streamed
        self.memory.streamed += streamed
        self.stall_s += seconds - compute
        self.feedback.transfers(streamed + fetched, (streamed + fetched) * page_s)
        return compute, seconds

    def _fetch(self, seconds: float) -> int:
        """Pages of those coming back, as many as the decision allows and the arena has room."""
        if not self._fetching:
            return 0
        left = min(self._fetch_pages, max(0, self._room()))
        if math.isfinite(seconds):
            left = min(left, int(seconds / self.hardware.h2d_page_s) + 1)
        fetched = 0
        for rid in self._fetching:
            job = self._live.get(rid)
            if job is not None and job.view.phase == "paused":
                fetched += self.memory.fetch(job, left - fetched)
        return fetched

    def _recurrence(self, loads: IntArray, compute: float, page_s: float) -> float:
        """The step's time, looked up by the ratio of link to compute."""
        layer_s = compute / self.machine.layers
        ratio = float(f"{page_s / layer_s:.{RATIO_DIGITS}g}")
        key = loads.tobytes(), ratio
        if key not in self._steps_s:
            ring = max(2, self.memory.ring_pages)
            if self.setup.cold:
                steps = step_ends(loads.tolist(), 1.0, ratio, ring)[0]
            else:
                steps = cyclic_step_s(loads, 1.0, ratio, ring)
            self._steps_s[key] = steps
        return self._steps_s[key] * layer_s

    def _arrived(self, jobs: Sequence[Job]) -> None:
        """Streamed pages that the plan wants on the device stay there."""
        room: int | None = None
        for job in jobs:
            if job.host is None:
                continue
            if job.goal is None or (job.host > job.goal).any():
                room = self._room() if room is None else room
                before = job.on_host
                self.memory.settle(job, 0, room)
                room -= before - job.on_host
