"""What operators see in ``/server_info``: its ``orbitflow`` section."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from orbitflow_sglang.engine.placement import LiveRequest
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.engine.scheduler import live_requests, runtime_of

MAX_REQUESTS = 64  # the largest ones are listed


def get_internal_state(output: Any, controller: Any, *args: Any) -> Any:
    """After ``get_internal_state``: adds our section."""
    scheduler = controller.scheduler
    runtime = runtime_of(scheduler)
    output.internal_state["orbitflow"] = describe(
        runtime, live_requests(scheduler, scheduler.running_batch)
    )
    return output


def describe(runtime: Runtime, live: list[LiveRequest]) -> dict[str, Any]:
    """The state of one rank as JSON values. Pages are pages of one layer."""
    store, counters = runtime.store, runtime.counters
    capacity, engine = store.capacity, store.engine
    listed = sorted(live, key=lambda request: -request.tokens)[:MAX_REQUESTS]
    return {
        "policy": runtime.placer.name,
        "page_size": store.layout.page_size,
        "page_bytes": store.layout.page_bytes,
        "layers": store.layout.layers,
        "logical_pages": capacity.logical_pages,
        "arena": {"pages": capacity.main_pages, "free": store.arena.num_free},
        "ring": {"pages": capacity.ring_pages, "free": store.ring.num_free},
        "host": {"pages": capacity.host_pages, "free": store.host.num_free},
        "h2d": {
            "bytes": engine.h2d.bytes,
            "transfers": engine.h2d.transfers,
            "busy_s": engine.h2d.busy_s,
        },
        "d2h": {
            "bytes": engine.d2h.bytes,
            "transfers": engine.d2h.transfers,
            "busy_s": engine.d2h.busy_s,
        },
        "stall_s": store.ring.stall_s,
        "steps": counters.steps,
        "tiered_steps": counters.tiered_steps,
        "placements": runtime.placer.placements,
        "idle_checks": counters.idle_checks,
        "failed_idle_checks": counters.failed_idle_checks,
        "failed_steps": counters.failed_steps,
        "decode_batch_sizes": {str(k): n for k, n in sorted(runtime.decode_batch_sizes.items())},
        "emulated_compute": _emulated(runtime),
        "profile": _profile(runtime),
        "control": None if runtime.control is None else runtime.control.describe(),
        "num_requests": len(live),
        "requests": [_request(runtime, request) for request in listed],
    }


def _emulated(runtime: Runtime) -> dict[str, float] | None:
    """Seconds that layers were said to take, and that steps took beyond; None: as they come."""
    if runtime.emulated is None:
        return None
    return {"s": runtime.emulated.compute_s, "overrun_s": runtime.emulated.overrun_s}


def _profile(runtime: Runtime) -> dict[str, Any] | None:
    """The costs planned with; None under a policy without a controller."""
    profile, origin = runtime.profile, runtime.profile_origin
    if profile is None or origin is None:
        return None
    links = {
        name: {
            "setup_s": model.setup_s,
            "bytes_per_s": profile.page_bytes / model.per_page_s if model.per_page_s else None,
            "r2": model.r2,
        }
        for name, model in (("h2d", profile.h2d), ("d2h", profile.d2h))
    }
    return {
        "source": origin.source,
        "seconds": origin.seconds,
        "model": profile.model,
        "device": profile.device,
        "compute": asdict(profile.compute),
        **links,
        "prefill_tokens_per_s": profile.prefill_tokens_per_s,
    }


def _request(runtime: Runtime, request: LiveRequest) -> dict[str, Any]:
    store = runtime.store
    pages = runtime.pages_of(request)
    pages = pages[store.table.in_use[pages]]  # those of the next step have no place yet
    places = store.table.device_page[:, pages]
    in_arena = (places >= 0) & (places < store.arena.ring_start)
    layers = np.flatnonzero(~in_arena.all(axis=1)) + 1
    return {
        "rid": request.rid,
        "tokens": request.tokens,
        "layers_on_device": store.layout.layers - len(layers),
        "layers_on_host": len(layers),
        "offloaded_layers": layers.tolist(),
        "pages_on_device": int(in_arena.sum()),
        "pages_on_host": int((~in_arena).sum()),
    }
