"""Whom of a long line a step looks at: few, and in the end everybody."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
from fake_engine import MACHINE, ConstantCosts, FakeEngine, Job

from orbitflow_sglang.control.controller import Controller
from orbitflow_sglang.control.line import KEPT, NEXT, Line
from orbitflow_sglang.control.policies import find_policy
from orbitflow_sglang.control.view import Observation, RequestView
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

COUNT = 1500


def waiting(count: int) -> list[RequestView]:
    """In another order than they came, and who came first last of all."""
    views = [RequestView(f"r{i}", i / 100, SLO(ttft_s=60.0), 100, 10) for i in range(count)]
    oldest, *others = views
    random.Random(count).shuffle(others)
    return [*others, oldest]


def settled(line: Line, views: list[RequestView]) -> list[RequestView]:
    """Those that are first in ``line`` once nobody is new to it."""
    line.looked_at(views)
    first = views[500 : 500 + KEPT]
    line.ordered([view.rid for view in [*first, *views[:50]]])
    return first


def test_a_short_line_is_looked_at_as_a_whole() -> None:
    views = waiting(KEPT + NEXT)
    line = Line()
    for _ in range(3):
        assert line.looked_at(views) == views
        line.ordered([])


def test_of_a_long_line_few_are_looked_at_and_in_turns_everybody() -> None:
    line, views = Line(), waiting(COUNT)
    first = settled(line, views)
    oldest = min(views, key=lambda view: view.arrival_s)
    assert oldest not in first
    seen: set[str] = set()
    for _ in range(math.ceil(COUNT / NEXT)):
        found = line.looked_at(views)
        assert len(found) <= KEPT + NEXT + 1
        assert found == [view for view in views if view in found], "not as they stand in the line"
        assert {*first, oldest} <= set(found)
        seen.update(view.rid for view in found)
        line.ordered([view.rid for view in first])
    assert len(seen) == COUNT


def test_who_is_new_is_looked_at_at_once_however_many() -> None:
    line, views = Line(), waiting(COUNT)
    settled(line, views)
    new = [RequestView(f"new{i}", COUNT + i, SLO(), 100, 10) for i in range(3 * NEXT)]
    views += new
    assert set(new) <= set(line.looked_at(views))
    assert not set(new) <= set(line.looked_at(views)), "not new any more, nor first"


@dataclass
class CountingCosts(ConstantCosts):
    prompts: int = 0

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        self.prompts += 1
        return super().prefill_s(tokens, context_tokens)


def prompts_weighed(count: int, prefill_token_s: float = 1e-2, places: int = 12) -> int:
    """In a decision with one decoding and ``count`` in line."""
    costs = CountingCosts(prefill_token_s=prefill_token_s)
    machine = replace(MACHINE, max_running=places)
    controller = Controller(find_policy("orbitflow"), machine, costs, None)
    ended = RequestView("ended", 0.0, SLO(), 100, 10)
    ended.times.add(1.0, 10)
    controller.finished(ended)
    running = RequestView("running", 0.0, SLO(), 900, 10, phase="decode", tokens=900)
    running.times.add(1.0, 1)
    views = [running, *waiting(count)]
    for _ in range(2):  # at first everybody is new
        costs.prompts = 0
        decision = controller.decide(Observation(20.0, views, list))
    assert decision.admit is not None and len(decision.admit) <= places - 1
    return costs.prompts


@pytest.mark.parametrize("mu", ["prompts hold each other up", "memory holds them up"])
def test_what_a_decision_takes_does_not_grow_with_the_line(mu: str) -> None:
    prefill_token_s = 1e-2 if mu.startswith("prompts") else 1e-6
    for count in (COUNT, 8 * COUNT):
        assert KEPT < prompts_weighed(count, prefill_token_s) < 3 * (KEPT + NEXT)


def test_while_all_places_are_taken_nobody_in_line_is_weighed() -> None:
    assert prompts_weighed(COUNT, places=1) == prompts_weighed(1, places=1) < 5


def test_the_most_urgent_of_a_long_line_is_soon_first() -> None:
    views = waiting(COUNT)
    controller = Controller(find_policy("orbitflow"), MACHINE, ConstantCosts(), None)
    running = RequestView("running", 0.0, SLO(), 900, 10, phase="decode", tokens=900)
    running.times.add(1.0, 1)

    def first_in_line(now: float) -> str:
        decision = controller.decide(Observation(now, [running, *views], list))
        assert decision.order is not None
        return decision.order[0]

    first_in_line(20.0)
    views[700].slo = SLO(ttft_s=21.0 - views[700].arrival_s)  # unlike others: nobody was told
    steps = math.ceil(COUNT / NEXT)
    found = [first_in_line(20.0 + step / 1000) for step in range(steps)]
    assert found[-1] == views[700].rid != found[0]


@pytest.mark.parametrize("policy", ["orbitflow", "time-sliced-swap", "swap+order", "retract+order"])
def test_everybody_in_a_long_line_is_served(policy: str) -> None:
    chance = random.Random(1)
    slos = (SLO(), SLO(ttft_s=0.5, tpot_s=0.03), SLO(ttft_s=2.0, tpot_s=0.1, deposit=True))
    jobs = [
        Job(chance.randint(10, 60), chance.randint(1, 6), slo=chance.choice(slos))
        for _ in range(2 * (KEPT + NEXT))
    ]
    engine = FakeEngine(policy, jobs, replace(MACHINE, max_running=64))
    engine.run()
    assert len(engine.finished) == len(jobs)
