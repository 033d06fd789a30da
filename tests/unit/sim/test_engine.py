"""Runs that can be followed by hand; the arithmetic is beside the numbers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LAYERS, PAGE, TOKEN_BYTES, machine, requests, serve

from eval.sim import result
from eval.sim.engine import Simulation
from eval.sim.job import Job
from eval.workload.requests import TraceRequest
from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.engine.sizing import Budget, resolve_capacity
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit
POLICIES = (
    *("retract", "queue", "swap", "swap+order", "time-sliced-swap", "orbitflow", "paper"),
    *("static:1", "all-host", "flexgen", "next-layer", "orbitflow:no-streaming"),
)


def milliseconds(job: Job) -> list[float]:
    return [round(1e3 * at, 6) for at in job.token_s]


def test_two_requests_that_fit() -> None:
    first, second = serve("retract", requests((0, 8, 3), (0, 4, 2)), machine()).jobs
    # One step for both prompts: 12 tokens of 1 ms. Then decode steps of 10 ms.
    assert milliseconds(first) == [12, 22, 32]
    assert milliseconds(second) == [12, 22]


def test_the_second_waits_until_the_first_has_left_its_memory() -> None:
    trace = requests((0, 8, 3), (0, 4, 2))
    first, second = serve("queue", trace, machine(arena_tokens=16)).jobs
    # 16 slots: the first needs 8 + 3, and the second would need 4 + 2 and a page to spare.
    assert milliseconds(first) == [8, 18, 28]
    assert milliseconds(second) == [32, 42]  # 28 + 4 x 1, and a step of 10


def test_streaming_within_what_compute_hides_costs_nothing() -> None:
    trace = requests((0, 8, 3))
    simulation = serve("static:1", trace, machine())
    # Layers 2 and 4 are on the host, two pages each: 4 pages of 1 ms below 10 ms of compute.
    assert milliseconds(simulation.jobs[0]) == [8, 18, 28]
    # Written once: 2 layers x 2 pages. Token 9 and 10 do not fill a page. Read twice.
    assert simulation.memory.d2h_pages == 4
    assert simulation.memory.h2d_pages == 8


def test_a_step_whose_pages_take_longer_than_compute_is_bound_by_the_link() -> None:
    simulation = serve("static:1", requests((0, 8, 4)), machine(page_ms=4.0))
    # 4 pages of 4 ms: 16 ms a step instead of 10.
    assert milliseconds(simulation.jobs[0]) == [8, 24, 40, 56]
    assert simulation.stall_s == pytest.approx(3 * 0.006)


def test_retraction_throws_away_and_computes_again() -> None:
    trace = requests((0, 8, 9), (0.001, 8, 9))
    hardware = machine(arena_tokens=24)
    simulation = serve("retract", trace, hardware, known_lengths=False, output_limit=2)
    first, second = simulation.jobs
    # The second is let in behind the first's prompt: 8 + 2 + a page, of 24 slots less 8 and
    # 0.7 x 2. With 6 pages of 4 tokens, two of a prompt each, both get a third for tokens 9 to
    # 12; the fourth is one too many, so that the second goes when both have 12 tokens with KV,
    # of which 4 were said, and a fifth said.
    assert simulation.retractions == 1
    assert second.recomputed == 8 + 5
    assert second.computed == 8 + 13
    assert first.recomputed == 0


def test_once_somebody_finds_no_room_nobody_starts_until_somebody_leaves() -> None:
    # At once: beside 8 + 2 + a page of the first, as much is too much for 24 slots. Behind its
    # prompt it would not be, but SGLang does not look again while the first decodes.
    hardware = machine(arena_tokens=24)
    trace = requests((0, 8, 9), (0, 8, 2))
    simulation = serve("retract", trace, hardware, known_lengths=False, output_limit=2)
    first, second = simulation.jobs
    assert milliseconds(first)[-1] == 8 + 8 * 10
    assert milliseconds(second) == [96, 106]
    assert simulation.retractions == 0


@pytest.mark.parametrize("seed", range(8))
def test_who_knows_all_lengths_keeps_room_for_them_and_throws_nobody_out(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [(chance.random(), chance.randint(1, 40), chance.randint(1, 40)) for _ in range(40)]
    hardware = machine(arena_tokens=128, chunk_tokens=16)  # most prompts come in chunks
    assert serve("retract", requests(*lengths), hardware).retractions == 0


def test_who_was_thrown_out_is_last_in_line() -> None:
    trace = requests((0, 8, 9), (0.001, 8, 9), (0.05, 8, 2))
    hardware = machine(arena_tokens=24)
    simulation = serve("retract", trace, hardware, known_lengths=False, output_limit=2)
    _, second, third = simulation.jobs
    assert simulation.retractions == 1
    assert third.token_s[0] < second.token_s[-1]
    assert third.token_s[-1] < second.token_s[-1]


def test_swap_brings_back_what_it_set_aside() -> None:
    trace = requests((0, 16, 24), (0, 16, 24))
    simulation = serve("swap", trace, machine(arena_tokens=64))
    assert simulation.steps["pauses"] == simulation.steps["resumes"] >= 1
    assert simulation.retractions == 0
    memory = simulation.memory
    # Each page comes back as often as it went, tails included, and crosses the link for it.
    assert 0 < memory.h2d_pages <= memory.d2h_pages + LAYERS
    assert 0 < memory.came_back == memory.streamed + memory.fetched


@pytest.mark.parametrize("policy", ["swap", "orbitflow", "static:1"])
@pytest.mark.parametrize("book", ["left", "came_back", "given_up", "d2h_pages", "h2d_pages"])
def test_a_page_that_is_lost_or_counted_twice_is_found(policy: str, book: str) -> None:
    simulation = serve(policy, requests((0, 16, 24), (0, 16, 24), (0, 20, 20)), machine(64))
    result.check(simulation)
    setattr(simulation.memory, book, getattr(simulation.memory, book) + 1)
    with pytest.raises(result.Unbalanced, match="pages"):
        result.check(simulation)


def test_the_books_balance_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    pass_time = Simulation._pass

    def watched(self: Simulation, seconds: float) -> None:
        nonlocal steps
        pass_time(self, seconds)
        steps += 1
        assert self.memory.balance(list(self._live.values())) == []

    monkeypatch.setattr(Simulation, "_pass", watched)
    for policy in ("swap", "orbitflow", "time-sliced-swap", "paper", "static:1", "retract"):
        serve(policy, requests((0, 16, 24), (0, 16, 24), (0.1, 20, 20)), machine(64))
    assert steps > 100


@pytest.mark.parametrize("policy", ["orbitflow", "swap", "time-sliced-swap", "paper", "static:1"])
def test_every_policy_has_the_ring_that_the_server_gives_it(policy: str) -> None:
    budget = Budget(800, None, layers=LAYERS, page_size=PAGE, token_bytes=TOKEN_BYTES)
    server = resolve_capacity(OrbitFlowConfig(policy=policy), budget, free_host_bytes=10**12)
    simulation = serve(policy, [], machine(arena_tokens=800))
    assert simulation.memory.arena_pages == server.arena_pages
    assert simulation.memory.ring_pages == simulation.machine.ring_pages == server.ring_pages


def test_what_no_memory_holds_is_refused_and_counted() -> None:
    simulation = serve("queue", requests((0, 100, 4), (0, 8, 2)), machine(arena_tokens=64))
    assert [job.rid for job in simulation.refused] == ["r0"]
    assert result.summary(simulation)["good_requests"] == 0.5


def test_mixed_steps_let_decoding_go_on() -> None:
    trace = requests((0, 4, 3), (0.005, 8, 1))
    first, second = serve("retract", trace, machine(), mixed=True).jobs
    # 4 ms of prompt; a decode step to 14 ms; the arrival at 5 ms joins the next: 10 + 8 ms.
    assert milliseconds(first) == [4, 14, 32]
    assert milliseconds(second) == [32]


@pytest.mark.parametrize(("policy", "spills"), [("retract", False), ("orbitflow", True)])
def test_a_mixed_step_needs_room_for_who_decodes_where_nothing_spills(
    policy: str, spills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = serve(policy, requests((0, 8, 3)), machine(), mixed=True)
    (job,) = simulation.jobs
    monkeypatch.setattr(simulation, "_held", lambda: simulation.capacity)  # nothing is free
    job.view.tokens = PAGE - 1
    assert simulation._mixes([job])
    job.view.tokens = PAGE  # the next token takes a page
    assert simulation._mixes([job]) is spills
    monkeypatch.setattr(simulation, "_held", lambda: simulation.capacity - PAGE)
    assert simulation._mixes([job])


def test_paced_delivery_keeps_early_tokens_back_until_the_end() -> None:
    slo = SLO(1.0, 0.02, deposit=True)
    # Released at 0.95 x 20 ms behind token 1; the last two when the last is there, at 0.05.
    assert result.delivered([0.01, 0.02, 0.03, 0.05], slo) == pytest.approx(
        [0.01, 0.029, 0.048, 0.05]
    )
    assert result.delivered([0.0, 0.1], slo) == [0.0, 0.1]


@pytest.mark.parametrize("policy", ["retract", "swap", "orbitflow", "orbitflow:no-deposit"])
def test_delivery_is_paced_for_who_asks_whatever_the_policy(policy: str) -> None:
    trace = [replace(one, slo=SLO(1.0, 0.05, deposit=True)) for one in requests((0, 8, 4))]
    (served,) = result.served(serve(policy, trace, machine()))
    # Computed at 8, 18, 28 and 38 ms; the last token is there before token 2 would be due.
    assert served.token_s == pytest.approx([0.008, 0.038, 0.038, 0.038])


def test_the_papers_metrics_do_not_see_waits_between_steps() -> None:
    job = serve("retract", requests((0, 8, 4)), machine()).jobs[0]
    job.step_s = [0.01, 0.03, 0.01]  # against 20 ms
    found = result.paper([job])
    assert found["paper_tbt_attainment"] == pytest.approx(2 / 3)
    # Shown at 20; made at 40, as due; then at 60: nothing is late.
    assert found["paper_tbt_attainment_deposited"] == 1.0
    assert found["paper_tpot_attainment"] == 1.0


LENGTHS = st.lists(
    st.tuples(st.floats(0, 0.3), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=8
)


@given(LENGTHS, st.sampled_from(POLICIES), st.booleans(), st.sampled_from((64, 96, 160)))
@settings(max_examples=60)
def test_everybody_is_served_and_the_books_balance(
    lengths: list[tuple[float, int, int]], policy: str, mixed: bool, arena: int
) -> None:
    trace: list[TraceRequest] = requests(*lengths, slo=SLO(0.1, 0.02, deposit=True))
    simulation = serve(policy, trace, machine(arena_tokens=arena), mixed=mixed)
    served = [job for job in simulation.jobs if job not in simulation.refused]
    assert all(len(job.token_s) == job.output_tokens for job in served)
    assert all(job.asked_tokens + job.output_tokens > arena for job in simulation.refused)
    again = serve(policy, trace, machine(arena_tokens=arena), mixed=mixed)
    assert result.rows(simulation) == result.rows(again)
    assert result.summary(simulation) == result.summary(again)
