"""Prometheus series in SGLang's registry, with its labels, and a line beside SGLang's decode log.

``orbitflow_sglang/series.py`` has the table. Nothing is counted here: values are read where they
are kept, when SGLang reports its own, and once more when the scheduler becomes idle.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from orbitflow_sglang.control.deposit import Attainment, TokenTimes
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.series import (
    ATTAINED,
    CONTROLLER_SERIES,
    OUTCOMES,
    SLO_SERIES,
    SOLVE_BUCKETS_S,
    SOURCES,
    STORE_SERIES,
    Series,
    count_attainment,
)

logger = logging.getLogger(__name__)

REFRESH_S = 0.5  # SGLang reports with every prefill chunk: no more often than this
Values = Mapping[str, float | Mapping[str, float]]  # by series; then by the value of its label


# --- hooks --------------------------------------------------------------------


def log_stats(result: None, collector: Any, stats: Any) -> None:
    """After ``SchedulerMetricsCollector.log_stats``: our series."""
    runtime = Runtime.current
    if runtime is not None:
        _exporter_of(collector).refresh(runtime, at_once=False)


def idle(result: None, reporter: Any) -> None:
    """After ``_maybe_log_idle_metrics``: counters are complete, although SGLang may not report."""
    runtime = Runtime.current
    if runtime is not None and reporter.current_scheduler_metrics_enabled:
        exporter = _exporter_of(reporter.metrics_collector)
        exporter.refresh(runtime, at_once=exporter.steps != runtime.counters.steps)


def report_decode_stats(result: None, reporter: Any, *args: Any, **kwargs: Any) -> None:
    """After ``report_decode_stats``, which logs every so many decode steps: our line."""
    runtime = Runtime.current
    due = reporter.forward_ct_decode % reporter.decode_log_interval == 0
    if runtime is None or not due or not reporter.is_stats_logging_rank:
        return
    line = _log.line(runtime, reporter.decode_log_interval)
    if line is not None:
        logger.info("OrbitFlow: %s", line)


# --- what finished requests met -----------------------------------------------


def count_generated(counts: Counter[str], req: Any, times: TokenTimes) -> None:
    """A request has ended in the scheduler. Those aborted, health checks, and those that only fill
    the cache (SGLang's own, for n > 1) do not count."""
    aborted = isinstance(req.finished_reason, FINISH_ABORT)
    wanted = times.tokens and req.sampling_params.max_new_tokens
    if wanted and not aborted and not req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
        count_attainment(counts, times.attainment)


def count_delivered(met: Attainment, labels: Mapping[str, str]) -> None:
    """A request has left the server, in the process that answers."""
    counts: Counter[str] = Counter()
    count_attainment(counts, met)
    for series, (name, count) in zip(SLO_SERIES, counts.items(), strict=True):
        assert series.name == f"slo_{name}_total"
        if series.name not in _delivered:
            _delivered[series.name] = _new_metric(series, labels)
        # Also where nothing is added: a ratio of two series needs both to be there.
        _delivered[series.name].labels(**labels, kind="delivered").inc(count)


_delivered: dict[str, Any] = {}


# --- Prometheus ---------------------------------------------------------------


class _Exporter:
    """What one scheduler shows, under the labels of its collector."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.steps = -1  # of the runtime, when last refreshed
        self._labels = labels
        self._refreshed_s = 0.0
        self._metrics: dict[str, Any] = {}
        self._children: dict[tuple[str, str | None], Any] = {}  # labels() takes longer than set()
        self._reported: dict[tuple[str, str | None], float] = {}

    def refresh(self, runtime: Runtime, at_once: bool) -> None:
        now = time.perf_counter()
        if not at_once and now - self._refreshed_s < REFRESH_S:
            return
        self._refreshed_s, self.steps = now, runtime.counters.steps
        self._show(STORE_SERIES, store_values(runtime))
        control = runtime.control
        if control is None:
            return
        self._show(CONTROLLER_SERIES, controller_values(control, now))
        attained = {f"slo_{name}_total": control.attained[name] for name in ATTAINED}
        self._show(SLO_SERIES, {name: {"generated": n} for name, n in attained.items()})
        solve_times = control.controller.planning.solve_times
        while solve_times:
            self._children["plan_solve_seconds", None].observe(solve_times.popleft())

    def _show(self, table: tuple[Series, ...], values: Values) -> None:
        for series in table:
            if series.kind == "histogram":
                self._child(series, None)  # there, although it has seen nothing
                continue
            value = values[series.name]
            by_label = value if isinstance(value, Mapping) else {None: value}
            for label, number in by_label.items():
                child, key = self._child(series, label), (series.name, label)
                if series.kind == "gauge":
                    child.set(number)
                    continue
                # What it counts may have started over, as under another policy.
                reported = self._reported.get(key, 0.0)
                child.inc(number - reported if number >= reported else number)
                self._reported[key] = number

    def _child(self, series: Series, label: str | None) -> Any:
        key = series.name, label
        if key not in self._children:
            if series.name not in self._metrics:
                self._metrics[series.name] = _new_metric(series, self._labels)
            own = {} if series.label is None else {series.label: label}
            self._children[key] = self._metrics[series.name].labels(**self._labels, **own)
        return self._children[key]


def _exporter_of(collector: Any) -> _Exporter:
    exporter: _Exporter | None = getattr(collector, "orbitflow", None)
    if exporter is None:
        exporter = collector.orbitflow = _Exporter(collector.labels)
    return exporter


def _new_metric(series: Series, labels: Mapping[str, str]) -> Any:
    # Imported late: the library reads PROMETHEUS_MULTIPROC_DIR when it is imported.
    from prometheus_client import Counter, Gauge, Histogram

    names = [*labels, *(() if series.label is None else (series.label,))]
    if series.kind == "gauge":
        return Gauge(series.full_name, series.text, names, multiprocess_mode="mostrecent")
    if series.kind == "histogram":
        return Histogram(series.full_name, series.text, names, buckets=SOLVE_BUCKETS_S)
    return Counter(series.full_name, series.text, names)


# --- the values ---------------------------------------------------------------


def store_values(runtime: Runtime) -> Values:
    """Of ``STORE_SERIES``."""
    store, counters = runtime.store, runtime.counters
    return {
        "arena_pages": store.capacity.main_pages,
        "arena_pages_free": store.arena.num_free,
        "ring_pages": store.capacity.ring_pages,
        "staged_pages": store.capacity.ring_pages - store.ring.num_free,
        "host_pages": store.capacity.host_pages,
        "host_pages_free": store.host.num_free,
        "pages_in_use": _pages_in_use(runtime),
        "h2d_bytes_total": store.engine.h2d.bytes,
        "d2h_bytes_total": store.engine.d2h.bytes,
        "h2d_seconds_total": store.engine.h2d.busy_s,
        "d2h_seconds_total": store.engine.d2h.busy_s,
        "stall_seconds_total": store.ring.stall_s,
        "steps_total": counters.steps,
        "tiered_steps_total": counters.tiered_steps,
        "placements_total": runtime.placer.placements,
        "failed_idle_checks_total": counters.failed_idle_checks,
        "failed_steps_total": counters.failed_steps,
    }


def _pages_in_use(runtime: Runtime) -> int:
    table = runtime.store.table
    return (int(np.count_nonzero(table.in_use)) - 1) * table.layers  # page 0 is nobody's


def controller_values(control: Any, now: float) -> Values:
    """Of ``CONTROLLER_SERIES``; ``control`` is the ``SchedulerControl``."""
    controller, counts = control.controller, control.counts
    planning = controller.planning
    asked = getattr(planning.worker, "counts", Counter[str]())
    measured, predicted = medians(control.step_times)
    views = list(control.views.values())
    paused = [now - view.paused_s for view in views if view.paused_s is not None]
    waiting = [now - view.arrival_s for view in views if view.phase == "waiting"]
    deposits = [
        view.deposit_s(now)
        for view in views
        if view.phase in ("decode", "paused") and view.slo.pace_s and view.generated
    ]
    return {
        "hidden_pages": controller.hidden_pages,
        "stream_budget_pages": controller.budget_pages,
        "streamed_pages": controller.streamed_pages,
        "plans_total": {source: planning.sources[source] for source in SOURCES},
        "plan_outcomes_total": {outcome: asked[outcome] for outcome in OUTCOMES},
        "planner_restarts_total": asked["restarts"],
        "step_seconds": measured,
        "step_predicted_seconds": predicted,
        "step_ratio": statistics.median(control.step_ratios) if control.step_ratios else 0.0,
        "cost_drifts_total": control.feedback.drifts,
        "pauses_total": counts["pauses"],
        "resumes_total": counts["resumes"],
        "pauses_missed_total": counts["pauses_missed"],
        "retractions_total": counts["retractions"],
        "paused_requests": len(control.paused),
        "paused_longest_seconds": max(paused, default=0.0),
        "waiting_longest_seconds": max(waiting, default=0.0),
        "deposit_least_seconds": min(deposits, default=0.0),
        "deposit_median_seconds": statistics.median(deposits) if deposits else 0.0,
        "behind_requests": sum(deposit < 0 for deposit in deposits),
    }


def medians(times: Any) -> tuple[float, float]:
    """Of measured and of predicted times, from pairs of both; 0 without any."""
    if not times:
        return 0.0, 0.0
    measured, predicted = zip(*times, strict=True)
    return statistics.median(measured), statistics.median(predicted)


# --- the log ------------------------------------------------------------------


class _Log:
    """Makes one line of what has happened since the last one."""

    def __init__(self) -> None:
        self._at_s: float | None = None
        self._bytes = 0
        self._outcomes: Counter[str] = Counter()

    def line(self, runtime: Runtime, steps: int) -> str | None:
        """None while everything is on the device and nobody is set aside."""
        store, control = runtime.store, runtime.control
        now, since, self._at_s = time.perf_counter(), self._at_s, time.perf_counter()
        moved, self._bytes = store.engine.h2d.bytes - self._bytes, store.engine.h2d.bytes
        in_use = _pages_in_use(runtime)
        resident = min(in_use, store.capacity.main_pages - store.arena.num_free)
        parts = [f"resident {resident / max(1, in_use):.0%}"]
        if control is not None:
            parts += self._controller(control, steps)
        if since is not None:
            parts.append(f"H2D {moved / 1e6 / max(1e-9, now - since):.1f} MB/s")
        quiet = resident == in_use and (control is None or not control.paused)
        return None if quiet else ", ".join(parts)

    def _controller(self, control: Any, steps: int) -> list[str]:
        controller = control.controller
        asked = Counter(getattr(controller.planning.worker, "counts", {}))
        new, self._outcomes = asked - self._outcomes, asked
        plans = " ".join(f"{name} {new[name]}" for name in OUTCOMES if new[name])
        measured, predicted = medians(list(control.step_times)[-steps:])
        budget = controller.budget_pages
        return [
            f"streamed {controller.streamed_pages} of {budget} pages a step",
            f"{len(control.paused)} paused",
            *([f"plans {plans}"] if plans else []),
            f"step {measured * 1e3:.1f} ms (predicted {predicted * 1e3:.1f})",
        ]


_log = _Log()
