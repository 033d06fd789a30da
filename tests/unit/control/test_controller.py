"""The controller in a closed loop: everybody is served, within the bounds it was given."""

from __future__ import annotations

import pytest
from closed_loop import LAYERS, PAGE, ClosedLoop, Wanted, draw

from orbitflow_sglang.control.policies import RULES
from orbitflow_sglang.control.view import NOTHING, Observation, RequestView
from orbitflow_sglang.planner.problem import PlanningProblem
from orbitflow_sglang.planner.worker import Answer
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

TIGHT, LOOSE = SLO(1.0, 0.02), SLO(4.0, 0.1)
PACED = SLO(2.0, 0.04, deposit=True)
SLOS = (SLO(), TIGHT, LOOSE, PACED)
POLICIES = (
    "orbitflow", "swap", "swap+order", "time-sliced-swap", "paper", "queue", "queue+order",
    "retract+order", *(f"orbitflow:no-{rule}" for rule in RULES),
)  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_everybody_is_served_and_whoever_is_paused_comes_back(policy: str, seed: int) -> None:
    wanted = draw(seed, 60, SLOS)
    loop = ClosedLoop(policy, wanted)
    loop.run()
    assert sorted(view.generated for view in loop.finished) == sorted(w.output for w in wanted)
    assert not loop.paused
    assert loop.most_running <= loop.max_running
    assert loop.most_paused <= loop.max_paused
    pauses = sum(len(decision.pause) for decision in loop.decisions)
    resumes = sum(len(decision.resume) for decision in loop.decisions)
    assert pauses == resumes


def test_memory_was_short_in_these_tests() -> None:
    loop = ClosedLoop("orbitflow", draw(0, 60, SLOS))
    loop.run()
    assert loop.controller.counts["pauses"] > 0
    assert any(decision.placement for decision in loop.decisions)


def test_a_request_larger_than_the_arena_is_served() -> None:
    loop = ClosedLoop("orbitflow", [Wanted(0.0, 3000, 20), Wanted(0.1, 100, 20)])
    loop.run()
    assert len(loop.finished) == 2
    assert loop.controller.budget_pages < 3000 // PAGE * LAYERS


def test_while_all_fits_and_nobody_waits_it_says_nothing() -> None:
    loop = ClosedLoop("orbitflow", [])
    view = RequestView("a", 0.0, SLO(), 100, 100, phase="decode", tokens=100)
    observation = Observation(1.0, [view], lambda: pytest.fail("units were asked for"))
    assert loop.controller.decide(observation) is NOTHING


def test_prefill_alternates_with_decode_steps_where_somebody_has_an_slo() -> None:
    loop = ClosedLoop("orbitflow", draw(3, 60, (TIGHT, LOOSE)))
    loop.run()
    assert loop.prefills_in_a_row == 1
    chunks = [d.chunk_tokens for d in loop.decisions if d.chunk_tokens is not None]
    assert chunks and all(tokens % PAGE == 0 and tokens >= 64 for tokens in chunks)


def test_what_is_streamed_stays_within_the_budget_unless_one_alone_needs_more() -> None:
    loop = ClosedLoop("orbitflow", draw(0, 60, SLOS))
    step = loop._decode

    def checked() -> None:
        if len(loop.decoding) > 1:
            # A step may lag behind growth by a page for each layer of those that decode.
            slack = 2 * LAYERS * len(loop.live)
            assert loop.controller.streamed_pages <= loop.controller.budget_pages + slack
        step()

    loop._decode = checked  # type: ignore[method-assign]
    loop.run()


def test_no_strict_request_is_paused_for_a_looser_one() -> None:
    strict, loose = SLO(2.0, 0.03, deposit=True), SLO(2.0, 0.2, deposit=True)
    loop = ClosedLoop("orbitflow", draw(5, 80, (strict, loose)))
    loop.run()
    pace = {view.rid: view.slo.pace_s or 0.0 for view in loop.finished}
    made_way = [
        (reason.split()[1].rstrip(":"), reason.split()[2])
        for decision in loop.decisions
        for reason in decision.reasons
        if reason.endswith("s") and " is urgent" in reason
    ]
    assert made_way, "nobody had to make way"
    assert all(pace[victim] >= pace[urgent] for victim, urgent in made_way)


class SilentWorker:
    """A planner that never answers."""

    busy = True

    def __init__(self) -> None:
        self.asked: list[PlanningProblem] = []

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        self.asked.append(problem)

    def poll(self) -> Answer | None:
        return None


def test_without_answers_it_goes_on_with_the_last_plan_or_a_greedy_one() -> None:
    worker = SilentWorker()
    loop = ClosedLoop("orbitflow", draw(0, 60, SLOS), worker=worker)
    loop.run()
    assert worker.asked
    sources = loop.controller.planning.sources
    assert sources["planned"] == 0
    assert sources["greedy"] + sources["kept"] > 0
    assert len(loop.finished) == 60
