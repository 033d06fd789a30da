"""The controller on an engine without a model: it keeps its word and nobody starves."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from fake_engine import MACHINE, ConstantCosts, FakeEngine, Job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.policies import RULES, find_policy
from orbitflow_sglang.control.scene import Scene, lost
from orbitflow_sglang.control.view import (
    NOTHING,
    Machine,
    Observation,
    Phase,
    RequestView,
    StepDecision,
)
from orbitflow_sglang.planner.paper import solve_paper
from orbitflow_sglang.planner.problem import PlanningProblem
from orbitflow_sglang.planner.solver import greedy
from orbitflow_sglang.planner.worker import Answer
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

POLICIES = (
    "orbitflow",
    *(f"orbitflow:no-{rule}" for rule in RULES),
    "swap",
    "swap+order",
    "time-sliced-swap",
    "paper",
    "queue",
    "retract+order",
)
PAUSING = tuple(p for p in POLICIES if not p.startswith(("queue", "retract", "paper")))
SLOS = (
    SLO(),
    SLO(ttft_s=1.0, tpot_s=0.03),
    SLO(ttft_s=2.0, tpot_s=0.1, deposit=True),
    SLO(tpot_s=0.05, tbt_s=0.2, deposit=True),
    SLO(ttft_s=0.3, tpot_s=0.015, tbt_s=0.05),
)
SLOW_LINK = ConstantCosts(page_transfer_s=5e-3)
FAST_LINK = ConstantCosts(page_transfer_s=2e-5)


def load(count: int, seed: int, longest: int = 500) -> list[Job]:
    """Requests that come within a second, of all kinds of targets."""
    chance = random.Random(seed)
    return [
        Job(
            prompt=round(math.exp(chance.uniform(math.log(16), math.log(longest)))),
            output=chance.randint(1, 120),
            arrival_s=chance.uniform(0, 1),
            slo=chance.choice(SLOS),
        )
        for _ in range(count)
    ]


def assert_all_served(engine: FakeEngine, count: int) -> None:
    engine.run()
    assert len(engine.finished) == count
    assert all(v.generated == v.max_new_tokens for v in engine.finished.values())


# --- calm -------------------------------------------------------------------------


def test_it_says_nothing_while_everything_fits() -> None:
    engine = FakeEngine("orbitflow", [Job(100, 40), Job(60, 30)])
    assert_all_served(engine, 2)
    decode_steps = [decision for decision in engine.decisions if decision is NOTHING]
    assert len(decode_steps) >= 38
    assert engine.costs.plans == 0


# --- nobody starves -----------------------------------------------------------------


@pytest.mark.parametrize("costs", [ConstantCosts(), SLOW_LINK, FAST_LINK], ids=["", "slow", "fast"])
@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_is_served_however_small_the_arena(policy: str, costs: ConstantCosts) -> None:
    engine = FakeEngine(policy, load(30, seed=1), costs=replace(costs, plans=0))
    assert_all_served(engine, 30)
    # Over a fast link streaming may do where the order is that of arrival.
    if policy in PAUSING and costs is not FAST_LINK:
        assert engine.most_paused > 0, "the load was meant to be larger than the arena"


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_is_served_where_host_memory_is_short_too(policy: str) -> None:
    tight = replace(MACHINE, host_pages=MACHINE.layers * 16, main_pages=MACHINE.layers * 40)
    assert_all_served(FakeEngine(policy, load(30, seed=2, longest=400), tight), 30)


@pytest.mark.parametrize("policy", ["orbitflow", "time-sliced-swap", "swap+order"])
@pytest.mark.parametrize("slo", SLOS, ids=range(len(SLOS)))
def test_a_load_of_one_kind_is_served(policy: str, slo: SLO) -> None:
    jobs = [replace(job, slo=slo) for job in load(24, seed=3)]
    assert_all_served(FakeEngine(policy, jobs), 24)


def test_one_request_larger_than_the_arena_decodes_beside_small_ones() -> None:
    jobs = [Job(2000, 60), *load(8, seed=4, longest=60)]
    assert_all_served(FakeEngine("orbitflow", jobs), 9)


jobs_of_any_kind = st.lists(
    st.builds(
        Job,
        prompt=st.integers(1, 900),
        output=st.integers(1, 60),
        arrival_s=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.5]),
        slo=st.sampled_from(SLOS),
    ),
    min_size=1,
    max_size=14,
)
machines = st.builds(
    Machine,
    layers=st.sampled_from([1, 2, 4, 8]),
    page_size=st.sampled_from([1, 16, 32]),
    main_pages=st.integers(300, 1200),
    ring_pages=st.sampled_from([8, 32]),
    host_pages=st.sampled_from([8 * 2000]),
    max_running=st.integers(1, 8),
    max_paused=st.integers(0, 8),
    max_chunk_tokens=st.sampled_from([64, 256, 2048]),
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    policy=st.sampled_from([p for p in POLICIES if p not in ("queue", "retract+order")]),
    jobs=jobs_of_any_kind,
    machine=machines,
    link_s=st.sampled_from([1e-6, 2e-4, 1e-2]),
)
def test_nobody_starves_and_no_limit_is_passed(
    policy: str, jobs: list[Job], machine: Machine, link_s: float
) -> None:
    engine = FakeEngine(policy, jobs, machine, ConstantCosts(page_transfer_s=link_s))
    assert_all_served(engine, len(jobs))


# --- planners that are no use ---------------------------------------------------------


class SilentWorker:
    """Is asked and never answers."""

    def __init__(self) -> None:
        self.asked = 0

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        self.asked += 1

    def poll(self) -> Answer | None:
        return None

    @property
    def busy(self) -> bool:
        return self.asked > 0


class LateWorker(SilentWorker):
    """Answers some steps late, at times with a plan for requests that nobody knows."""

    def __init__(self, strangers: bool) -> None:
        super().__init__()
        self._strangers = strangers
        self._problem: PlanningProblem | None = None
        self._wait = 0

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        super().submit(problem, in_force, steps)
        self._problem, self._wait = problem, 5

    def poll(self) -> Answer | None:
        self._wait -= 1
        if self._problem is None or self._wait > 0:
            return None
        problem, self._problem = self._problem, None
        if self._strangers:
            units = tuple(
                replace(unit, id=f"x{row}", shared_by=()) for row, unit in enumerate(problem.units)
            )
            problem = replace(problem, units=units)
        return Answer(self.asked, greedy(problem), "solved")


def test_a_planner_that_never_answers_leaves_the_last_plan() -> None:
    worker = SilentWorker()
    engine = FakeEngine("orbitflow", load(24, seed=5), worker=worker, costs=replace(FAST_LINK))
    assert_all_served(engine, 24)
    assert worker.asked > 0
    assert engine.controller.planning.sources["planned"] == 0
    assert engine.controller.planning.sources["kept"] > 0


@pytest.mark.parametrize("strangers", [False, True])
def test_late_answers_and_plans_for_strangers_do_no_harm(strangers: bool) -> None:
    worker = LateWorker(strangers)
    engine = FakeEngine("orbitflow", load(24, seed=6), worker=worker, costs=replace(FAST_LINK))
    assert_all_served(engine, 24)
    assert worker.asked > 0


class PromptWorker(SilentWorker):
    """Answers before the next step, with the authors' plan."""

    def __init__(self) -> None:
        super().__init__()
        self._problem: PlanningProblem | None = None

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        super().submit(problem, in_force, steps)
        self._problem = problem

    def poll(self) -> Answer | None:
        problem, self._problem = self._problem, None
        return None if problem is None else Answer(self.asked, solve_paper(problem), "solved")


