"""What servers meet every day and traces do not have: common prefixes, limits that nobody set,
targets that nothing meets, requests that end without a word."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_engine import MACHINE, ConstantCosts, FakeEngine, Job

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.policies import find_policy
from orbitflow_sglang.control.scene import Scene, lost
from orbitflow_sglang.control.view import NOTHING, Machine, Observation, RequestView, UnitView
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

SIZE, LAYERS = MACHINE.page_size, MACHINE.layers
LARGE = replace(
    MACHINE, main_pages=LAYERS * 1000, host_pages=LAYERS * 4000, max_running=64, max_paused=64
)
CHAT = SLO(ttft_s=5.0, tpot_s=0.2)


def controller(
    machine: Machine = MACHINE, costs: ConstantCosts | None = None, policy: str = "orbitflow"
) -> Controller:
    return Controller(find_policy(policy), machine, costs or ConstantCosts(), None)


def decoding(rid: str, prompt: int, said: int, slo: SLO = CHAT, limit: int = 200) -> RequestView:
    """One that has said ``said`` tokens, the last of them at second 1."""
    view = RequestView(rid, 0.0, slo, prompt, limit, phase="decode", tokens=prompt + said)
    view.times.add(0.5, 1)
    view.times.add(1.0, said - 1)
    return view


def waiting(count: int, prompt: int, slo: SLO = CHAT, shared: int = 0) -> list[RequestView]:
    return [
        RequestView(f"w{n}", 1.0, slo, prompt, 200, cached_tokens=shared, shared_tokens=shared)
        for n in range(count)
    ]


# --- prefixes in common --------------------------------------------------------------

PREFIX = 280  # pages, of 1,000


def in_common(views: Sequence[RequestView]) -> list[UnitView]:
    own = [UnitView(v.rid, v.tokens // SIZE - PREFIX, (v.rid,)) for v in views]
    return [*own, UnitView("prefix", PREFIX, tuple(v.rid for v in views))]


@pytest.mark.parametrize("policy", ["orbitflow", "orbitflow:no-admission", "time-sliced-swap"])
@pytest.mark.parametrize("count", [3, 8, 20])
def test_a_prefix_in_common_takes_room_once(policy: str, count: int) -> None:
    there = [decoding(f"d{n}", (PREFIX + 10) * SIZE, 16) for n in range(count)]
    new = waiting(4, (PREFIX + 10) * SIZE, shared=PREFIX * SIZE)
    chooses = controller(LARGE, ConstantCosts(page_transfer_s=5e-3), policy)
    decision = chooses.decide(Observation(1.1, [*there, *new], lambda: in_common(there)))
    # 280 pages and 12 of each, of 1,000.
    assert decision.admit == {view.rid for view in new}
    assert not decision.pause


def test_with_a_prefix_in_common_nothing_is_said_while_everything_fits() -> None:
    there = [decoding(f"d{n}", (PREFIX + 10) * SIZE, 16) for n in range(8)]
    looks = []

    def units() -> list[UnitView]:
        looks.append(1)
        return in_common(there)

    says = controller(LARGE)
    found = [says.decide(Observation(1.1, there, units)) for _ in range(20)]
    assert found[1:] == [NOTHING] * 19
    assert len(looks) == 1


def test_who_ended_shares_nothing_any_more() -> None:
    there = [decoding(f"d{n}", (PREFIX + 10) * SIZE, 16) for n in range(8)]
    says = controller(LARGE)
    says.decide(Observation(1.1, there, lambda: in_common(there)))
    for view in there[4:]:
        says.finished(view)
    others = [decoding(f"d{n}", (PREFIX + 10) * SIZE, 16) for n in range(4, 8)]  # same names
    apart = [UnitView(v.rid, v.tokens // SIZE, (v.rid,)) for v in [*there[:4], *others]]
    decision = says.decide(Observation(1.2, [*there[:4], *others], lambda: apart))
    assert decision.pause, "2,300 pages are not to be had"


@pytest.mark.parametrize("paced", [False, True])
def test_who_takes_turns_takes_a_prefix_in_common_once(paced: bool) -> None:
    """Of 750 pages four take 280 in common and 104 each: 696. In turns of 1.5 x 38 ms / 200 ms
    that is 0.29 x 696, and one more at any time needs another 105."""
    machine = replace(LARGE, main_pages=LAYERS * 750)
    slo = SLO(ttft_s=5.0, tpot_s=0.2, deposit=paced)
    there = [decoding(f"d{n}", (PREFIX + 100) * SIZE, 60, slo) for n in range(4)]
    new = waiting(1, (PREFIX + 100) * SIZE, slo, shared=PREFIX * SIZE)
    new[0].arrival_s = 1.1 - 4.8  # urgent: 0.16 of 0.2 s go to its prompt
    chooses = controller(machine, ConstantCosts(page_transfer_s=5e-5), "time-sliced-swap")
    decision = chooses.decide(Observation(1.1, [*there, *new], lambda: in_common(there)))
    assert bool(decision.admit) is bool(decision.pause) is paced


# --- what is cached ------------------------------------------------------------------


def test_what_is_cached_of_a_prompt_need_not_be_computed() -> None:
    """2,000 tokens take 2 s, of which there is 1: only who has them cached is in time."""
    costs = ConstantCosts(prefill_token_s=1e-3)
    slo = SLO(ttft_s=1.0, tpot_s=0.1)
    cold, warm = waiting(2, 2000, slo)
    warm.cached_tokens = 1900
    decision = controller(LARGE, costs).decide(
        Observation(1.0, [decoding("d", 16, 8), cold, warm], list)
    )
    assert decision.order == ("w1", "w0")


@pytest.mark.parametrize(("cached", "streams"), [(0, False), (2900, True)])
def test_prompts_are_much_of_the_work_only_where_they_are_computed(
    cached: int, streams: bool
) -> None:
    """3,000 tokens in 3 s and 100 steps of at least 12 ms; with 2,900 cached, in 0.1 s."""
    costs = ConstantCosts(prefill_token_s=1e-3)
    weighs = controller(costs=costs)
    ended = decoding("ended", 3000, 100)
    ended.cached_tokens = cached
    weighs.finished(ended)
    weighs.decide(Observation(1.0, [decoding("d", 16, 8), *waiting(1, 16)], list))
    assert (weighs.budget_pages > 0) is streams


# --- targets -------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [SLO(tpot_s=0.005), SLO(ttft_s=5.0, tpot_s=0.005)])
def test_nobody_waits_for_a_pace_that_not_even_a_lone_request_could_keep(strict: SLO) -> None:
    machine = replace(
        MACHINE, main_pages=LAYERS * 2000, host_pages=LAYERS * 8000, max_running=32, max_paused=32
    )
    usual = SLO(ttft_s=5.0, tpot_s=0.1)
    jobs = [Job(200, 100, n / 8, usual) for n in range(40)]
    jobs += [Job(200, 100, 2.0 + n, strict) for n in range(3)]
    engine = FakeEngine("orbitflow", jobs, machine)
    engine.run()
    served = [v for v in engine.finished.values() if v.slo is usual]
    assert all(view.times.attainment.good for view in served)


def test_somebody_set_aside_without_a_pace_is_not_owed_room_before_newcomers_that_fit() -> None:
    chats = [decoding(f"c{n}", 64, 16) for n in range(5)]
    job = RequestView("job", 0.0, SLO(), 700, 400, phase="paused", tokens=720, missing_pages=180)
    job.times.add(0.1, 20)
    job.paused_s = 1.0
    new = waiting(3, 32)
    decision = controller(policy="orbitflow:no-streaming").decide(
        Observation(1.25, [*chats, job, *new], list)
    )
    assert decision.admit == {view.rid for view in new}


@pytest.mark.parametrize("limit", [200, 100_000])
def test_a_limit_that_nobody_set_makes_nobody_on_time(limit: int) -> None:
    """40 s behind, and others say 100 tokens: at 90 ms ahead a token that is 9 s."""
    view = decoding("d", 100, 10, SLO(tpot_s=0.1), limit)
    scene = Scene(45.0, step_s=0.01, output=100.0)
    assert lost(view, scene)
    assert not lost(view, replace(scene, now=5.0))


# --- who ends without a word ----------------------------------------------------------


def test_who_was_given_up_or_only_filled_the_cache_says_nothing_about_answers() -> None:
    """mu would be 0 and nothing streamed, and nobody set aside for who is urgent."""
    weighs = controller()
    weighs.finished(RequestView("aborted", 0.0, CHAT, 4000, 100))
    for_others = RequestView("prefix of n samples", 0.0, CHAT, 4000, 0)
    for_others.times.add(1.0, 1)
    weighs.finished(for_others)
    weighs.decide(Observation(1.0, [decoding("d", 16, 8), *waiting(1, 16)], list))
    assert weighs.budget_pages > 0


# --- turns ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 5])
def test_the_turn_of_who_has_waited_longest_stays_until_it_is_taken(seed: int) -> None:
    """One of 600 tokens beside small ones that fill 1,024 for as long as they come, 40 s: some
    turns pass until so much is free at once, not all."""
    chance, now = random.Random(seed), 0.0
    jobs = [Job(600, 20, 2.0, SLO(ttft_s=3.0, tpot_s=0.1))]
    while now < 40:
        now += chance.expovariate(5)
        size = chance.randint(60, 160), chance.randint(60, 160)
        jobs.append(Job(*size, now, SLO(ttft_s=1.0, tpot_s=0.1)))
    engine = FakeEngine("orbitflow:no-streaming", jobs, costs=ConstantCosts(page_transfer_s=1e-3))
    engine.run()
    (large,) = [v for v in engine.finished.values() if v.prompt_tokens == 600]
    first_s = large.first_token_s or 0.0
    others = [v for v in engine.finished.values() if v.arrival_s > 2.0]
    assert sum((v.first_token_s or 0.0) < first_s for v in others) <= 4 * rules.AGEING_SHARE
