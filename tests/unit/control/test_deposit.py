"""When tokens may leave, and what their times come to."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbitflow_sglang.control.deposit import Attainment, Pacer, TokenTimes
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit

seconds = st.floats(1e-4, 1e3)
targets = st.none() | seconds
events = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=30)


@st.composite
def slos(draw: st.DrawFn) -> SLO:
    return SLO(draw(targets), draw(targets), draw(targets))


# --- pacing -------------------------------------------------------------------


def test_the_first_token_leaves_at_once_and_starts_the_clock() -> None:
    pacer = Pacer(SLO(tpot_s=0.1))
    assert pacer.due_s(1) == -math.inf
    assert pacer.due_s(2) == math.inf
    assert pacer.deliverable(5, 3.0) == 1
    pacer.delivered(3.0)
    pacer.delivered(9.0)
    assert pacer.due_s(2) == pytest.approx(3.095)
    assert pacer.due_s(3) == pytest.approx(3.19)


def test_without_a_pace_nothing_is_held() -> None:
    pacer = Pacer(SLO(ttft_s=1.0, deposit=True))
    assert pacer.deliverable(7, 0.0) == 7
    pacer.delivered(0.0)
    assert pacer.due_s(1000) == -math.inf


@given(seconds, st.floats(0, 1e6), st.integers(1, 100_000))
def test_a_token_is_deliverable_exactly_from_its_due_time_on(
    pace_s: float, first_s: float, token: int
) -> None:
    pacer = Pacer(SLO(tpot_s=pace_s))
    pacer.delivered(first_s)
    due_s = max(first_s, pacer.due_s(token))
    assert pacer.deliverable(token, due_s) == token
    before_s = math.nextafter(due_s, -math.inf)
    if token > 1 and before_s >= pacer.due_s(token - 1):
        assert pacer.deliverable(token, before_s) == token - 1


@given(slos(), st.lists(st.tuples(st.floats(0, 5), st.integers(1, 3)), min_size=1, max_size=30))
def test_no_token_leaves_early_or_later_than_it_must(
    slo: SLO, arrivals: list[tuple[float, int]]
) -> None:
    """A simulated stream: at each arrival, and when the next is due, what may leave does."""
    pacer = Pacer(slo)
    now_s, generated, left_s = 0.0, 0, list[float]()
    came_s = list[float]()
    for wait_s, tokens in [*arrivals, (math.inf, 0)]:
        arrival_s = now_s + wait_s
        while len(left_s) < generated and (due_s := pacer.due_s(len(left_s) + 1)) < arrival_s:
            now_s = max(now_s, due_s)
            count = pacer.deliverable(generated, now_s) - len(left_s)
            assert count > 0
            pacer.delivered(now_s)
            left_s += [now_s] * count
        now_s, generated = arrival_s, generated + tokens
        came_s += [arrival_s] * tokens
    assert len(left_s) == generated
    for index, (came, left) in enumerate(zip(came_s, left_s, strict=True)):
        assert left == max(came, left_s[0] + slo.release_s(index + 1))


# --- times --------------------------------------------------------------------


def test_times_of_three_events() -> None:
    times = TokenTimes(10.0, SLO(ttft_s=0.4, tpot_s=0.2, tbt_s=0.5))
    for now_s, tokens in ((10.5, 1), (10.6, 2), (12.0, 1)):
        times.add(now_s, tokens)
    assert times.ttft_s == 0.5
    assert times.tpot_s == pytest.approx(0.5)
    assert times.max_tbt_s == pytest.approx(1.4)
    assert times.attainment == Attainment(ttft=False, tpot=False, tbt=False, no_stall=False)
    assert times.violations == 3
    assert times.deposit_tokens == pytest.approx(4 - (1 + 1.5 / 0.2))
    assert set(times.report()) == {"ttft_s", "tpot_s", "max_tbt_s", "violations"}


def test_a_single_token_has_neither_tpot_nor_gap() -> None:
    times = TokenTimes(0.0, SLO(1.0, 1e-9, 1e-9))
    times.add(0.5, 1)
    assert times.report() == {"ttft_s": 0.5, "tpot_s": None, "max_tbt_s": None, "violations": 0}
    assert times.attainment.strict


def test_a_request_without_tokens_has_missed_its_ttft_if_it_has_one() -> None:
    assert TokenTimes(0.0, SLO(ttft_s=1.0)).violations == 1
    assert TokenTimes(0.0, SLO(tpot_s=1.0)).violations == 0


def test_tokens_of_one_event_have_no_gap() -> None:
    times = TokenTimes(0.0, SLO(tbt_s=0.1))
    times.add(1.0, 8)
    assert (times.max_tbt_s, times.tpot_s, times.violations) == (0.0, 0.0, 0)


def test_good_needs_ttft_and_tpot_and_strict_no_stall_besides() -> None:
    slo = SLO(1.0, 0.1, 0.2)
    assert Attainment.of(slo, 0.9, 0.1, 0.3) == Attainment(True, True, False, True)
    assert Attainment.of(slo, 0.9, 0.1, 0.3).strict
    stalled = Attainment.of(slo, 0.9, 0.1, 1.1)
    assert stalled.good and not stalled.strict
    assert not Attainment.of(slo, 1.1, 0.1, 0.1).good
    assert not Attainment.of(slo, 0.9, 0.11, 0.1).good


@given(slos(), events)
def test_times_are_what_a_list_of_all_tokens_says(
    slo: SLO, given_s: list[tuple[float, int]]
) -> None:
    times = TokenTimes(1.0, slo)
    now_s, all_s = 1.0, list[float]()
    for wait_s, tokens in given_s:
        now_s += wait_s
        times.add(now_s, tokens)
        all_s += [now_s] * tokens
    gaps = [after - before for before, after in itertools.pairwise(all_s)]
    assert times.tokens == len(all_s)
    assert times.ttft_s == (all_s[0] - 1.0 if all_s else None)
    assert times.max_tbt_s == (max(gaps) if gaps else None)
    assert times.tpot_s == ((all_s[-1] - all_s[0]) / len(gaps) if gaps else None)
    late = sum(gap > slo.tbt_s for gap in gaps) if slo.tbt_s is not None else 0
    met = times.attainment
    assert met.tbt == (late == 0)
    assert times.violations == late + (not met.ttft) + (not met.tpot)
