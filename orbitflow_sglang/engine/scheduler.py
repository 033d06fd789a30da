"""Hooks of SGLang's scheduler: which requests are live, and where a step ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from sglang.srt.managers.scheduler import Scheduler

from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.control.view import StepDecision
from orbitflow_sglang.engine import calibration, compat, hooks, ranks
from orbitflow_sglang.engine.attention_base import OrbitFlowBackend
from orbitflow_sglang.engine.control import SchedulerControl
from orbitflow_sglang.engine.launcher import HANDSHAKE
from orbitflow_sglang.engine.placement import LiveRequest
from orbitflow_sglang.engine.pool import OrbitFlowAllocator
from orbitflow_sglang.engine.prefixes import make_host_room
from orbitflow_sglang.engine.recovery import StepFailed, recover
from orbitflow_sglang.engine.retraction import make_room_for_prompt
from orbitflow_sglang.engine.runtime import Runtime, StepInput
from orbitflow_sglang.engine.startup import build_control
from orbitflow_sglang.residency import ResidencyError


def runtime_of(scheduler: Scheduler) -> Runtime:
    """The runtime behind a scheduler's pool."""
    return scheduler.token_to_kv_pool_allocator.get_kvcache().runtime


def control_of(scheduler: Scheduler) -> SchedulerControl | None:
    """The controller's hands in a scheduler; None where a policy only places layers."""
    control: SchedulerControl | None = runtime_of(scheduler).control
    return control


