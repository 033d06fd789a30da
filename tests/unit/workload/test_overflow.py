"""How far a trace outgrows memory, by hand."""

from __future__ import annotations

import pytest

from eval.sim.scenario import Scenario, run
from eval.workload.overflow import arena_for, live_tokens, overflow
from eval.workload.requests import TraceRequest

pytestmark = pytest.mark.unit
TRACE = [TraceRequest(0.0, 10, 3, "a"), TraceRequest(0.02, 5, 2, "b")]


def test_live_tokens_grow_by_one_a_step_until_the_answer_ends() -> None:
    # Steps of 10 ms: the second comes at step 2 and has 5 and 6 tokens.
    assert live_tokens(TRACE, 0.010).tolist() == [10, 11, 12 + 5, 6]


def test_overflow_is_what_lies_above_the_arena() -> None:
    # Above 12 tokens lie 5, at one of 4 steps.
    assert overflow(TRACE, 0.010, 12) == pytest.approx(5 / (12 * 4))
    assert overflow(TRACE, 0.010, 17) == 0.0


@pytest.mark.parametrize("level", [0.0, 0.05, 0.35, 0.8])
def test_the_smallest_arena_of_a_level(level: float) -> None:
    tokens = arena_for(TRACE, 0.010, level)
    assert overflow(TRACE, 0.010, tokens) <= level
    assert tokens == 1 or overflow(TRACE, 0.010, tokens - 1) > level


def test_a_level_sets_the_arena_of_a_run() -> None:
    base = Scenario("a5000-8b", "orbitflow", mix="SS", rate=4.0, requests=12)
    tight, wide = (run(Scenario(**{**base.as_dict(), "overflow": level})) for level in ("hi", "vl"))
    assert tight.simulation.hardware.arena_tokens < wide.simulation.hardware.arena_tokens
    assert tight.as_dict()["scenario"]["overflow"] == "hi"
    for wrong in ({"overflow": "up"}, {"overflow": "hi", "load": 1.0, "rate": None}):
        with pytest.raises(ValueError, match="overflow"):
            run(Scenario(**{**base.as_dict(), **wrong}))