def test_whom_the_authors_plan_sets_aside_stays_so_until_the_batch_changes() -> None:
    jobs = [Job(300 + 16 * i, 60 + i) for i in range(8)]  # half of each does not fit together
    engine = FakeEngine("paper", jobs, worker=PromptWorker())
    assert_all_served(engine, len(jobs))
    returns = sum(bool(decision.resume) for decision in engine.decisions)
    assert 0 < returns <= 2 * len(jobs)  # each joins the batch once, and leaves it


# --- the line ---------------------------------------------------------------------


def decision_with_two_waiting(policy: str) -> StepDecision:
    """One decodes in half of the arena; one waits without haste, one that came later with."""
    busy = RequestView("busy", 0.0, SLO(), 512, 64, phase="decode", tokens=512)
    busy.times.add(0.1, 1)
    calm = RequestView("calm", 0.2, SLO(ttft_s=9.0), 64, 64)
    urgent = RequestView("urgent", 0.3, SLO(ttft_s=1.0), 64, 64)
    controller = Controller(find_policy(policy), MACHINE, ConstantCosts(), None)
    return controller.decide(Observation(0.4, [busy, calm, urgent], list))


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("paper", "swap", "queue")])
def test_who_has_least_slack_is_first_in_line(policy: str) -> None:
    by_slack = policy != "orbitflow:no-ordering"
    wanted = ("urgent", "calm") if by_slack else ("calm", "urgent")
    assert decision_with_two_waiting(policy).order == wanted


