"""Every series of the table on a real server, against ``/server_info`` and the dashboard."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from servers import CONCURRENCY, ROOT, assert_nothing_is_left, orbitflow_args, set_internal_state

from eval.client import Sample, metric_sum
from eval.identity import mixed_requests
from eval.server import Server
from orbitflow_sglang import series

pytestmark = pytest.mark.engine

# Prefill takes longer than decoding here, where the policy would not stream, and so not plan.
FLAGS = (
    *("--orbitflow-policy", "orbitflow:no-stand-aside", "--orbitflow-arena-tokens", "2048"),
    *("--orbitflow-host-memory-gb", "0.2", "--decode-log-interval", "10"),
)
DASHBOARD = ROOT / "docs" / "grafana" / "orbitflow.json"
LATER = {"sglang:num_retracted_requests_total"}  # of SGLang's, absent until the first one
# Targets that nobody can miss, and a TTFT that nobody can meet.
TARGETS = ({"tpot_slo_ms": 5e5, "ttft_slo_ms": 5e5}, {"tpot_slo_ms": 5e5, "ttft_slo_ms": 1e-3})
LINE = re.compile(
    r"OrbitFlow: resident \d+%, streamed \d+ of \d+ pages a step, \d+ paused, "
    r"(plans [a-z0-9 ]+, )?step [\d.]+ ms \(predicted [\d.]+\)"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    env = {"ORBITFLOW_TEST_CONTROL": "resident"}
    with Server(orbitflow_args("llama", *FLAGS), env=env) as server:
        yield server


@pytest.fixture(scope="module")
def finished(server: Server) -> int:
    """Requests that fill the arena, each paused once; half of them streamed. How many."""
    wanted = mixed_requests(16, seed=5, shortest=300, longest=1000, max_new_tokens=48)
    set_internal_state(server, "orbitflow_pause", 1)

    def one(index: int) -> None:
        request = wanted[index]
        params = {"custom_params": {"orbitflow": TARGETS[index % 2]}}
        if index % 4 < 2:
            list(server.stream(request.input_ids, request.max_new_tokens, **params))
        else:
            server.generate(request.input_ids, request.max_new_tokens, **params)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(one, range(len(wanted))))
    server.wait_idle()
    return len(wanted)


def scrape(server: Server) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    """``/metrics`` and our section of ``/server_info``, behind the refresh of an idle server."""
    for _ in range(20):
        time.sleep(1.5)
        (state,) = server.orbitflow()
        assert state is not None
        found = server.metrics()
        if metric_sum(found, series.PREFIX + "steps_total") == state["steps"]:
            break
    return found, state


def test_every_series_of_the_table_is_there(server: Server, finished: int) -> None:
    found, _ = scrape(server)
    assert [name for name in series.sample_names() if name not in found] == []
    for entry in series.SERIES:
        samples = found[entry.sample_names()[-1]]
        if entry.label is not None:
            assert {s.labels[entry.label] for s in samples} == set(entry.values), entry
        assert all(s.labels["model_name"] and s.labels["engine_type"] for s in samples)


def test_every_series_of_the_dashboard_is_there(server: Server, finished: int) -> None:
    used = set(re.findall(r"sglang:\w+", DASHBOARD.read_text(encoding="utf-8")))
    assert used - set(server.metrics()) <= LATER


def test_numbers_are_those_of_server_info_when_idle(server: Server, finished: int) -> None:
    found, state = scrape(server)
    control = state["control"]
    expected: dict[str, float] = {
        "arena_pages": state["arena"]["pages"],
        "arena_pages_free": state["arena"]["free"],
        "ring_pages": state["ring"]["pages"],
        "staged_pages": state["ring"]["pages"] - state["ring"]["free"],
        "host_pages": state["host"]["pages"],
        "host_pages_free": state["host"]["free"],
        "h2d_bytes_total": state["h2d"]["bytes"],
        "d2h_bytes_total": state["d2h"]["bytes"],
        "h2d_seconds_total": state["h2d"]["busy_s"],
        "d2h_seconds_total": state["d2h"]["busy_s"],
        "stall_seconds_total": state["stall_s"],
        "steps_total": state["steps"],
        "tiered_steps_total": state["tiered_steps"],
        "placements_total": state["placements"],
        "failed_idle_checks_total": state["failed_idle_checks"],
        "failed_steps_total": state["failed_steps"],
        "stream_budget_pages": control["budget_pages"],
        "streamed_pages": control["streamed_pages"],
        "plan_solve_seconds_count": control["plan_solves"]["count"],
        "plan_solve_seconds_sum": control["plan_solves"]["s"],
        "step_ratio": control["step_ratio"],
        "pauses_total": control["pauses"],
        "resumes_total": control["resumes"],
        "pauses_missed_total": control["pauses_missed"],
        "retractions_total": control["retractions"],
        "paused_requests": control["paused"],
        "plans_total": sum(control["plans"].values()),
        "plan_outcomes_total": sum(control["planner"].get(name, 0) for name in series.OUTCOMES),
    }
    for name, value in expected.items():
        assert metric_sum(found, series.PREFIX + name) == pytest.approx(value), name
    for name, value in control["attained"].items():
        full = f"{series.PREFIX}slo_{name}_total"
        assert metric_sum(found, full, kind="generated") == value, name
    assert expected["pauses_total"] >= finished
    for name in ("h2d_bytes_total", "plans_total", "plan_outcomes_total"):
        assert expected[name] > 0, name
    assert metric_sum(found, series.PREFIX + "step_predicted_seconds") > 0
    assert metric_sum(found, series.PREFIX + "step_seconds") > 0


def test_finished_requests_are_counted_once_of_either_kind(server: Server, finished: int) -> None:
    before, _ = scrape(server)

    def count(found: dict[str, list[Sample]], name: str, kind: str) -> float:
        return metric_sum(found, f"{series.PREFIX}slo_{name}_total", kind=kind)

    for kind in series.KINDS:
        assert count(before, "requests", kind) == finished
        assert count(before, "ttft_met", kind) == count(before, "good", kind) == finished / 2
        assert count(before, "tpot_met", kind) == finished
    # One step, after which nothing else makes SGLang report; two answers to one prompt, for which
    # SGLang sends one more, to fill the cache; an abort. Neither of the last two counts.
    server.generate(list(range(1, 30)), 1)
    twice = {"n": 2, "max_new_tokens": 4, "temperature": 1.0}
    body = {"input_ids": list(range(1, 50)), "sampling_params": twice}
    assert len(server.post("/generate", body).json()) == 2
    stream = server.stream(list(range(1, 40)), 400, rid="given up")
    next(stream)
    server.abort("given up")
    list(stream)
    server.wait_idle()
    after, _ = scrape(server)
    assert [count(after, "requests", kind) for kind in series.KINDS] == [finished + 3] * 2


def test_the_log_has_a_line_beside_those_of_sglang(server: Server, finished: int) -> None:
    lines = server.log.read_text(errors="replace").splitlines()
    ours = [line for line in lines if LINE.search(line)]
    assert ours
    assert len(ours) <= sum("Decode batch" in line for line in lines)
    assert any("H2D" in line for line in ours)


def test_nothing_is_left(server: Server, finished: int) -> None:
    assert_nothing_is_left(server)
    found, _ = scrape(server)
    assert metric_sum(found, series.PREFIX + "pages_in_use") == 0
