from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from eval.live.workload import Mix, draw, prompts
from eval.workload.requests import Targets, TraceRequest, at_once, at_rate, with_slo
from orbitflow_sglang.slo import SLO, request_slo

pytestmark = pytest.mark.unit


def gaps(trace: list[TraceRequest]) -> list[float]:
    return [later.arrival_s - earlier.arrival_s for earlier, later in pairwise(trace)]


def test_the_seed_gives_the_trace_and_its_prompts() -> None:
    trace = draw(Mix(), 50, seed=3)
    assert trace == draw(Mix(), 50, seed=3) != draw(Mix(), 50, seed=4)
    assert prompts(trace, seed=3) == prompts(trace, seed=3) != prompts(trace, seed=4)
    assert [len(prompt) for prompt in prompts(trace, 3)] == [one.input_tokens for one in trace]
    assert len({one.rid for one in trace}) == 50


def test_lengths_come_from_all_four_ranges() -> None:
    mix = Mix()
    trace = draw(mix, 400, seed=0)
    kinds = {(one.input_tokens <= 256, one.output_tokens <= 96) for one in trace}
    assert len(kinds) == 4
    assert max(one.input_tokens + one.output_tokens for one in trace) <= mix.longest
    assert statistics.mean(one.input_tokens for one in trace) == pytest.approx(mix.mean_input, 0.1)
    outputs = statistics.mean(one.output_tokens for one in trace)
    assert outputs == pytest.approx(mix.mean_output, 0.1)


def test_a_trace_offers_exactly_the_rate_asked_for_with_its_bursts_kept() -> None:
    trace = draw(Mix(), 200, seed=0)
    fast = at_rate(trace, 2.5)
    assert fast[0].arrival_s == 0.0
    assert fast[-1].arrival_s == pytest.approx(199 / 2.5)
    assert at_rate(fast, 1.0)[-1].arrival_s == pytest.approx(199)
    assert gaps(fast) == pytest.approx([gap / 2.5 for gap in gaps(trace)])
    with pytest.raises(ValueError, match="above 0"):
        at_rate(trace, 0.0)


def test_gaps_are_as_bursty_as_asked() -> None:
    for cv in (0.0, 1.0, 2.0):
        found = gaps(draw(Mix(cv=cv), 20_000, seed=1))
        assert statistics.pstdev(found) / statistics.mean(found) == pytest.approx(cv, rel=0.2)


def test_one_request_or_none_can_be_scaled() -> None:
    assert at_rate(draw(Mix(), 1, seed=0), 3.0)[0].arrival_s == 0.0
    assert draw(Mix(), 0, seed=0) == []
    assert all(one.arrival_s == 0 for one in at_once(draw(Mix(), 9, seed=0)))


def test_a_long_prompt_has_a_longer_ttft_target() -> None:
    targets = Targets(ttft_s=2.0, tpot_s=0.03, prefill_s=0.1, prefill_s_per_token=0.001)
    assert targets.of(100) == SLO(2.0, 0.03)
    assert targets.of(1000).ttft_s == pytest.approx(5 * 1.1)


def test_a_server_reads_the_targets_that_the_client_judges_by() -> None:
    (one,) = with_slo([TraceRequest(0.0, 10, 10, "r")], Targets(ttft_s=2.0, tpot_s=0.03).of)
    assert request_slo(one.custom_params, SLO()) == one.slo
    paced = TraceRequest(0.0, 10, 10, "r", SLO(2.0, 0.03, deposit=True))
    assert request_slo(paced.custom_params, SLO()) == paced.slo
    assert TraceRequest(0.0, 10, 10, "r").custom_params == {}


def test_a_mix_without_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="low <= high"):
        Mix(short_input=(9, 3))
    with pytest.raises(ValueError, match="cv"):
        Mix(cv=-1.0)
