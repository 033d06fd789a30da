"""Several ranks: replicas (DP) and groups that act as one (TP) answer as one rank does.

The arena is small, so that plans, streaming and pauses are live on all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from servers import (
    CORE_A_RANK,
    LEAK_CHECKS,
    Stock,
    assert_nothing_is_left,
    in_full_only,
    orbitflow_args,
    orbitflow_states,
    run_with_aborts,
    same_tables,
    set_internal_state,
)

from eval.client import Generation, Request
from eval.identity import Comparison, compare, mixed_requests
from eval.server import Server

pytestmark = [pytest.mark.engine, in_full_only]

STYLE = "llama"
ARENA = (
    *("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0.2"),
    *("--orbitflow-disable", "stand-aside"),  # or nothing is streamed for prompts this long
)
ENV = {"ORBITFLOW_TEST_CONTROL": "resident", **CORE_A_RANK, **LEAK_CHECKS}
COMPARED_EVERY_S = 0.5
SLOW_MB_PER_S = 20
WORKLOAD = mixed_requests(
    64, seed=21, shortest=100, longest=1800, max_new_tokens=48, shared_fraction=0.3
)


@contextmanager
def server_of(*flags: str) -> Iterator[Server]:
    with Server(orbitflow_args(STYLE, *ARENA, *flags), env=ENV) as server:
        yield server


@pytest.fixture(scope="module")
def expected(stock: Stock) -> list[Generation]:
    return stock.answers(STYLE, WORKLOAD)


def paused_at_least_once(generations: Sequence[Generation], aborted: set[str]) -> None:
    pauses = [g.meta["orbitflow"]["pauses"] for g in generations if g.rid not in aborted]
    assert pauses and min(pauses) >= 1, pauses


# --- replicas -------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(expected: list[Generation]) -> Iterator[Server]:
    with server_of("--dp-size", "2") as server:
        yield server


def test_replicas_share_the_memory_of_the_host(replicas: Server) -> None:
    for state in orbitflow_states(replicas):
        assert state["host"]["pages"] == int(0.1e9) // state["page_bytes"]


def test_replicas_answer_as_stock_sglang(
    replicas: Server, expected: list[Generation], identity_cells: dict[str, Comparison]
) -> None:
    set_internal_state(replicas, "orbitflow_pause", 1)
    found = replicas.generate_many(WORKLOAD, 8)
    result = compare(expected, found)
    identity_cells["dp 2"] = result
    assert not result.failures, result
    paused_at_least_once(found, set())
    for state in orbitflow_states(replicas):  # each of them has served
        assert state["control"]["resumes"] > 0 and state["control"]["retractions"] == 0
        assert state["tiered_steps"] > 0
    assert_nothing_is_left(replicas)


def test_replicas_lose_nothing_of_requests_given_up(
    replicas: Server, expected: list[Generation], identity_cells: dict[str, Comparison]
) -> None:
    set_internal_state(replicas, "orbitflow_pause", 0)
    outcome = run_with_aborts(replicas, WORKLOAD)
    result = compare(expected, outcome.generations, cut_short=outcome.aborted)
    identity_cells["dp 2, aborts"] = result
    assert not result.failures, result
    assert_nothing_is_left(replicas)


def test_replicas_are_told_apart_in_metrics(replicas: Server) -> None:
    series = replicas.metrics()["sglang:orbitflow_arena_pages"]
    assert sorted(sample.labels["dp_rank"] for sample in series) == ["0", "1"]


# --- a group that acts as one -----------------------------------------------------


@pytest.fixture(scope="module")
def group(expected: list[Generation]) -> Iterator[Server]:
    """Its second rank's copies are slow, so that whatever depends on their time differs."""
    with server_of("--tp-size", "2") as server:
        set_internal_state(server, "orbitflow_slow", SLOW_MB_PER_S)
        yield server


@contextmanager
def comparing_tables(server: Server) -> Iterator[list[bool]]:
    """Meanwhile asks again and again whether both ranks have their pages in the same places."""
    found: list[bool] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(COMPARED_EVERY_S):
            found.append(same_tables(server))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def answered(
    server: Server, expected: list[Generation], wanted: Sequence[Request]
) -> tuple[Comparison, list[Generation], set[str]]:
    assert same_tables(server)
    with comparing_tables(server) as found:
        outcome = run_with_aborts(server, wanted)
    assert len(found) > 1 and all(found), server.log_tail()
    assert same_tables(server)
    result = compare(expected, outcome.generations, cut_short=outcome.aborted)
    return result, outcome.generations, outcome.aborted


def test_a_group_shares_the_memory_of_the_host(group: Server) -> None:
    (state,) = orbitflow_states(group)
    assert state["host"]["pages"] == int(0.1e9) // state["page_bytes"]


@pytest.mark.parametrize("pauses", [0, 2])
def test_a_group_answers_as_stock_sglang_and_keeps_its_pages_in_the_same_places(
    group: Server, expected: list[Generation], identity_cells: dict[str, Comparison], pauses: int
) -> None:
    set_internal_state(group, "orbitflow_pause", pauses)
    result, found, aborted = answered(group, expected, WORKLOAD)
    identity_cells[f"tp 2, pauses {pauses}"] = result
    assert not result.failures, result
    (state,) = orbitflow_states(group)
    assert state["tiered_steps"] > 0
    assert state["h2d"]["bytes"] > 0
    if pauses:
        paused_at_least_once(found, aborted)
    assert_nothing_is_left(group)
    assert same_tables(group), group.log_tail()  # with as many free pages on both


def wait_for_a_pause(server: Server, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(state["control"]["paused"] for state in orbitflow_states(server)):
        assert time.monotonic() < deadline, "nobody was paused"


def test_whoever_is_paused_when_all_is_aborted_is_gone_on_both(group: Server) -> None:
    set_internal_state(group, "orbitflow_pause", 0)
    with comparing_tables(group) as found:
        streams = [group.stream(one.input_ids, 3000, rid=f"gone-{one.rid}") for one in WORKLOAD[:4]]
        for stream in streams:
            next(stream)
        set_internal_state(group, "orbitflow_hold", 1)
        wait_for_a_pause(group)
        group.abort_all()
        set_internal_state(group, "orbitflow_hold", 0)
        for stream in streams:
            *_, last = stream
            assert last.finish_reason == "abort"
    assert found and all(found), group.log_tail()
    assert_nothing_is_left(group)
    assert same_tables(group), group.log_tail()