def run_batch(
    original: Callable[..., Any], scheduler: Scheduler, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``Scheduler.run_batch``: one step, which begins when attention is prepared."""
    runtime = runtime_of(scheduler)
    runtime.live = lambda: live_requests(scheduler, batch)
    if runtime.control is not None:
        runtime.control.launch(batch)
    if runtime.placer.spills or runtime.placer.mirrors:
        make_host_room(scheduler.tree_cache, runtime.store)
    try:
        try:
            if batch.beam_tail is None:  # beams' rows are only known on the device, by then
                runtime.announce(StepInput.of(batch))
            return original(scheduler, batch, *args, **kwargs)
        finally:
            runtime.end()
    except ResidencyError as error:
        raise StepFailed(batch) from error


# --- what the controller decides ----------------------------------------------


def broadcast_requests(
    original: Callable[..., list[Any]],
    receiver: Any,
    recv_reqs: list[Any] | None,
    local_reqs: list[Any] | None = None,
) -> list[Any]:
    """Around ``_broadcast_reqs_across_ranks``: the leader's decision travels with the requests.

    It is for the step that is chosen next, on every rank; SGLang never sees it.
    """
    runtime = Runtime.current
    control = None if runtime is None else runtime.control
    if control is None or not ranks.in_lockstep():
        return original(receiver, recv_reqs, local_reqs)
    if (decision := control.ahead()) is not None:
        local_reqs = [*(local_reqs or ()), decision]
    found = original(receiver, recv_reqs, local_reqs)
    for decision in [one for one in found if isinstance(one, StepDecision)]:
        control.following = decision
    return [one for one in found if not isinstance(one, StepDecision)]


def choose_next_batch(
    original: Callable[..., Any], scheduler: Scheduler, running_batch: Any, last_batch: Any
) -> Any:
    """Around ``get_next_batch_to_run``: the decision comes first, and resumed requests."""
    control = control_of(scheduler)
    if control is not None:
        running_batch = control.before(running_batch, last_batch)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


def defer_prefill(original: Callable[..., bool], scheduler: Scheduler, running_batch: Any) -> bool:
    """Around ``_should_defer_prefill``, where finished prefills have been merged: pauses, and
    decode steps ahead of waiting prompts."""
    control = control_of(scheduler)
    if control is not None:
        control.pause(running_batch)
        if control.defers_prefill(running_batch):
            # SGLang looks for grammars that are ready only where it may start prompts.
            if scheduler.grammar_manager.has_waiting_grammars():
                for req in scheduler.grammar_manager.get_ready_grammar_requests():
                    scheduler._add_request_to_queue(req)
            return True
    return original(scheduler, running_batch)


def choose_prefill(original: Callable[..., Any], scheduler: Scheduler, running_batch: Any) -> Any:
    """Around ``get_new_batch_prefill``: who may start, in which order, and by how much."""
    control = control_of(scheduler)
    if control is None:
        return original(scheduler, running_batch)
    if running_batch.is_empty():
        make_room_for_prompt(scheduler, control)
    return control.prefill_batch(running_batch, lambda: original(scheduler, running_batch))


def stream_output(streamer: Any, reqs: list[Any], *args: Any, **kwargs: Any) -> None:
    """Before ``stream_output``: when tokens leave the scheduler."""
    runtime = Runtime.current
    if runtime is not None and runtime.control is not None:
        runtime.control.streaming_out(reqs)


# --- paused requests are requests ---------------------------------------------


def is_fully_idle(idle: bool, scheduler: Scheduler, *args: Any, **kwargs: Any) -> bool:
    """After ``is_fully_idle``: not while somebody is paused."""
    control = control_of(scheduler)
    return idle and (control is None or not control.paused)


def collect_inflight(found: set[Any], scheduler: Scheduler) -> set[Any]:
    """After ``collect_inflight_reqs``: with those paused."""
    control = control_of(scheduler)
    if control is None or not control.paused:
        return found
    return found | {paused.req for paused in control.paused.values()}


def inflight_batches(found: list[Any], scheduler: Scheduler) -> list[Any]:
    """After ``_collect_inflight_batches``, which looks for requests that run too long."""
    control = control_of(scheduler)
    if control is None or not control.paused:
        return found
    return [*found, *(paused.batch for paused in control.paused.values())]


def owners_of_rows(found: list[Any], checker: Any) -> list[Any]:
    """After ``_requests_owning_rows``, by which SGLang looks for leaks between two steps
    (``SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY``)."""
    runtime = Runtime.current
    if runtime is None or runtime.control is None:
        return found
    known = {id(req) for req in found}
    paused = (paused.req for paused in runtime.control.paused.values())
    return [*found, *(req for req in paused if req.kv.holds_kv and id(req) not in known)]


def get_loads(load: Any, inquirer: Any) -> Any:
    """After ``get_loads``: who is paused holds KV and will decode, so it counts as running."""
    runtime = Runtime.current
    if runtime is not None and runtime.control is not None:
        load.num_running_reqs += len(runtime.control.paused)
    return load


def abort_request(result: None, scheduler: Scheduler, recv_req: Any) -> None:
    """After ``abort_request``: paused requests need no last step to end."""
    control = control_of(scheduler)
    if control is not None:
        control.abort(recv_req.rid, recv_req.abort_all)


def pause_generation(scheduler: Scheduler, recv_req: Any) -> None:
    """Before ``pause_generation``, which retracts what it finds in the running batch unless asked
    to keep it in place."""
    control = control_of(scheduler)
    if control is None:
        return
    control.idle()
    if recv_req.mode != "in_place":
        control.resume_all()


def on_idle(scheduler: Scheduler) -> None:
    """Before ``on_idle``: no step is being timed."""
    control = control_of(scheduler)
    if control is not None:
        control.idle()


def live_requests(scheduler: Scheduler, batch: Any) -> list[LiveRequest]:
    """Every request that holds KV while ``batch`` runs, each once."""
    holders = [*batch.reqs]
    for other in (scheduler.running_batch, scheduler.last_batch):
        if other is not None and other is not batch:
            holders.extend(other.reqs)
    if scheduler.chunked_req is not None:
        holders.append(scheduler.chunked_req)
    control = control_of(scheduler)
    paused = {} if control is None else control.paused
    return [
        LiveRequest(req.rid, req.kv.req_pool_idx, req.kv.kv_allocated_len)
        for req in {id(req): req for req in holders}.values()
        if req.kv.holds_kv and req.rid not in paused
    ] + ([] if control is None else control.live_paused())


def dispatch_event_loop(original: Callable[[Any], None], scheduler: Scheduler) -> None:
    """Around ``dispatch_event_loop``: begins anew behind a step that failed."""
    while True:
        try:
            return original(scheduler)
        except (StepFailed, ResidencyError) as error:
            recover(scheduler, runtime_of(scheduler), error)


def get_init_info(info: dict[str, Any], scheduler: Scheduler) -> dict[str, Any]:
    """After ``Scheduler.get_init_info``: proves the hooks, then tells the launcher."""
    hooks.verify(hooks.SCHEDULER)
    allocator = scheduler.token_to_kv_pool_allocator
    backend = scheduler.tp_worker.model_runner.attn_backend
    for found, expected in ((allocator, OrbitFlowAllocator), (backend, OrbitFlowBackend)):
        if not isinstance(found, expected):
            raise SystemExit(
                f"OrbitFlow: SGLang built a {type(found).__name__} instead of {expected.__name__}"
            )
    compat.check_layers(scheduler.tp_worker.model_runner.model)
    runtime = runtime_of(scheduler)
    size = allocator.page_size
    runtime.cached_pages = lambda: np.unique(
        scheduler.tree_cache.all_values_flatten().cpu().numpy() // size
    )
    config = OrbitFlowConfig.from_env()
    assert config is not None
    spec = config.policy_spec
    if spec.placing is None:
        calibration.load_or_calibrate(scheduler, runtime, config)
        runtime.control = build_control(scheduler, runtime, config)
    if os.environ.get(hooks.TEST_CONTROL_ENV):
        hooks.verify(hooks.TEST_CONTROL)
    return {**info, HANDSHAKE: True}