@pytest.mark.parametrize("policy", ["swap", "queue"])
def test_without_ordering_who_came_first_is(policy: str) -> None:
    assert decision_with_two_waiting(policy).order == ("calm", "urgent")


def test_retract_leaves_everything_to_sglang() -> None:
    assert decision_with_two_waiting("retract") is NOTHING


@pytest.mark.parametrize(
    ("slo", "now", "left", "is_lost"),
    [
        # Of 11 tokens, 0.1 s apart, the last is due 1 s behind the first; a step takes 0.06 s.
        (SLO(tpot_s=0.1), 1.9, 23, False),  # 0.9 s behind, of which each token gains 0.04 s
        (SLO(tpot_s=0.1), 1.9, 22, True),
        (SLO(tpot_s=0.05), 0.7, 1000, True),  # slower than a step: nothing is made up for
        (SLO(tpot_s=0.1), 0.9, 0, False),  # ahead
        (SLO(ttft_s=1.0), 99.0, 5, False),  # no pace to lose, and the first token came in time
        (SLO(ttft_s=0.9, tpot_s=0.1), 0.9, 0, True),  # ahead, but it did not
    ],
)
def test_a_request_is_lost_when_nothing_it_is_given_makes_up(
    slo: SLO, now: float, left: int, is_lost: bool
) -> None:
    view = RequestView("a", -1.0, slo, 64, 11 + left, phase="decode", tokens=75)
    view.times.add(0.0, 1)
    view.times.add(min(now, 1.0), 10)
    scene = Scene(now, step_s=0.06)
    assert lost(view, scene) is is_lost


@pytest.mark.parametrize(("now", "is_lost"), [(1.4, False), (1.6, True)])
def test_who_waits_is_lost_once_the_first_token_is_overdue(now: float, is_lost: bool) -> None:
    view = RequestView("a", 0.5, SLO(ttft_s=1.0, tpot_s=0.1), 64, 8)
    assert lost(view, Scene(now, step_s=0.06)) is is_lost


@pytest.mark.parametrize("policy", ["orbitflow:no-streaming", "time-sliced-swap"])
def test_when_memory_is_full_who_was_answered_too_late_leaves(policy: str) -> None:
    views = []
    for rid, first_s, tokens in (("punctual", 0.5, 40), ("late", 1.5, 20)):
        view = RequestView(rid, 0.0, SLO(ttft_s=1.0, tpot_s=0.1), 512, 400, phase="decode")
        view.tokens = 512 + tokens
        view.times.add(first_s, 1)
        view.times.add(1.9, tokens - 1)  # both are ahead, and who was punctual by more
        views.append(view)
    controller = Controller(find_policy(policy), MACHINE, ConstantCosts(), None)
    assert controller.decide(Observation(2.0, views, list)).pause == ("late",)


def end(
    controller: Controller, prompt: int, output: int, count: int = 1, probe: bool = False
) -> None:
    """``count`` requests of that kind have ended."""
    for _ in range(count):
        ended = RequestView("ended", 0.0, SLO(), prompt, 800, phase="decode")
        ended.times.add(1.0, output)
        controller.finished(ended, probe)


