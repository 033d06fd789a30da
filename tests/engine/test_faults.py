"""Faults in a running server: a planner that is no use, copies that fail, memory that is full.

Whatever happens, requests end with stock SGLang's tokens or with an error that says why, the
server goes on, and its memory is whole afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import (
    TEST_CONTROL,
    Stock,
    assert_nothing_is_left,
    in_full_only,
    orbitflow_args,
    set_internal_state,
)
from storms import (
    ALL,
    FILLING,
    FREE,
    GROWING,
    GROWN,
    LONG,
    STORM,
    STYLE,
    Calm,
    Held,
    control_of,
    run_storm,
)

from eval.client import Client, Generation, Request
from eval.identity import compare
from eval.server import Server
from orbitflow_sglang.engine.test_faults import FAULTS

pytestmark = [pytest.mark.engine, in_full_only]

# Arena and host store together hold 1,900 tokens.
FLAGS = (
    *("--orbitflow-arena-tokens", "512", "--orbitflow-host-memory-gb", "0.012"),
    # SGLang then admits requests whose full outputs do not fit together.
    *("--schedule-conservativeness", "0.05"),
)
WANTED = [*GROWING[:4], *STORM[:4]]


@pytest.fixture(scope="module")
def server(stock: Stock) -> Iterator[Server]:
    stock.answers(STYLE, ALL)
    with Server(orbitflow_args(STYLE, *FLAGS), env=TEST_CONTROL) as running:
        yield running


def inject(client: Client, fault: str) -> None:
    set_internal_state(client, "orbitflow_fault", list(FAULTS).index(fault))


def failed_steps(client: Client) -> int:
    (state,) = client.orbitflow()
    assert state is not None
    count: int = state["failed_steps"]
    return count


def assert_right(calm: Calm, stock: Stock) -> None:
    result = calm.compared(stock.answers(STYLE, ALL))
    assert result.ok, result


def assert_all_served(server: Server, stock: Stock) -> None:
    calm = run_storm(server, WANTED, seed=0, give_up=False)
    assert not calm.refused, calm.refused
    assert_right(calm, stock)
    assert_nothing_is_left(server)


def test_full_memory_makes_requests_compute_their_kv_again(server: Server, stock: Stock) -> None:
    # Paused requests keep their KV, so that all of them get in; then they outgrow memory.
    with Held(server, GROWING) as held:
        held.let_go()
        held.assert_answered(stock)
    assert control_of(server)["retractions"] > 0, control_of(server)
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "a larger --orbitflow-host-memory-gb avoids that" in log
    assert_nothing_is_left(server)


def test_prompts_between_whose_chunks_memory_fills_wait_for_room(stock: Stock) -> None:
    # SGLang looks once whether a prompt fits, and computes its chunks one behind the other.
    # Nobody is paused: the arena is larger than what all together may take.
    small = ("--orbitflow-arena-tokens", "2048", "--max-total-tokens", "1536", *FLAGS[2:])

    def ask(one: Request) -> Generation:
        # Of one that ignores the end of text SGLang would keep room for all that it may say.
        return server.generate(one.input_ids, one.max_new_tokens, rid=one.rid, ignore_eos=False)

    with (
        Server(orbitflow_args(STYLE, *small), env=TEST_CONTROL) as server,
        ThreadPoolExecutor(len(GROWN) + len(LONG)) as pool,
    ):
        set_internal_state(server, "orbitflow_starve", 1)
        answers = [pool.submit(ask, one) for one in GROWN]
        while server.loads()[0]["num_running_reqs"] < len(GROWN):
            assert not any(answer.done() for answer in answers)
            time.sleep(0.02)
        answers += [pool.submit(ask, one) for one in LONG]
        found = [answer.result() for answer in answers]
        set_internal_state(server, "orbitflow_starve", 0)
        assert_nothing_is_left(server)
    expected = {one.rid: one for one in stock.answers(STYLE, ALL)}
    assert compare([expected[one.rid] for one in found], found).ok


def test_paused_requests_give_up_their_kv_before_the_last_running_one_has_to_end(
    server: Server, stock: Stock
) -> None:
    before = control_of(server)["retractions"]
    set_internal_state(server, "orbitflow_hold", 1)
    # Of one that ignores the end of text SGLang keeps room for all that it may say.
    stream = server.stream(FREE.input_ids, FREE.max_new_tokens, rid=FREE.rid, ignore_eos=False)
    answer = next(stream)  # it runs; then the others fill what it has yet to grow into
    with Held(server, FILLING, at_least=1) as held:
        *_, answer = stream
        held.let_go()
        held.assert_answered(stock)
    expected = {one.rid: one for one in stock.answers(STYLE, ALL)}[FREE.rid]
    assert (answer.finish_reason, answer.output_ids) == ("length", expected.output_ids)
    assert control_of(server)["retractions"] > before
    assert_nothing_is_left(server)


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        ("planner killed", "failed"),
        ("planner hung", "failed"),
        ("planner talks garbage", "invalid"),
        ("planner plans the impossible", "invalid"),
    ],
)
def test_without_a_planner_the_server_goes_on(
    server: Server, stock: Stock, fault: str, count: str
) -> None:
    before = control_of(server)["planner"].get(count, 0)
    inject(server, fault)
    try:
        assert_all_served(server, stock)
        assert control_of(server)["planner"][count] > before
    finally:
        inject(server, "planner")


@pytest.mark.parametrize("fault", ["fetch", "write"])
def test_a_failed_copy_costs_the_requests_it_touched_and_no_other(
    server: Server, stock: Stock, fault: str
) -> None:
    before = failed_steps(server)
    inject(server, fault)
    # More than memory holds, so that some have no KV to lose yet.
    calm = run_storm(server, [*GROWING, *STORM[:16]], seed=0, give_up=False)
    assert failed_steps(server) == before + 1
    assert calm.refused and calm.generations
    for refusal in calm.refused.values():
        assert refusal.status == 500
        assert "OrbitFlow lost the KV cache of this request" in refusal.message
        assert "injected by a test" in refusal.message
    assert_right(calm, stock)
    assert "all KV is given up" in server.log.read_text(encoding="utf-8", errors="replace")
    assert_nothing_is_left(server)
    assert_all_served(server, stock)


def test_a_host_store_that_claims_to_be_full(server: Server, stock: Stock) -> None:
    before = failed_steps(server)
    inject(server, "host full")
    calm = run_storm(server, WANTED, seed=0, give_up=False)
    assert failed_steps(server) > before and calm.refused
    assert_right(calm, stock) if calm.generations else None
    for refusal in calm.refused.values():
        assert refusal.status == 500, refusal
        assert "OrbitFlow lost the KV cache of this request" in refusal.message
    inject(server, "host")
    assert_nothing_is_left(server)
    assert_all_served(server, stock)
