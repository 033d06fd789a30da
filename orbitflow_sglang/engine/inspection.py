"""What operators see: the ``orbitflow`` section of ``/server_info`` and Prometheus series."""

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
        "profile": _profile(runtime),
        "control": None if runtime.control is None else runtime.control.describe(),
        "num_requests": len(live),
        "requests": [_request(runtime, request) for request in listed],
    }


def _profile(runtime: Runtime) -> dict[str, Any] | None:
    """The costs planned with; None under a policy that never plans."""
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


_SERIES: dict[str, tuple[str, str]] = {
    "arena_pages": ("gauge", "Pages of the device arena outside the ring."),
    "arena_pages_free": ("gauge", "Free pages of the device arena."),
    "host_pages": ("gauge", "Pages of the host store."),
    "host_pages_free": ("gauge", "Free pages of the host store."),
    "staged_pages": ("gauge", "Pages of the ring in use."),
    "h2d_bytes_total": ("counter", "Bytes of KV moved from host to device."),
    "d2h_bytes_total": ("counter", "Bytes of KV moved from device to host."),
    "stall_seconds_total": ("counter", "Time that compute waited for pages to arrive."),
    "tiered_steps_total": ("counter", "Forward passes with pages on the host or on the move."),
    "placements_total": ("counter", "Times that a placement was made."),
    "failed_idle_checks_total": ("counter", "Idle checks that found a violated invariant."),
}
_metrics: dict[str, Any] = {}
_reported: dict[str, float] = {}


def log_stats(result: None, collector: Any, stats: Any) -> None:
    """After ``SchedulerMetricsCollector.log_stats``: our series, with SGLang's labels."""
    runtime = Runtime.current
    if runtime is None:
        return
    for name, value in _values(runtime).items():
        kind, text = _SERIES[name]
        if name not in _metrics:
            _metrics[name] = _new_metric(kind, name, text, collector.labels)
        metric = _metrics[name].labels(**collector.labels)
        if kind == "gauge":
            metric.set(value)
        else:
            metric.inc(value - _reported.get(name, 0))
            _reported[name] = value


def _new_metric(kind: str, name: str, text: str, labels: dict[str, str]) -> Any:
    # Imported late: the library reads PROMETHEUS_MULTIPROC_DIR when it is imported.
    from prometheus_client import Counter, Gauge

    full = f"sglang:orbitflow_{name}"
    if kind == "gauge":
        return Gauge(full, text, labels.keys(), multiprocess_mode="mostrecent")
    return Counter(full, text, labels.keys())


def _values(runtime: Runtime) -> dict[str, float]:
    store, counters = runtime.store, runtime.counters
    return {
        "arena_pages": store.capacity.main_pages,
        "arena_pages_free": store.arena.num_free,
        "host_pages": store.capacity.host_pages,
        "host_pages_free": store.host.num_free,
        "staged_pages": store.capacity.ring_pages - store.ring.num_free,
        "h2d_bytes_total": store.engine.h2d.bytes,
        "d2h_bytes_total": store.engine.d2h.bytes,
        "stall_seconds_total": store.ring.stall_s,
        "tiered_steps_total": counters.tiered_steps,
        "placements_total": runtime.placer.placements,
        "failed_idle_checks_total": counters.failed_idle_checks,
    }
