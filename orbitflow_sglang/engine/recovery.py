"""Going on behind a step that failed, for example because a copy of KV pages did.

Which pages are still right is not known then, so all KV is given up: requests that held any
end with an error that says so, those that wait are served from an empty cache. The tokens of
steps that had ended before are sent; no token of the failed step ever is.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.managers.scheduler import _make_abort_req

from orbitflow_sglang.engine.runtime import Runtime

logger = logging.getLogger(__name__)

STEPS_BETWEEN_FAILURES = 8  # fewer, and the next failure follows at once
MOST_IN_A_ROW = 3


class StepFailed(RuntimeError):
    """A step of ``batch`` had to be given up; the cause says why."""

    def __init__(self, batch: ScheduleBatch) -> None:
        super().__init__("a step failed")
        self.batch = batch


class _Failures:
    in_a_row = 0
    at_step = 0


def recover(scheduler: Any, runtime: Runtime, error: Exception) -> None:
    """End whoever held KV and empty all memory, so that the event loop can begin anew.

    Raises ``error`` again, which ends the server, where that would leave other ranks behind
    or has not helped before.
    """
    counters = runtime.counters
    soon = counters.steps - _Failures.at_step < STEPS_BETWEEN_FAILURES
    _Failures.in_a_row = _Failures.in_a_row + 1 if soon else 1
    _Failures.at_step = counters.steps
    if scheduler.tp_size > 1 or _Failures.in_a_row >= MOST_IN_A_ROW:
        logger.error("OrbitFlow: a step failed and the server cannot go on: see the traceback")
        raise error
    counters.failed_steps += 1
    cause = _told(error)
    logger.error(
        "OrbitFlow: a step failed (%s): all KV is given up, requests that held any end with an "
        "error, waiting ones go on",
        cause, exc_info=error,
    )  # fmt: skip
    while scheduler.result_queue:  # of the step before, which has ended well
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    for req in _holders(scheduler, runtime, error):
        _end(scheduler, req, f"OrbitFlow lost the KV cache of this request: {cause}")
    _empty(scheduler, runtime)


def _told(error: Exception) -> str:
    """What went wrong, from the outside in."""
    causes: list[str] = []
    at: BaseException | None = error if error.__cause__ is None else error.__cause__
    while at is not None:
        causes.append(str(at))
        at = at.__cause__
    return ": ".join(causes)


def _holders(scheduler: Any, runtime: Runtime, error: Exception) -> list[Req]:
    found: list[Req] = list(error.batch.reqs) if isinstance(error, StepFailed) else []
    for batch in (scheduler.running_batch, scheduler.last_batch):
        found.extend(batch.reqs if batch is not None else ())
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    if runtime.control is not None:
        found.extend(paused.req for paused in runtime.control.paused.values())
    waiting = {id(req) for req in scheduler.waiting_queue}
    each = {id(req): req for req in found if id(req) not in waiting}
    return [req for req in each.values() if not req.finished()]


def _end(scheduler: Any, req: Req, message: str) -> None:
    reason = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR)
    req.to_finish, req.finished_reason = None, reason
    scheduler._release_aborted_request(req)
    scheduler.beam_coordinator.retire_group(req)
    scheduler.send_abort_output(_make_abort_req(req, finished_reason=reason.to_json()), req)


def _empty(scheduler: Any, runtime: Runtime) -> None:
    """As ``Scheduler.flush_cache`` leaves it, and nobody running."""
    scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.last_batch = scheduler.chunked_req = scheduler.cur_batch_for_debug = None
    scheduler._pending_chunked_abort_req = None
    scheduler.tp_worker.model_runner.shared_read_done_event = None
    if runtime.control is not None:
        runtime.control.forget_all()
    runtime.store.abandon()
    scheduler.tree_cache.reset()
    scheduler.req_to_token_pool.clear()
    scheduler.token_to_kv_pool_allocator.clear()
    scheduler.req_to_token_pool.reset_aux_cache_allocator()
