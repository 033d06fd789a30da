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
from orbitflow_sglang.planner.worker import PlannerWorker
from orbitflow_sglang.slo import SLO

logger = logging.getLogger(__name__)

DEFAULT_SLO_SCALE = 2.0
LEAST_TTFT_S = 1.0
TYPICAL_TOKENS = 1024  # of a request, for the targets that are derived


def build_control(scheduler: Any, runtime: Runtime, config: OrbitFlowConfig) -> SchedulerControl:
    """The control of a scheduler that is about to serve, its planner's process started.

    In lockstep on every rank, though only the leader's decides.
    """
    spec, profile = config.policy_spec, runtime.profile
    assert profile is not None
    capacity, layout = runtime.store.capacity, runtime.store.layout
    running = scheduler.max_running_requests
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
    slo, assumed = _default_slo(config, feedback, machine)
    return SchedulerControl(scheduler, runtime, controller, feedback, slo, assumed)


def _default_slo(config: OrbitFlowConfig, feedback: Feedback, machine: Machine) -> tuple[SLO, bool]:
    """Targets of requests that give none, and whether they are only assumed.

    A multiple of the step with the arena full and everything resident, and of the unloaded
    prefill of a prompt of ``TYPICAL_TOKENS``.
    """
    given = config.given_slo
    if given.ttft_s or given.pace_s:
        return given, False
    scale = DEFAULT_SLO_SCALE if config.slo_scale is None else config.slo_scale
    tokens = machine.main_pages // machine.layers * machine.page_size
    batch = max(1, min(machine.max_running, tokens // TYPICAL_TOKENS))
    tpot = scale * feedback.compute_s(batch, tokens)
    ttft = max(LEAST_TTFT_S, scale * feedback.prefill_s(min(tokens, TYPICAL_TOKENS)))
    slo = replace(given, ttft_s=ttft, tpot_s=tpot)
    logger.info(
        "OrbitFlow assumes TTFT %.2f s and TPOT %.4f s as targets (%s, %s)",
        ttft, tpot, flag("slo_scale"), flag("tpot_slo_ms"),
    )  # fmt: skip
    return slo, config.slo_scale is None