@pytest.mark.parametrize(
    ("policy", "output", "slo", "enters"),
    [  # A prompt of 128 tokens takes 128 ms: 16 ms of each of 8 tokens, 0.16 ms of each of 800.
        ("orbitflow", 8, SLO(tpot_s=0.04), False),
        ("orbitflow", 800, SLO(tpot_s=0.04), True),
        ("orbitflow", 8, SLO(tpot_s=0.1), True),
        ("orbitflow", 8, SLO(), True),
        ("orbitflow", 0, SLO(tpot_s=0.04), True),  # aborted before its first token: unknown
        ("orbitflow:no-admission", 8, SLO(tpot_s=0.04), True),
    ],
)
def test_a_newcomer_waits_where_prompts_would_cost_who_decodes_the_pace(
    policy: str, output: int, slo: SLO, enters: bool
) -> None:
    controller = Controller(find_policy(policy), MACHINE, ConstantCosts(prefill_token_s=1e-3), None)
    end(controller, prompt=128, output=output)
    busy = RequestView("busy", 1.0, slo, 128, 40, phase="decode", tokens=129)
    busy.times.add(1.1, 1)
    waiting = [RequestView(f"w{number}", 1.1, slo, 128, 40) for number in range(3)]
    decision = controller.decide(Observation(1.1, [busy, *waiting], list))
    assert bool(decision.admit) is enters


@pytest.mark.parametrize(
    ("count", "probe", "prompt", "output", "said", "enters"),
    [
        (1, False, 128, 8, 1, False),
        (9, True, 128, 8, 1, True),  # health checks
        (9, False, 1, 8, 1, True),  # far smaller ones: the pace bears more of them
        (1, False, 128, 8, 100, True),  # those that decode say far more
    ],
)
def test_newcomers_do_not_wait_for_what_ended_is_unlike_those_that_are_here(
    count: int, probe: bool, prompt: int, output: int, said: int, enters: bool
) -> None:
    controller = Controller(
        find_policy("orbitflow"), MACHINE, ConstantCosts(prefill_token_s=1e-3), None
    )
    end(controller, prompt, output, count, probe)
    busy = RequestView("busy", 1.0, SLO(tpot_s=0.04), 128, 200, phase="decode", tokens=128 + said)
    busy.times.add(1.1, said)
    waiting = [RequestView(f"w{number}", 1.1, SLO(tpot_s=0.04), 128, 40) for number in range(3)]
    decision = controller.decide(Observation(1.1, [busy, *waiting], list))
    assert bool(decision.admit) is enters


@pytest.mark.parametrize("requests_of_room, copied", [(100, False), (2.5, True)])
def test_pages_are_copied_ahead_where_memory_keeps_newcomers_out(
    requests_of_room: float, copied: bool
) -> None:
    """And not where those that decode would lose their pace: nobody has to leave for that."""
    machine = replace(MACHINE, main_pages=int(requests_of_room * 9 * MACHINE.layers))
    controller = Controller(find_policy("orbitflow:no-streaming"), machine,
                            ConstantCosts(prefill_token_s=1e-3), None)  # fmt: skip
    end(controller, prompt=128, output=8)
    views = [RequestView(f"r{number}", 1.1, SLO(tpot_s=0.04), 128, 40) for number in range(5)]
    for view in views[:2]:
        view.phase, view.tokens = "decode", 129
        view.times.add(1.1, 1)
    decision = controller.decide(Observation(1.1, views, list))
    assert not decision.admit and not decision.pause
    assert bool(decision.mirror) is copied


# --- chunks -----------------------------------------------------------------------


def test_a_long_prompt_takes_turns_with_a_strict_stream() -> None:
    strict = SLO(tpot_s=0.02, tbt_s=0.03)
    jobs = [Job(32, 120, slo=strict), Job(900, 4, arrival_s=0.1)]
    engine = FakeEngine("orbitflow", jobs, costs=ConstantCosts(prefill_token_s=2e-4))
    assert_all_served(engine, 2)
    deferring = [not decision.prefill for decision in engine.decisions]
    chunks = {d.chunk_tokens for d in engine.decisions if d.chunk_tokens is not None}
    assert any(deferring) and max(chunks) < MACHINE.max_chunk_tokens, chunks


@pytest.mark.parametrize(
    ("slo", "chunk"),
    [  # Alone a pass takes 11 ms, as 110 tokens do: 144 are worth one.
        (SLO(tpot_s=0.0115), 144),  # 112 fit: a mean is rather made up for
        (SLO(tpot_s=0.0115, tbt_s=0.022), 80),  # 0.95 x 22 ms less a step: a gap cannot be
        (SLO(tpot_s=0.0115, tbt_s=0.012), 64),  # nothing fits
    ],
)
def test_a_gap_is_kept_where_a_small_chunk_can_keep_it(slo: SLO, chunk: int) -> None:
    controller = Controller(find_policy("orbitflow"), MACHINE, ConstantCosts(), None)
    busy = RequestView("busy", 1.0, slo, 128, 400, phase="decode", tokens=329)
    busy.times.add(1.09, 1)
    busy.times.add(1.1, 1)
    prompt = RequestView("prompt", 1.0, SLO(), 400, 40, phase="prefill", tokens=16)
    assert controller.decide(Observation(1.1, [busy, prompt], list)).chunk_tokens == chunk


