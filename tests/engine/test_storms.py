"""Storms of requests on an arena far too small for them, and all that an operator may do meanwhile.

Nothing here bounds times: that everybody is served is the statement.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import (
    FULL,
    TEST_CONTROL,
    Stock,
    assert_nothing_is_left,
    in_full_only,
    orbitflow_args,
    set_internal_state,
)
from storms import ALL, STORM, STYLE, Held, control_of, run_storm

from eval.client import RequestFailed
from eval.identity import Comparison
from eval.server import Server

pytestmark = [pytest.mark.engine, in_full_only]

ROUNDS = 3 if FULL else 1
FLAGS = ("--orbitflow-arena-tokens", "1024", "--orbitflow-host-memory-gb", "0.1")
FEW = STORM[:4]


@pytest.fixture(scope="module")
def server(stock: Stock) -> Iterator[Server]:
    stock.answers(STYLE, ALL)
    with Server(orbitflow_args(STYLE, *FLAGS), env=TEST_CONTROL) as running:
        yield running


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_everybody_in_a_storm_is_served_and_nothing_is_left(
    server: Server, stock: Stock, identity_cells: dict[str, Comparison], round_: int
) -> None:
    set_internal_state(server, "orbitflow_pause", 1)
    calm = run_storm(server, STORM, seed=round_)
    set_internal_state(server, "orbitflow_pause", 0)
    assert not calm.refused, calm.refused
    assert calm.generations.keys() == {request.rid for request in STORM}
    result = calm.compared(stock.answers(STYLE, ALL))
    identity_cells[f"storm {round_}"] = result
    assert result.ok, result
    whole = [one for rid, one in calm.generations.items() if rid not in calm.cut_short]
    assert all(one.finish_reason == "length" for one in whole), calm.endings
    control = control_of(server)
    assert control["pauses"] > len(STORM) / 2, control
    assert control["longest_pause_s"] > 0 and control["longest_wait_s"] > 0
    assert_nothing_is_left(server)
    assert control_of(server)["paused"] == 0


def test_paused_requests_are_seen_and_protected(server: Server, stock: Stock) -> None:
    with Held(server, FEW) as held:
        (load,) = server.loads()
        assert load["num_running_reqs"] == len(FEW), load
        with pytest.raises(RequestFailed) as refusal:
            server.post("/flush_cache", None)
        assert refusal.value.status == 400
        assert server.healthy()
        assert server.get("/health_generate").ok
        assert control_of(server)["paused"] == len(FEW)
        held.let_go()
        held.assert_answered(stock)
    assert_nothing_is_left(server)


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_of_the_engine_loses_no_paused_request(
    server: Server, stock: Stock, mode: str
) -> None:
    with Held(server, FEW) as held:
        server.post("/pause_generation", {"mode": mode})
        held.let_go()
        assert control_of(server)["paused"] == (0 if mode == "retract" else len(FEW))
        server.post("/continue_generation", {})
        held.assert_answered(stock)
    assert_nothing_is_left(server)


def test_a_paused_request_can_be_aborted_alone(server: Server, stock: Stock) -> None:
    with Held(server, FEW) as held:
        server.abort(FEW[1].rid)
        ended = held.answers[FEW[1].rid].result()
        assert ended.finish_reason == "abort" and len(ended.output_ids) < FEW[1].max_new_tokens
        assert control_of(server)["paused"] == len(FEW) - 1
        held.let_go()
        held.assert_answered(stock, besides=FEW[1].rid)
    assert_nothing_is_left(server)


def test_all_paused_requests_can_be_aborted(server: Server) -> None:
    with Held(server, FEW) as held:
        server.abort_all()
        endings = [answer.result().finish_reason for answer in held.answers.values()]
        assert endings == ["abort"] * len(FEW)
    assert_nothing_is_left(server)
