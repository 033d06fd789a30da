"""The controller's eyes and hands in SGLang's scheduler.

``observe`` keeps a view of every request; the scheduler's hooks carry out what the
controller decides. While it decides nothing, a step costs one look at each request.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.feedback import Feedback
from orbitflow_sglang.control.view import (
    NOTHING,
    Observation,
    RequestView,
    StepDecision,
    UnitView,
)
from orbitflow_sglang.engine import metrics, pausing, ranks
from orbitflow_sglang.engine.pausing import Paused
from orbitflow_sglang.engine.placement import LiveRequest, PlanPlacer, units_of
from orbitflow_sglang.engine.prefixes import cached_prefix
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.engine.step_clock import Launched, StepClock, Totals
from orbitflow_sglang.engine.targets import DefaultTargets
from orbitflow_sglang.slo import SLO, SLOError, request_slo

logger = logging.getLogger(__name__)

META_KEY = "orbitflow"  # see engine.streaming
MAX_REASONS = 16  # the last ones are shown


class SchedulerControl:
    """One scheduler's controller, with what it needs to see and to act."""

    def __init__(
        self,
        scheduler: Any,
        runtime: Runtime,
        controller: Controller,
        feedback: Feedback,
        targets: DefaultTargets,
    ) -> None:
        assert isinstance(runtime.placer, PlanPlacer)
        self.controller = controller
        self.feedback = feedback
        self.targets = targets
        self.views: dict[str, RequestView] = {}
        self.paused: dict[str, Paused] = {}
        self.decision: StepDecision = NOTHING
        self.following: StepDecision = NOTHING  # in lockstep: what the next step is to do
        self.force: Callable[[Observation, StepDecision], StepDecision] | None = None  # tests only
        self.counts: Counter[str] = Counter()
        self.step_ratios: deque[float] = deque(maxlen=256)  # measured / predicted, decode steps
        self.step_times: deque[tuple[float, float]] = deque(maxlen=256)  # measured, predicted
        self.attained: Counter[str] = Counter()  # finished requests by what they met
        self.longest_pause_s = 0.0
        self.longest_wait_s = 0.0  # of a newcomer for its first step
        self.longest_line = 0  # requests waiting at once
        self._lockstep, self._leads = ranks.in_lockstep(), ranks.leads()
        self._scheduler = scheduler
        self._runtime = runtime
        self._placer = runtime.placer
        self._clock = StepClock()
        on_device = runtime.store.arena.k.device.type != "cpu"
        self._runs_ahead = on_device and scheduler.enable_overlap  # of the steps that it launches
        self._held: dict[str, Req] = {}  # with KV, as last observed
        self._aborted: set[str] = set()  # of those, who ended so since
        self._line: list[Req] = []  # that wait, as last observed
        self._waiting: dict[str, RequestView] = {}  # of those
        self._looked_up = 0  # prefixes of waiting requests
        self._grouped: list[tuple[str, bytes]] | None = None  # prompts looked at for shared pages
        self._shared: list[UnitView] = []

    # --- around the choice of the next batch -----------------------------------

    def before(self, running: ScheduleBatch, last: ScheduleBatch | None) -> ScheduleBatch:
        """Decide, and bring back who resumes; the running batch as it is then."""
        if self._lockstep:
            decision, self.following = self.following, NOTHING
        else:
            decision = self._look(running, last)
        self.decision = decision
        for rid in decision.resume:
            if (paused := self.paused.pop(rid, None)) is not None:
                running = pausing.put_back(running, paused)
                view = self.views[rid]
                self._end_of_pause(view)
                self.counts["resumes"] += 1
        if decision is not NOTHING or self._placer.spills or self._placer.mirrors:
            away = {*self.paused, *decision.pause} - {*decision.fetch}
            self._placer.adopt(decision, away, self._holders)
        return running

    def ahead(self) -> StepDecision | None:
        """In lockstep, before requests are received: what the next step is to do, from the leader.

        Every rank looks at the same moment, for looking settles what became of paused requests.
        Requests received only now are strangers to the decision.
        """
        if self._scheduler._engine_paused:  # no step is near; what was decided still holds
            return None
        self.following = NOTHING
        decision = self._look(self._scheduler.running_batch, self._scheduler.last_batch)
        return None if decision is NOTHING else decision

    def _look(self, running: ScheduleBatch, last: ScheduleBatch | None) -> StepDecision:
        self._drop_finished()
        observation = self._observe(running, last)
        if not self._leads:
            return NOTHING
        decision = self.controller.decide(observation)
        return decision if self.force is None else self.force(observation, decision)

    def _end_of_pause(self, view: RequestView) -> None:
        if view.paused_s is not None:
            lasted = time.perf_counter() - view.paused_s
            self.longest_pause_s = max(self.longest_pause_s, lasted)
        view.phase, view.paused_s, view.missing_pages = "decode", None, 0

    def pause(self, running: ScheduleBatch) -> None:
        """Set aside whom the decision names, once finished prefills are merged."""
        for rid in self.decision.pause:
            req = next((r for r in running.reqs if r.rid == rid), None)
            if req is None or not pausing.can_pause(req, self._scheduler):
                self.counts["pauses_missed"] += 1
                continue
            self.paused[rid] = pausing.cut_out(running, req)
            view = self.views[rid]
            view.phase, view.paused_s = "paused", time.perf_counter()
            view.settled = False
            view.pauses += 1
            self.counts["pauses"] += 1

    def defers_prefill(self, running: ScheduleBatch) -> bool:
        """Whether this step decodes although prompts wait."""
        return not self.decision.prefill and not running.is_empty()

    def prefill_batch(self, running: ScheduleBatch, choose: Callable[[], Any]) -> Any:
        """SGLang's choice of a prefill batch among those who may start, in our order."""
        decision, scheduler = self.decision, self._scheduler
        queue: list[Req] = scheduler.waiting_queue
        # Received with the decision, in lockstep: it is the next one that says about them.
        strangers = {r.rid for r in queue} - self.views.keys() if self._lockstep else set()
        simple = decision.order is None and decision.admit is None and decision.chunk_tokens is None
        if simple and not strangers:
            return choose()
        if decision.order is not None:  # of those that were looked at: they come first
            rank = {rid: place for place, rid in enumerate(decision.order)}
            named = sorted((r for r in queue if r.rid in rank), key=lambda req: rank[req.rid])
            queue = [*named, *(r for r in queue if r.rid not in rank)]
        admit = decision.admit
        if admit is None:
            admit = frozenset(r.rid for r in queue) - strangers
        held_back = [r for r in queue if r.rid not in admit]
        scheduler.waiting_queue = [r for r in queue if r.rid in admit]
        chunk = scheduler.chunked_prefill_size
        if decision.chunk_tokens is not None and chunk is not None and chunk > 0:
            mixed = len(running.reqs) if scheduler.is_mixed_chunk else 0  # SGLang takes them off
            scheduler.chunked_prefill_size = min(chunk, decision.chunk_tokens + mixed)
        before = len(scheduler.waiting_queue)
        try:
            plan = choose()
            if (chosen := plan.batch_to_run) is not None:  # for SGLang's log: these wait as well
                chosen.prefill_stats.num_pending_tokens += sum(req.seqlen for req in held_back)
            return plan
        finally:
            scheduler.chunked_prefill_size = chunk
            self.controller.admitted(max(0, before - len(scheduler.waiting_queue)))
            scheduler.waiting_queue = [*scheduler.waiting_queue, *held_back]

    # --- steps ------------------------------------------------------------------

    def launch(self, batch: ScheduleBatch) -> None:
        """A step is about to run: another one took until now."""
        if not self._leads:
            return
        now = time.perf_counter()
        store = self._runtime.store
        store.ring.note_stall()
        h2d = store.engine.h2d
        totals = Totals(now, store.ring.stall_s, h2d.bytes, h2d.busy_s)
        under_way = len(self._scheduler.result_queue) if self._runs_ahead else 0
        if (ended := self._clock.ended(totals, under_way)) is not None:
            self._measured(*ended)
        prefill = batch.forward_mode.is_extend()
        self.counts["mixed_steps"] += batch.forward_mode.is_mixed()
        self.controller.stepped(prefill)
        if prefill:
            self._note_waits(batch, now)
        decoding = len(batch.reqs) if not prefill else len(batch.decoding_reqs or ())
        context = _context_tokens(batch, decoding)
        predicted = self.feedback.step_s(max(1, decoding), context)
        streamed = self.controller.streamed_pages * self.feedback.page_transfer_s
        self._clock.launched(
            Launched(
                prefill, len(batch.reqs), context, batch.extend_num_tokens or 0,
                max(predicted, streamed),
            )
        )  # fmt: skip

    def _note_waits(self, batch: ScheduleBatch, now: float) -> None:
        for req in batch.reqs:
            view = self.views.get(req.rid)
            if view is not None and view.phase == "waiting" and not view.generated:
                self.longest_wait_s = max(self.longest_wait_s, now - view.arrival_s)

    def idle(self) -> None:
        """Nothing runs: the time until the next step belongs to none."""
        self._clock.forget()

    def _measured(self, step: Launched, took: Totals) -> None:
        seconds, stall = took.at_s, took.stall_s
        pages = took.h2d_bytes / self._runtime.store.layout.page_bytes
        self.feedback.transfers(int(pages), took.h2d_busy_s)
        if step.prefill:
            self.feedback.prefill_chunk(
                step.new_tokens, max(1e-6, seconds - stall), step.context_tokens
            )
            return
        self.step_times.append((seconds, step.predicted_s))
        self.step_ratios.append(seconds / max(1e-9, step.predicted_s))
        self.feedback.decode_step(step.batch, step.context_tokens, seconds, stall, pages > 0)
        if self.feedback.take_drift():
            self.controller.drifted()

    def streaming_out(self, reqs: Iterable[Req]) -> None:
        """Tokens of ``reqs`` are about to leave the scheduler."""
        now = time.perf_counter()
        for req in reqs:
            if req.rid not in self.views and (req.finished_output or not req.output_ids):
                continue
            # Without one: its grammar was ready only behind the look at those that wait.
            view = self._view(req)
            first = view.times.first_s is None
            view.times.add(now, len(req.output_ids) - view.generated)
            ends = req.finished() and not req.finished_output
            if ends and isinstance(req.finished_reason, FINISH_ABORT):
                self._aborted.add(req.rid)
            if first or ends:
                self._report(req, view, ends)
            elif view.generated == 2:  # what was sent with the first token is not sent again
                vars(req.time_stats).pop(META_KEY, None)

    def _targets(self, slo: SLO) -> dict[str, Any]:
        assumed = self.targets.assumed and slo.pace_s == self.targets.given.pace_s
        return {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "tbt_s": slo.tbt_s, "assumed": assumed}

    def _report(self, req: Req, view: RequestView, ends: bool) -> None:
        """For ``meta_info``, by way of what SGLang sends along with every output."""
        part: dict[str, Any] = {"slo": self._targets(view.slo)}
        if ends:
            times = view.times
            metrics.count_generated(self.attained, req, times)
            part |= {"generated": times.report(), "pauses": view.pauses}
            part["deposit_tokens"] = times.deposit_tokens
            part["fills_cache"] = not req.sampling_params.max_new_tokens  # SGLang's own, for n > 1
        setattr(req.time_stats, META_KEY, part)

    # --- everything that enumerates requests -----------------------------------

    def abort(self, rid: str, everything: bool) -> None:
        """Paused requests with that prefix of an id end at once; they need no last step."""
        for name, paused in list(self.paused.items()):
            if (everything or name.startswith(rid)) and self._settle(name):
                self._leaves(name)
                pausing.end(self._scheduler, paused)

    def resume_all(self) -> None:
        """Everybody back into the running batch, for what only knows of that one."""
        for rid in list(self.paused):
            paused = self.paused.pop(rid)
            self._scheduler.running_batch = pausing.put_back(self._scheduler.running_batch, paused)
            self._end_of_pause(self.views[rid])
            self.counts["resumes"] += 1

    def retract_paused(self) -> str:
        """The paused request that has said least gives up its KV, to be computed again; its id."""
        rid = min(self.paused, key=lambda r: len(self.paused[r].req.output_ids))
        paused = self._leaves(rid)
        self._end_of_pause(self.views[rid])
        pausing.retract(self._scheduler, paused)
        return rid

    def forget_all(self) -> None:
        """Every request that held KV has been ended, and every page given up."""
        self.counts["left_paused"] += len(self.paused)
        self.paused.clear()
        self.decision = NOTHING
        self._clock.forget()
        self._placer.forget()
        self.controller.planning.forget()

    def live_paused(self) -> list[LiveRequest]:
        """Paused requests, as the runtime is to know them beside those that run."""
        return [
            LiveRequest(rid, p.req.kv.req_pool_idx, p.req.kv.kv_allocated_len, paused=True)
            for rid, p in self.paused.items()
            if p.req.kv.holds_kv
        ]

    def describe(self) -> dict[str, Any]:
        """What the controller is at, as JSON values. Times in seconds."""
        controller, slo = self.controller, self.targets.of(0)
        planner: Any = controller.planning.worker
        return {
            "rules": sorted(controller.spec.rules),
            "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "tbt_s": slo.tbt_s},
            "slo_is_assumed": self.targets.assumed,
            "hidden_pages": int(controller.hidden_pages),
            "budget_pages": controller.budget_pages,
            "streamed_pages": controller.streamed_pages,
            "paused": len(self.paused),
            "returning": len(self.decision.fetch),
            "pauses": self.counts["pauses"],
            "pauses_missed": self.counts["pauses_missed"],
            "resumes": self.counts["resumes"],
            "left_paused": self.counts["left_paused"],
            "mixed_steps": self.counts["mixed_steps"],
            "retractions": self.counts["retractions"],
            "longest_pause_s": self.longest_pause_s,
            "longest_wait_s": self.longest_wait_s,
            "longest_line": self.longest_line,
            "plans": dict(controller.planning.sources),
            "planner": {} if planner is None else dict(planner.counts),
            "plan_solves": {"count": controller.planning.solves, "s": controller.planning.solve_s},
            "attained": dict(self.attained),
            "step_ratio": statistics.median(self.step_ratios) if self.step_ratios else None,
            "reasons": list(controller.reasons)[-MAX_REASONS:],
        }

    # --- inside -----------------------------------------------------------------

    def _settle(self, rid: str) -> bool:
        return self.views[rid].settled

    def _leaves(self, rid: str) -> Paused:
        """Somebody paused gives up its KV: room that SGLang, which does not see it, may have
        stopped looking for."""
        self._scheduler.running_batch.batch_is_full = False
        self.counts["left_paused"] += 1
        return self.paused.pop(rid)

    def _drop_finished(self) -> None:
        """A step under way may have finished a request behind its pause."""
        for rid in [rid for rid, p in self.paused.items() if p.req.finished()]:
            self._leaves(rid)
        for rid, paused in list(self.paused.items()):
            self.views[rid].settled = True  # its last result was processed behind the pause
            if paused.req.to_finish is not None:
                self._leaves(rid)
                pausing.end(self._scheduler, paused)

    def _observe(self, running: ScheduleBatch, last: ScheduleBatch | None) -> Observation:
        scheduler, views = self._scheduler, self.views
        seen: dict[str, RequestView] = {}
        self._held = held = {}
        chunked = scheduler.chunked_req
        batches = [running] if last is None or last is running else [running, last]
        for batch in batches:
            for req in batch.reqs:
                if req.finished() or req is chunked or not req.kv.holds_kv:
                    continue
                if req.rid in self.paused:
                    continue
                view = seen[req.rid] = self._view(req)
                view.phase, view.tokens = "decode", req.kv.kv_allocated_len
                view.cached_tokens = min(req.cached_tokens, view.prompt_tokens)
                held[req.rid] = req
        if chunked is not None and not chunked.finished():
            view = seen[chunked.rid] = self._view(chunked)
            view.phase, view.tokens = "prefill", chunked.kv.kv_allocated_len
            view.cached_tokens = min(chunked.cached_tokens, view.prompt_tokens)
            held[chunked.rid] = chunked
        for rid, paused in self.paused.items():
            view = seen[rid] = self._view(paused.req)
            view.phase, view.tokens = "paused", paused.req.kv.kv_allocated_len
            held[rid] = paused.req
            if rid in self.decision.fetch:
                view.missing_pages = self._placer.missing(self._pages_of(paused.req))
            else:
                view.missing_pages = view.tokens // self._runtime.store.layout.page_size
                view.missing_pages *= self._runtime.store.layout.layers
        if scheduler.waiting_queue != self._line:  # by identity: 1,000 take a few microseconds
            self._line = list(scheduler.waiting_queue)
            self._waiting = {req.rid: self._in_line(req) for req in self._line}
            self.longest_line = max(self.longest_line, len(self._line))
        seen.update(self._waiting)
        self._look_up_a_prefix(scheduler.waiting_queue)
        if len(seen) != len(views):
            for rid in views.keys() - seen.keys():
                no_answer = rid in self._aborted or rid.startswith(HEALTH_CHECK_RID_PREFIX)
                self.controller.finished(views[rid], no_answer)
            self._aborted.clear()
            self.views = seen
        return Observation(time.perf_counter(), list(seen.values()), self._units)

    def _look_up_a_prefix(self, waiting: Sequence[Req]) -> None:
        """One prompt a step, in turns: what is cached of it changes while it waits."""
        if waiting:
            self._looked_up += 1
            req = waiting[self._looked_up % len(waiting)]
            found = cached_prefix(self._scheduler.tree_cache, req, self._held.values())
            self.views[req.rid].cached_tokens, self.views[req.rid].shared_tokens = found

    def _in_line(self, req: Req) -> RequestView:
        view = self._view(req)
        if view.phase != "waiting":  # retracted
            view.phase, view.tokens = "waiting", 0
            view.prompt_tokens = len(req.origin_input_ids) + len(req.output_ids)
        return view

    def _view(self, req: Req) -> RequestView:
        view = self.views.get(req.rid)
        if view is None:
            view = self.views[req.rid] = self._new_view(req)
        return view

    def _new_view(self, req: Req) -> RequestView:
        slo = self.targets.of(len(req.origin_input_ids))
        try:
            slo = request_slo(req.sampling_params.custom_params, slo)
        except SLOError as error:  # checked at the door, unless it came in by another one
            logger.warning("OrbitFlow: %s: %s", req.rid, error)
        came = req.time_stats.created_time or req.time_stats.wait_queue_entry_time
        return RequestView(
            rid=req.rid,
            arrival_s=came or time.perf_counter(),
            slo=slo,
            prompt_tokens=len(req.origin_input_ids),
            max_new_tokens=req.sampling_params.max_new_tokens,
            pausable=pausing.can_pause(req, self._scheduler),
        )

    def _live(self) -> list[LiveRequest]:
        """Every request that holds KV, as last observed."""
        return [
            LiveRequest(rid, req.kv.req_pool_idx, req.kv.kv_allocated_len, rid in self.paused)
            for rid, req in self._held.items()
            if req.kv.holds_kv
        ]

    def _holders(self) -> tuple[list[LiveRequest], list[np.ndarray]]:
        """Every request that holds KV, with its pages."""
        live = self._live()
        return live, [self._runtime.pages_of(request) for request in live]

    def _pages_of(self, req: Req) -> np.ndarray:
        return self._runtime.pages_of(
            LiveRequest(req.rid, req.kv.req_pool_idx, req.kv.kv_allocated_len)
        )

    def _prompt_pages(self, rid: str) -> np.ndarray:
        view, kv = self.views[rid], self._held[rid].kv
        tokens = min(view.tokens, view.prompt_tokens)
        return self._runtime.pages_of(LiveRequest(rid, kv.req_pool_idx, tokens))

    def _units(self) -> list[UnitView]:
        """Closed pages of those that hold KV, by who uses them.

        Only pages of prompts are shared, so who shares what is looked at again when one of
        those has changed. It does at a request's prefill, and when the radix tree, later, gives
        a request the pages of an equal prompt.
        """
        store, rids = self._runtime.store, list(self._held)
        prompts = [(rid, self._prompt_pages(rid).tobytes()) for rid in rids]
        if self._grouped != prompts:
            live, held = self._holders()
            found = units_of(live, held, len(store.table.in_use), store.layout.page_size)
            self._grouped = prompts
            self._shared = [unit for unit, _ in found if len(unit.users) > 1]
        shared: Counter[str] = Counter()
        for unit in self._shared:
            shared.update(dict.fromkeys(unit.users, unit.pages))
        size = store.layout.page_size
        own = [UnitView(rid, self.views[rid].tokens // size - shared[rid], (rid,)) for rid in rids]
        return [*own, *self._shared]


def _context_tokens(batch: ScheduleBatch, decoding: int) -> int:
    """Tokens in memory that a step reads: of those that decode, or, where it computes prompts
    (``decoding`` others may be beside them), what those had before."""
    if batch.forward_mode.is_extend():
        return sum(batch.prefix_lens[: len(batch.reqs) - decoding])
    return 0 if batch.seq_lens_cpu is None else int(batch.seq_lens_cpu.sum())