class DeepCosts(ConstantCosts):
    """Prompt tokens take twice as long behind 200 others."""

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        return super().prefill_s(tokens, context_tokens) * (1 + context_tokens / 200)


@pytest.mark.parametrize(
    ("there", "cached", "phase", "tokens"),
    [  # 0.95 x 81 ms less a step of 11.2 ms are 65 ms.
        (0, 0, "waiting", 128),  # at 0.5 ms a token
        (200, 0, "prefill", 64),  # at 1 ms
        (0, 200, "waiting", 64),
        (100, 0, "prefill", 80),  # at 0.75 ms
    ],
)
def test_a_chunk_behind_a_long_context_is_smaller(
    there: int, cached: int, phase: Phase, tokens: int
) -> None:
    costs = DeepCosts(prefill_token_s=5e-4)
    controller = Controller(find_policy("orbitflow"), MACHINE, costs, None)
    busy = RequestView("busy", 1.0, SLO(tpot_s=0.04, tbt_s=0.081), 128, 40, phase="decode",
                       tokens=129)  # fmt: skip
    busy.times.add(1.1, 1)
    prompt = RequestView("prompt", 1.0, SLO(), 900, 40, phase=phase, tokens=there,
                         cached_tokens=cached)  # fmt: skip
    assert controller.decide(Observation(1.1, [busy, prompt], list)).chunk_tokens == tokens


def test_chunks_leave_room_for_steps_as_they_go_and_streaming_is_what_compute_hides() -> None:
    def chunk_and_budget(slowdown: float) -> tuple[int, int]:
        jobs = [Job(32, 40, slo=SLO(tpot_s=0.03, tbt_s=0.1)), Job(900, 4, arrival_s=0.1)]
        costs = ConstantCosts(prefill_token_s=2e-4, slowdown=slowdown)
        engine = FakeEngine("orbitflow", jobs, costs=costs)
        assert_all_served(engine, 2)
        sizes = [d.chunk_tokens for d in engine.decisions if d.chunk_tokens is not None]
        return min(sizes), engine.controller.budget_pages

    (wide, budget), (narrow, budget_then) = chunk_and_budget(1.0), chunk_and_budget(2.0)
    assert narrow < wide
    assert budget_then == budget > 0


@pytest.mark.parametrize(
    ("tpot_s", "prompts", "pages"),
    [
        (None, False, 63),  # 0.9 of what a step of 14.2 ms hides, at 0.2 ms a page
        (0.09, False, 63),
        # Three of a full arena take 14.024 ms, 4 us a page: 0.7 x 20.14 ms are 74 us more.
        (0.02014, False, 9),
        (0.02, False, 0),
        (0.005, False, 63),  # nobody could keep it, so nobody has to wait for it
        # One of 400 + 100 tokens has ended. Of such, 2.28 decode together: mu is 100 steps of
        # 13.02 ms over 2.28 prompts of 40 ms, 14.3, and steps have 0.935 of all time.
        (0.02155, True, 9),
        (0.02155, False, 63),
    ],
)
def test_streaming_leaves_the_strictest_pace_that_can_be_kept(
    tpot_s: float | None, prompts: bool, pages: int
) -> None:
    controller = Controller(find_policy("orbitflow"), MACHINE, ConstantCosts(), None)
    if prompts:
        one = RequestView("ended", 0.0, SLO(), 400, 100)
        one.times.add(1.0, 100)
        controller.finished(one)
    strictest = [SLO(tpot_s=tpot_s), SLO(tpot_s=0.09), SLO()]
    views = [RequestView(f"r{number}", 1.0, slo, 400, 99) for number, slo in enumerate(strictest)]
    for view in views:
        view.phase, view.tokens = "decode", 400
        view.times.add(1.1, 1)
    controller.decide(Observation(1.1, views, list))
    assert controller.budget_pages == pages
