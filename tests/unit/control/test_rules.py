"""The rules one by one, on cases small enough to be checked by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.rules import Candidacy, Candidate, Chunk

pytestmark = pytest.mark.unit

STEP = 0.02
LOOSE = Candidate("c", math.inf, 0.0, False, False, 0.0, 0.0, 100)


def candidate(rid: str, **values: Any) -> Candidate:
    base = Candidate(rid, 0.04, 2.0, False, True, 0.1, 0.0, 100)
    return base._replace(**values)


# --- streaming ------------------------------------------------------------------


def test_nine_tenths_of_what_compute_hides_are_streamed() -> None:
    assert rules.streaming_budget(100.0) == 90
    assert rules.streaming_budget(100.0, aside=True) == 0


def test_no_more_is_streamed_than_leaves_the_strictest_pace() -> None:
    assert rules.streaming_budget(100.0, in_pace=40.5) == 40
    assert rules.streaming_budget(100.0, in_pace=95.0) == 90
    # 0.7 x 60 ms - 30 ms leave 12 ms: 60 pages of 0.1 ms, each written and read.
    alone, prompts_a_quarter = math.inf, 3.0
    assert rules.pages_in_pace(0.060, alone, 0.030, 0.0001) == pytest.approx(60.0)
    # With a quarter of all work for prompts, the same of 80 ms.
    assert rules.pages_in_pace(0.080, prompts_a_quarter, 0.030, 0.0001) == pytest.approx(60.0)
    assert rules.pages_in_pace(0.060, prompts_a_quarter, 0.032, 0.0001) == 0.0
    assert rules.pages_in_pace(0.040, alone, 0.030, 0.0001) == 0.0
    assert rules.pages_in_pace(0.060, 0.0, 0.030, 0.0001) == 0.0
    assert rules.pages_in_pace(math.inf, alone, 0.030, 0.0001) == math.inf
    assert rules.pages_in_pace(0.060, alone, 0.030, 0.0) == math.inf


def test_it_stands_aside_for_a_slow_link_and_for_long_prefills() -> None:
    assert rules.stands_aside(rho=0.2, mu=3.0) == (False, False)
    assert rules.stands_aside(rho=0.02, mu=3.0) == (True, False)
    assert rules.stands_aside(rho=0.2, mu=1.5) == (True, False)
    assert rules.stands_aside(rho=0.2, mu=0.5) == (True, True)


# --- pausing --------------------------------------------------------------------


def test_who_is_furthest_ahead_leaves_for_an_urgent_request() -> None:
    near, far = candidate("near", deposit_s=1.0), candidate("far", deposit_s=3.0)
    assert rules.ahead([near, far], STEP, pace_s=0.04, slack_s=0.1) == far


def test_nobody_leaves_who_would_not_stay_ahead() -> None:
    # It takes twice its reload of 0.1 s and 6 steps of 0.02 s: 0.32 s, and the slack on top.
    assert rules.ahead([candidate("a", deposit_s=0.32)], STEP, 0.04, slack_s=0.0) is None
    assert rules.ahead([candidate("a", deposit_s=0.33)], STEP, 0.04, slack_s=0.0) is not None
    assert rules.ahead([candidate("a", deposit_s=0.33)], STEP, 0.04, slack_s=0.1) is None
    assert rules.ahead([candidate("a", paced=False)], STEP, 0.04, slack_s=0.0) is None


def test_who_is_late_already_leaves_first() -> None:
    late, far = candidate("late", late=True, deposit_s=-1.0), candidate("far", deposit_s=9.0)
    assert rules.ahead([far, late], STEP, pace_s=0.04, slack_s=0.0) == late


@given(
    paces=st.lists(st.floats(0.001, 10), min_size=1, max_size=6),
    late=st.booleans(),
    pace=st.floats(0.001, 10),
)
def test_a_strict_request_is_never_the_victim_of_a_loose_one(
    paces: list[float], late: bool, pace: float
) -> None:
    able = [candidate(str(i), pace_s=p, late=late, deposit_s=99.0) for i, p in enumerate(paces)]
    chosen = rules.ahead(able, STEP, pace, slack_s=0.0)
    assert chosen is None or chosen.pace_s >= pace
    assert (chosen is None) == all(p < pace for p in paces)


def test_on_overflow_each_policy_has_its_victim() -> None:
    old = candidate("old", arrival_s=1.0, tokens=900, deposit_s=1.0)
    new = candidate("new", arrival_s=5.0, tokens=100, deposit_s=0.5)
    assert rules.overflowing([old, new], "newest") == new
    assert rules.overflowing([old, new], "longest") == old
    assert rules.overflowing([old, new], "ahead") == old
    without_slo = LOOSE._replace(arrival_s=0.0)
    assert rules.overflowing([old, without_slo], "ahead") == without_slo
    assert rules.overflowing([old, new._replace(late=True)], "ahead") == new._replace(late=True)
    assert rules.overflowing([], "ahead") is None


# --- ordering -------------------------------------------------------------------


def wanting(rid: str, **values: Any) -> Candidacy:
    base = Candidacy(rid, 10.0, 10.0, 1.0, 8, False, False)
    return base._replace(**values)


def ids(ordered: list[Candidacy]) -> list[str]:
    return [wants.rid for wants in ordered]


def test_least_slack_first_and_the_late_last() -> None:
    some = [
        wanting("late", slack_s=-0.1),
        wanting("calm", slack_s=5.0),
        wanting("urgent", slack_s=0.2),
        wanting("no deadline", slack_s=math.inf),
    ]
    assert ids(rules.by_slack(some, 0)) == ["urgent", "calm", "no deadline", "late"]


def test_an_interrupted_client_comes_before_newcomers() -> None:
    some = [wanting("new", slack_s=0.1), wanting("stalled", paused=True, owed=True, slack_s=0.0)]
    assert ids(rules.by_slack(some, 0)) == ["stalled", "new"]


def test_a_share_of_the_places_goes_to_who_has_waited_longest() -> None:
    some = [wanting("new", slack_s=0.1), wanting("late", slack_s=-9.0, since_s=1.0)]
    for grants in range(3 * rules.AGEING_SHARE):
        first = ids(rules.by_slack(some, grants))[0]
        last_of_share = grants % rules.AGEING_SHARE == rules.AGEING_SHARE - 1
        assert first == ("late" if last_of_share else "new")


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 50), st.booleans()), max_size=12))
def test_ordering_loses_nobody(rows: list[tuple[float, float, bool]]) -> None:
    some = [
        wanting(str(i), slack_s=slack, since_s=since, paused=paused)
        for i, (slack, since, paused) in enumerate(rows)
    ]
    for ordered in (rules.by_slack(some, 7), rules.by_arrival(some)):
        assert sorted(ids(ordered)) == sorted(ids(some))


def test_by_arrival_who_was_served_first_goes_on_first() -> None:
    some = [wanting("b", arrival_s=2.0), wanting("a", arrival_s=1.0)]
    some.append(wanting("paused", arrival_s=3.0, paused=True))
    assert ids(rules.by_arrival(some)) == ["paused", "a", "b"]


# --- admission ------------------------------------------------------------------


def test_a_paced_request_is_committed_for_its_share_of_the_time() -> None:
    assert rules.committed_share(0.02, 0.04, paced=True) == pytest.approx(0.75)  # 1.5 x 0.5
    assert rules.committed_share(0.02, 0.01, paced=True) == 1.0
    assert rules.committed_share(0.02, 0.04, paced=False) == 1.0


@pytest.mark.parametrize(
    ("waiting", "together"),
    [  # A token may take 60 ms; alone it takes 20, beside another 2 more, a prompt's share is 6.
        (50, 5.25),  # 20 + 4.25 x 2 + 5.25 x 6 = 60
        (5, 6.0),  # 20 + 5 x 2 + 5 x 6 = 60
        (2, 15.0),  # 20 + 14 x 2 + 2 x 6 = 60
        (0, 21.0),
    ],
)
def test_so_many_keep_their_pace_beside_the_prompts_of_who_comes_next(
    waiting: int, together: float
) -> None:
    assert rules.sustained(0.060, 0.020, 0.002, 0.006, waiting) == pytest.approx(together)


def test_one_always_decodes_and_without_a_pace_as_many_as_come() -> None:
    assert rules.sustained(0.010, 0.020, 0.002, 0.006, 9) == 1.0
    assert rules.sustained(math.inf, 0.020, 0.002, 0.006, 9) == math.inf
    assert rules.sustained(0.060, 0.020, 0.0, 0.0, 9) == math.inf


# --- chunks ---------------------------------------------------------------------


def chunk(gap_s: float, made_late: int = 0, waiting: int = 1, least: int = 64) -> Chunk:
    return rules.chunk(gap_s, STEP, 0.001, 16, least, 2048, made_late, waiting)


def test_a_chunk_and_a_step_fit_the_tightest_gap() -> None:
    # 0.95 x 0.3 s - 0.02 s leave 0.265 s: 265 tokens, 256 in whole pages.
    assert chunk(0.3) == Chunk(256, 1)
    assert chunk(99.0) == Chunk(2048, 1)
    assert chunk(math.inf) == Chunk(2048, 1)


def test_where_none_fits_the_smallest_comes_every_few_steps() -> None:
    assert chunk(0.05) == Chunk(64, 1)
    assert chunk(0.05, made_late=3, waiting=1) == Chunk(64, 4)
    assert chunk(0.05, made_late=3, waiting=6) == Chunk(64, 2)
    assert chunk(-1.0, made_late=50, waiting=1) == Chunk(64, 8)
    assert chunk(0.3, made_late=1, least=288) == Chunk(288, 2)  # 256 would fit


def test_the_smallest_chunk_is_worth_a_forward_pass() -> None:
    # A pass takes as long as 100 tokens: a quarter more, in whole pages.
    assert rules.least_chunk(0.1, 0.001, 16, 2048) == 128
    assert rules.least_chunk(0.1, 0.001, 100, 2048) == 200
    assert rules.least_chunk(0.01, 0.001, 16, 2048) == 64
    assert rules.least_chunk(0.01, 0.001, 256, 2048) == 256
    assert rules.least_chunk(0.1, 0.001, 16, 96) == 96
    assert rules.least_chunk(0.1, 0.0, 16, 2048) == 64


def late_chunk(spare_s: float, gap_s: float = 1.0) -> Chunk:
    # A forward pass takes 0.1 s at least, a token 1 ms.
    return rules.sustained_chunk(spare_s, gap_s, 0.1, 0.001, 16, 128, 2048)


def test_prompts_that_are_late_take_what_others_can_give_for_good() -> None:
    assert late_chunk(0.3) == Chunk(288, 1)  # of 300 tokens, whole pages
    assert late_chunk(0.3, gap_s=0.2) == Chunk(192, 1)
    # 128 tokens take 0.128 s, a third of which is spared a step.
    assert late_chunk(0.05) == Chunk(128, 3)
    assert late_chunk(-0.1) == Chunk(128, rules.MAX_STEPS_BETWEEN_CHUNKS)
    assert late_chunk(1e-4) == Chunk(128, rules.MAX_STEPS_BETWEEN_CHUNKS)
    assert late_chunk(math.inf, math.inf) == Chunk(2048, 1)


def prompt(rid: str, due_s: float, prefill_s: float) -> rules.Prompt:
    return rules.Prompt(rid, due_s, prefill_s / rules.PREFILL_SLOWDOWN)


def test_as_few_prompts_as_can_be_are_late_in_line() -> None:
    line = [prompt("a", 2.0, 1.0), prompt("b", 3.0, 2.5), prompt("c", 3.5, 1.0)]
    # One behind the other b would end at 3.5; without it c ends at 2.0.
    assert rules.late_in_line(line, 0.0) == {"b"}
    assert rules.late_in_line(line[::-1], 0.0) == {"b"}
    assert rules.late_in_line(line, 1.1) == {"a", "b"}
    assert rules.late_in_line([], 1.0) == set()


LINES = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 5)), max_size=7)


@given(LINES, st.floats(0, 3))
def test_nobody_else_is_late_and_no_choice_makes_fewer_late(
    line: list[tuple[float, float]], busy_s: float
) -> None:
    prompts = [prompt(str(number), due, takes) for number, (due, takes) in enumerate(line)]

    def punctual(chosen: tuple[rules.Prompt, ...], rounding_s: float) -> bool:
        end = busy_s
        for one in sorted(chosen, key=lambda p: p.due_s):
            end += rules.PREFILL_SLOWDOWN * one.prefill_s
            if end > one.due_s + rounding_s:
                return False
        return True

    late = rules.late_in_line(prompts, busy_s)
    kept = tuple(one for one in prompts if one.rid not in late)
    assert punctual(kept, 1e-9)
    more = itertools.combinations(prompts, len(kept) + 1)
    assert not any(punctual(chosen, -1e-9) for chosen in more)


@given(
    gap=st.floats(-5, 5), floor=st.floats(0, 0.5), late=st.integers(0, 99),
    waiting=st.integers(0, 99), page=st.sampled_from([1, 16, 48, 64, 128]),
)  # fmt: skip
def test_a_chunk_is_whole_pages_and_comes_within_eight_steps(
    gap: float, floor: float, late: int, waiting: int, page: int
) -> None:
    most = 2048 // page * page
    least = rules.least_chunk(floor, 0.001, page, most)
    found = rules.chunk(gap, STEP, 0.001, page, least, most, late, waiting)
    assert found.tokens % page == 0
    assert max(page, 64, floor / 0.001) <= found.tokens <= most
    assert 1 <= found.every <= 8
