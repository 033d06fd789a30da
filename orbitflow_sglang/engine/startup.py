"""Builds a scheduler's control from flags, measured costs and memory sizes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from orbitflow_sglang.config import OrbitFlowConfig, flag
from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.feedback import Feedback
from orbitflow_sglang.control.view import Machine
from orbitflow_sglang.engine import memory, ranks
from orbitflow_sglang.engine.control import SchedulerControl
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.engine.targets import DEFAULT_SLO_SCALE, DefaultTargets
from orbitflow_sglang.planner.worker import PlannerWorker

logger = logging.getLogger(__name__)

TYPICAL_TOKENS = 1024  # of a request in a full arena, for the pace that is derived


def build_control(scheduler: Any, runtime: Runtime, config: OrbitFlowConfig) -> SchedulerControl:
    """The control of a scheduler that is about to serve, its planner's process started.

    In lockstep on every rank, though only the leader's decides.
    """
    spec, profile = config.policy_spec, runtime.profile
    assert profile is not None
    capacity, layout = runtime.store.capacity, runtime.store.layout
    running = scheduler.max_running_requests
    if scheduler.enable_lora and spec.overflow == "pause":
        logger.warning(
            "OrbitFlow pauses nobody with --enable-lora: where requests outgrow memory, more is "
            "streamed than compute hides, which slows all down (--max-running-requests)"
        )
    machine = Machine(
        layers=layout.layers,
        page_size=layout.page_size,
        main_pages=capacity.main_pages,
        ring_pages=capacity.ring_pages,
        host_pages=capacity.host_pages,
        max_running=running,
        max_paused=memory.max_paused(config, running),
        max_chunk_tokens=scheduler.chunked_prefill_size,
    )
    feedback = Feedback(profile, enabled=spec.has("feedback"))
    worker = PlannerWorker() if spec.streaming != "none" and ranks.leads() else None
    controller = Controller(spec, machine, feedback, worker)
    targets = _default_targets(config, feedback, machine)
    return SchedulerControl(scheduler, runtime, controller, feedback, targets)


def _default_targets(config: OrbitFlowConfig, costs: Feedback, machine: Machine) -> DefaultTargets:
    """Derived ones are a multiple of the step with the arena full and everything resident, and
    of the unloaded prefill of a request's prompt, by what chunks took so far: what attention
    adds to a long one is known only once there was one."""
    given = config.given_slo
    if given.ttft_s or given.pace_s:
        return DefaultTargets(given)
    scale = DEFAULT_SLO_SCALE if config.slo_scale is None else config.slo_scale
    tokens = machine.main_pages // machine.layers * machine.page_size
    batch = max(1, min(machine.max_running, tokens // TYPICAL_TOKENS))
    tpot = scale * costs.compute_s(batch, tokens)
    targets = DefaultTargets(
        replace(given, tpot_s=tpot), scale, costs.prefill_s, config.slo_scale is None
    )
    logger.info(
        "OrbitFlow assumes TPOT %.4f s and TTFT %.2f s of %d tokens, %.2f s of %d, as targets "
        "(%s, %s)",
        tpot, targets.of(TYPICAL_TOKENS).ttft_s, TYPICAL_TOKENS, targets.of(tokens).ttft_s, tokens,
        flag("slo_scale"), flag("tpot_slo_ms"),
    )  # fmt: skip
    return targets
