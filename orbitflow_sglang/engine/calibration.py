"""The cost profile of this model on this machine: given, kept from earlier, or measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_parallel

from orbitflow_sglang import __version__
from orbitflow_sglang.config import OrbitFlowConfig, flag
from orbitflow_sglang.engine import emulated_compute, profile_files, ranks
from orbitflow_sglang.engine.probe import Probe
from orbitflow_sglang.engine.runtime import ProfileOrigin, Runtime
from orbitflow_sglang.planner import measuring
from orbitflow_sglang.planner.cost_model import (
    DecodeSample,
    Profile,
    TransferModel,
    TransferSample,
    fit_compute,
    fit_transfer,
)
from orbitflow_sglang.residency.store import ResidencyStore
from orbitflow_sglang.residency.transfer import TransferEngine

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 64
PREFILL_TOKENS = {"cpu": 512, "cuda": 2048}  # of the chunk that is timed
MOST_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}  # of a decode step's requests together
TRANSFER_REPEATS = 4  # of each size, the first one not counted
# A model too slow for all points gets by with fewer, where no other rank has to agree.
DECODE_TIME_S = 6.0
LEAST_POINTS = 4
# Without a host store nothing crosses the link. Whoever asks all the same is told so much
# for a page that no plan counts on it.
NO_LINK = TransferModel(setup_s=0.0, per_page_s=1.0, r2=0.0)


def load_or_calibrate(scheduler: Scheduler, runtime: Runtime, config: OrbitFlowConfig) -> Profile:
    """The profile to plan with; ``runtime.profile`` and its origin are set to it.

    For an idle engine that has not served yet. Every rank of a group takes the same way through
    it, because a rank that measures waits in collectives for the others, and ends up with the
    leader's profile: only the leader looks for a kept one, and keeps what it measured. Raises
    ``ConfigError`` for a file that cannot be used, ``SystemExit`` where measuring fails.
    """
    layout = runtime.store.layout
    began = time.perf_counter()
    if config.profile is not None:
        source = "file"
        profile = profile_files.read_given(config.profile, layout.layers, layout.page_bytes)
    else:
        room = _room(scheduler, runtime.store)
        path = profile_files.cache_file(_key(scheduler, runtime.store, config, room))
        kept = None
        if ranks.leads():
            kept = profile_files.read_cached(path, layout.layers, layout.page_bytes)
        kept = ranks.from_leader(kept)
        source = "measured" if kept is None else "cache"
        profile = _measure_or_exit(scheduler, runtime, config, room) if kept is None else kept
        if kept is None:
            profile = ranks.from_leader(profile)
            if ranks.leads():
                profile_files.write_cached(path, profile)
    runtime.profile = profile
    runtime.profile_origin = ProfileOrigin(source, seconds := time.perf_counter() - began)
    logger.info("OrbitFlow's costs (%s, %.1f s): %s", source, seconds, summary(profile))
    return profile


def summary(profile: Profile) -> str:
    """What a profile says, in one line."""
    compute = profile.compute
    step = [1e3 * compute.layers * s for s in (compute.constant_s, compute.per_request_s)]
    thousand = 1e6 * compute.layers * compute.per_token_s
    links = [
        f"{name} {profile.page_bytes / model.per_page_s / 1e9 if model.per_page_s else 0:.3g} GB/s "
        f"+ {1e6 * model.setup_s:.0f} us"
        for name, model in (("host to device", profile.h2d), ("device to host", profile.d2h))
    ]
    return (
        f"a decode step takes {step[0]:.2f} ms + {step[1]:.2f} a request + {thousand:.2f} per 1000 "
        f"tokens of context (R^2 {compute.r2:.3f}); {'; '.join(links)}; "
        f"prefill {profile.prefill_tokens_per_s or 0:.0f} tokens/s"
    )


# --- the key of a kept profile ------------------------------------------------


def _key(
    scheduler: Scheduler, store: ResidencyStore, config: OrbitFlowConfig, room: measuring.Room
) -> dict[str, object]:
    """Everything that the measured numbers depend on."""
    args = resolved_view(scheduler.server_args)
    model = scheduler.model_config
    points = [(p.batch, p.context) for p in measuring.decode_points(room)]
    graphs = getattr(args.cuda_graph_config, "decode", None)
    return {
        "model": args.model_path,
        "model_config": hashlib.sha256(model.hf_config.to_json_string().encode()).hexdigest(),
        "quantization": args.quantization,
        "dtype": str(model.dtype),
        "kv_dtype": str(store.layout.dtype),
        "device": _device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "orbitflow": __version__,
        "page_size": store.layout.page_size,
        "page_bytes": store.layout.page_bytes,
        "layers": store.layout.layers,
        "tp_size": get_parallel().tp_size,
        "attention_backend": args.attention_backend,
        "graphs": str(getattr(graphs, "backend", None)),
        "link_gb_per_s": config.emulated_link_gb_per_s,
        "compute": os.environ.get(emulated_compute.VARIABLE),
        "host_store": store.host.num_pages >= 2,
        "points": points,
        "prefill": _prefill_tokens(scheduler, room),
    }


def _device_name(device: str) -> str:
    """The processor that computes, as its maker calls it."""
    if device.split(":")[0] != "cpu":
        name: str = torch.get_device_module(device).get_device_name()
        return name
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


# --- measuring ----------------------------------------------------------------


def _room(scheduler: Scheduler, store: ResidencyStore) -> measuring.Room:
    kind = torch.device(scheduler.tp_worker.model_runner.device).type
    pool = scheduler.req_to_token_pool
    return measuring.Room(
        extents=store.capacity.main_pages // store.layout.layers,
        tokens=store.capacity.logical_pages * store.layout.page_size,
        page_size=store.layout.page_size,
        context_tokens=min(scheduler.max_req_input_len, pool.req_to_token.shape[1]),
        requests=min(pool.size, scheduler.max_running_requests),  # rows are for paused ones too
        most_tokens=MOST_TOKENS.get(kind, MOST_TOKENS["cuda"]),
    )


def _prefill_tokens(scheduler: Scheduler, room: measuring.Room) -> int:
    kind = torch.device(scheduler.tp_worker.model_runner.device).type
    largest = PREFILL_TOKENS.get(kind, PREFILL_TOKENS["cuda"])
    return measuring.prefill_tokens(room, min(scheduler.chunked_prefill_size or largest, largest))


def _measure_or_exit(
    scheduler: Scheduler, runtime: Runtime, config: OrbitFlowConfig, room: measuring.Room
) -> Profile:
    try:
        return _measure(scheduler, runtime, config, room)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(
            f"OrbitFlow could not measure what steps and transfers cost: {error}. Give a profile "
            f"of this model with {flag('profile')}, or enlarge the arena if it is very small"
        ) from error


def _measure(
    scheduler: Scheduler, runtime: Runtime, config: OrbitFlowConfig, room: measuring.Room
) -> Profile:
    store = runtime.store
    points = measuring.decode_points(room)
    if len(points) < 3:
        raise RuntimeError(f"the arena has room for {room.extents} pages in each layer")
    with Probe(scheduler, runtime) as probe:
        prefill = _prefill_rate(probe, _prefill_tokens(scheduler, room))
        samples = _decode_samples(probe, points, get_parallel().tp_size == 1)
        if store.engine.d2h.bytes or store.engine.h2d.bytes:
            raise RuntimeError("pages moved while steps were timed: too little of it is free")
        h2d, d2h = _transfer_models(store, config)
    _check_nothing_is_left(scheduler, store)
    return Profile(
        model=scheduler.model_config.model_path,
        device=_device_name(resolved_view(scheduler.server_args).device),
        page_bytes=store.layout.page_bytes,
        compute=fit_compute(samples, store.layout.layers),
        h2d=h2d,
        d2h=d2h,
        prefill_tokens_per_s=prefill,
    )


def _prefill_rate(probe: Probe, tokens: int) -> float:
    """Tokens/s of a first chunk, the better one of two."""
    probe.prefill(min(tokens, WARM_UP_TOKENS))
    return tokens / min(probe.prefill(tokens) for _ in range(2))


def _decode_samples(
    probe: Probe, points: list[measuring.DecodePoint], may_stop: bool
) -> list[DecodeSample]:
    """What a step takes at each point, or, with ``may_stop``, at those that time allows.

    All points are visited in turn, several times, and the best visit counts: what disturbs
    the machine for a moment then spoils one visit, not a point.
    """
    probe.decode(points[0], 2)  # the first steps of a process are slow
    began = time.perf_counter()
    best: dict[measuring.DecodePoint, float] = {}
    for point in points * measuring.ROUNDS:
        _, *steps = probe.decode(point, measuring.STEPS)  # the first one is still cold
        best[point] = min(best.get(point, math.inf), statistics.median(steps))
        over = time.perf_counter() - began > DECODE_TIME_S
        if may_stop and over and len(best) >= LEAST_POINTS:
            break
    # Of the middle one of the steps that count; each had added its token when it ran.
    behind = 1 + measuring.STEPS // 2
    return [
        DecodeSample(point.batch, point.batch * (point.context + behind), seconds)
        for point, seconds in best.items()
    ]


def _transfer_models(
    store: ResidencyStore, config: OrbitFlowConfig
) -> tuple[TransferModel, TransferModel]:
    """Costs of host-to-device and of device-to-host transfers, each alone on the link."""
    link = config.emulated_link_gb_per_s
    counts = measuring.transfer_counts(
        min(store.arena.num_free, store.host.num_free),
        store.layout.page_bytes,
        None if link is None else link * 1e9,
    )
    if not counts:
        return NO_LINK, NO_LINK
    h2d, d2h = [], []
    for count in counts:
        device, host = store.arena.take_pages(count), store.host.take(count)
        try:
            for repeat in range(TRANSFER_REPEATS):
                back = _timed(store.engine, store.engine.write_back, device, host)
                fetched = _timed(store.engine, store.engine.fetch, host, device)
                if repeat:  # the first one touches memory that may not have been there yet
                    d2h.append(TransferSample(count, back))
                    h2d.append(TransferSample(count, fetched))
        finally:
            store.arena.give_pages(device)
            store.host.give(host)
    return fit_transfer(h2d), fit_transfer(d2h)


def _timed(engine: TransferEngine, copy: Any, sources: Any, targets: Any) -> float:
    began = time.perf_counter()
    copy(sources, targets)
    engine.drain()
    return time.perf_counter() - began


def _check_nothing_is_left(scheduler: Scheduler, store: ResidencyStore) -> None:
    """Raise ``RuntimeError`` unless the engine is as empty as it was built."""
    pool, allocator = scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator
    found = store.check()
    for name, free, total in (
        ("arena pages", store.arena.num_free, store.capacity.main_pages),
        ("ring pages", store.ring.num_free, store.capacity.ring_pages),
        ("host pages", store.host.num_free, store.host.num_pages),
        ("rows", pool.available_size(), pool.size),
        ("token slots", allocator.available_size(), allocator.size),
    ):
        if free != total:
            found.append(f"{free} of {total} {name} are free")
    if store.table.pages_in_use().size:
        found.append("pages are still in use")
    if found:
        raise RuntimeError("measuring left something behind: " + "; ".join(found))
