"""Hooks of SGLang's scheduler: which requests are live, and where a step ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from sglang.srt.managers.scheduler import Scheduler

from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.engine import calibration, compat, hooks
from orbitflow_sglang.engine.attention_torch import OrbitFlowTorchBackend
from orbitflow_sglang.engine.launcher import HANDSHAKE
from orbitflow_sglang.engine.placement import LiveRequest
from orbitflow_sglang.engine.pool import OrbitFlowAllocator
from orbitflow_sglang.engine.runtime import Runtime


def runtime_of(scheduler: Scheduler) -> Runtime:
    """The runtime behind a scheduler's pool."""
    return scheduler.token_to_kv_pool_allocator.get_kvcache().runtime


def run_batch(
    original: Callable[..., Any], scheduler: Scheduler, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around ``Scheduler.run_batch``: one step, which begins when attention is prepared."""
    runtime = runtime_of(scheduler)
    runtime.live = lambda: live_requests(scheduler, batch)
    try:
        return original(scheduler, batch, *args, **kwargs)
    finally:
        runtime.end()


def live_requests(scheduler: Scheduler, batch: Any) -> list[LiveRequest]:
    """Every request that holds KV while ``batch`` runs, each once."""
    holders = [*batch.reqs]
    for other in (scheduler.running_batch, scheduler.last_batch):
        if other is not None and other is not batch:
            holders.extend(other.reqs)
    if scheduler.chunked_req is not None:
        holders.append(scheduler.chunked_req)
    return [
        LiveRequest(req.rid, req.kv.req_pool_idx, req.kv.kv_allocated_len)
        for req in {id(req): req for req in holders}.values()
        if req.kv.holds_kv
    ]


def get_init_info(info: dict[str, Any], scheduler: Scheduler) -> dict[str, Any]:
    """After ``Scheduler.get_init_info``: proves the hooks, then tells the launcher."""
    hooks.verify(hooks.SCHEDULER)
    allocator = scheduler.token_to_kv_pool_allocator
    backend = scheduler.tp_worker.model_runner.attn_backend
    for found, expected in ((allocator, OrbitFlowAllocator), (backend, OrbitFlowTorchBackend)):
        if not isinstance(found, expected):
            raise SystemExit(
                f"OrbitFlow: SGLang built a {type(found).__name__} instead of {expected.__name__}"
            )
    compat.check_layers(scheduler.tp_worker.model_runner.model)
    runtime = runtime_of(scheduler)
    size = allocator.page_size
    runtime.cached_pages = lambda: np.unique(
        scheduler.tree_cache.all_values_flatten().numpy() // size
    )
    config = OrbitFlowConfig.from_env()
    assert config is not None
    if config.policy_spec.spills:
        calibration.load_or_calibrate(scheduler, runtime, config)
    if os.environ.get(hooks.TEST_CONTROL_ENV):
        hooks.verify(hooks.TEST_CONTROL)
    return {**info, HANDSHAKE: True}
