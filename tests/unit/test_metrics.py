from __future__ import annotations

import math

import pytest

from eval.metrics import (
    Generated,
    Served,
    good,
    good_generated,
    makespan_s,
    metrics,
    paced_gaps_s,
    percentile,
    strict,
    strict_generated,
    tokens_on_time,
    tokens_per_s,
)
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit
TARGETS = SLO(ttft_s=1.0, tpot_s=0.5)


def served(
    *token_s: float,
    asked: int | None = None,
    slo: SLO = TARGETS,
    error: str | None = None,
    generated: Generated | None = None,
    arrival_s: float = 0.0,
) -> Served:
    asked = len(token_s) if asked is None else asked
    return Served("r", 0, arrival_s, asked, slo, token_s, error, generated)


def test_good_needs_both_targets() -> None:
    assert good(served(1.0, 1.5, 2.0))
    assert not good(served(1.1, 1.2, 1.3))
    assert not good(served(0.5, 1.0, 1.6))  # 0.55 s a token


def test_tpot_is_the_mean_so_an_early_token_pays_for_a_late_one() -> None:
    one = served(0.5, 0.6, 1.5)
    assert one.tpot_s == pytest.approx(0.5)
    assert good(one) and metrics([one])["tbt_ok"] == 0.0


def test_a_stall_of_more_than_a_second_is_good_but_not_strict() -> None:
    one = served(0.5, 0.6, 0.7, 1.8)
    assert good(one) and not strict(one)
    assert strict(served(0.5, 1.0, 1.0, 2.0))


def test_a_request_that_failed_or_was_cut_short_is_not_good() -> None:
    failed, cut = served(0.1, 0.2, error="timeout"), served(0.1, 0.2, asked=3)
    assert not good(failed) and not good(cut)
    assert not good_generated(served(asked=3, generated=Generated(0.1, 0.1, 0.1)))
    found = metrics([failed, cut, served(0.1, 0.2)])
    assert found["errors"] == 2
    assert found["good"] == pytest.approx(1 / 3)


def test_the_servers_own_times_count_where_it_gives_them() -> None:
    stalled = served(0.5, 1.0, 1.5, generated=Generated(0.5, 0.4, 1.2))
    assert good(stalled) and strict(stalled)
    assert good_generated(stalled) and not strict_generated(stalled)
    assert not good_generated(served(0.5, 1.0, generated=Generated(1.2, 0.4, 0.4)))
    silent = served(0.5, 1.0)
    assert good_generated(silent) == good(silent) and strict_generated(silent) == strict(silent)
    single = served(0.5, generated=Generated(0.5, None, None))
    assert strict_generated(single)


def test_tokens_are_on_time_from_arrival_and_missing_ones_are_not() -> None:
    late_then_fast = served(1.2, 1.3, 1.4, 2.6)  # due at 1.0, 1.5, 2.0 and 2.5
    assert tokens_on_time(late_then_fast) == 2
    found = metrics([late_then_fast, served(0.5, asked=4)])
    assert found["tokens_on_time"] == pytest.approx(3 / 8)


def test_gaps_count_by_token_and_by_request() -> None:
    found = metrics([served(0.1, 0.6, 1.2, 1.3), served(0.1, 0.2), served(asked=3)])
    # Gaps of 0.5, 0.6 and 0.1 s, one of 0.1 s, and two that never came.
    assert found["gaps_ok"] == pytest.approx(3 / 6)
    assert found["tbt_ok"] == pytest.approx(1 / 3)
    assert found["worst_gap_s"] == pytest.approx(0.6)


def test_a_tbt_target_of_its_own_judges_the_gaps() -> None:
    slo = SLO(ttft_s=1.0, tpot_s=0.5, tbt_s=0.2)
    assert metrics([served(0.1, 0.2, 0.5, slo=slo)])["gaps_ok"] == pytest.approx(1 / 2)


def test_a_client_that_holds_early_tokens_back_bridges_a_stall() -> None:
    pace = 0.95 * 0.5
    one = served(1.0, 1.1, 1.2, 1.9, 5.0)
    assert paced_gaps_s(one) == pytest.approx([pace, pace, pace, 4.0 - 3 * pace])
    found = metrics([one])
    # Raw, the stalls of 0.7 s and 3.1 s are late; paced, only the second one.
    assert found["gaps_ok"] == pytest.approx(2 / 4)
    assert found["gaps_ok_deposited"] == pytest.approx(3 / 4)
    assert metrics([served(1.0, 1.1, 1.2, 1.9)])["tbt_ok_deposited"] == 1.0


def test_without_targets_everything_that_arrives_is_in_time() -> None:
    found = metrics([served(50.0, 90.0, asked=4, slo=SLO())])
    assert found["tokens_on_time"] == pytest.approx(2 / 4)
    assert found["ttft_ok"] == 1.0 and found["tpot_ok"] == 0.0


def test_percentiles_count_requests_that_never_got_a_token() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 95) == 95.0
    assert math.isnan(percentile([], 95))
    found = metrics([served(0.5), served(asked=1)])
    assert found["ttft_p50_s"] == 0.5 and found["ttft_p95_s"] is None


def test_throughput_is_over_the_time_from_the_first_arrival_to_the_last_token() -> None:
    run = [served(1.0, 2.0, arrival_s=2.0), served(1.0, 8.0, asked=5, arrival_s=4.0)]
    assert makespan_s(run) == pytest.approx(10.0)
    assert tokens_per_s(run) == pytest.approx(0.4)
    assert tokens_per_s([served(asked=3)]) == 0.0
