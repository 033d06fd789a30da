from __future__ import annotations

import random

import pytest

from eval.bootstrap import Interval, paired_difference, share_interval

pytestmark = pytest.mark.unit


def outcomes(share: float, n: int, seed: int) -> dict[tuple[int, str], float]:
    chance = random.Random(seed)
    return {(i % 3, f"r{i}"): float(chance.random() < share) for i in range(n)}


def test_the_interval_holds_the_share_and_is_as_wide_as_theory_says() -> None:
    interval = share_interval([1.0] * 60 + [0.0] * 40, [1.0] * 100)
    assert interval.value == pytest.approx(0.6)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * (0.24 / 100) ** 0.5, rel=0.15)
    assert interval.low < 0.6 < interval.high


def test_a_share_of_tokens_weighs_requests_by_their_tokens() -> None:
    assert share_interval([10.0, 0.0], [10.0, 30.0]).value == pytest.approx(0.25)


def test_a_contestant_against_itself_is_a_tie() -> None:
    same = outcomes(0.5, 200, seed=1)
    assert paired_difference(same, same) == Interval(0.0, 0.0, 0.0)
    assert paired_difference(same, same).tie


def test_a_clear_difference_is_no_tie_and_a_small_one_is() -> None:
    base = outcomes(0.5, 300, seed=1)
    clear = paired_difference(outcomes(0.8, 300, seed=2), base)
    assert not clear.tie and clear.value == pytest.approx(0.3, abs=0.1)
    assert paired_difference(outcomes(0.51, 300, seed=3), base).tie


def test_pairing_sees_what_two_intervals_would_not() -> None:
    theirs = outcomes(0.5, 300, seed=1)
    ours = dict(theirs)
    for key in [key for key, value in theirs.items() if not value][:12]:
        ours[key] = 1.0  # 4 points better, on the same requests
    difference = paired_difference(ours, theirs)
    assert difference.value == pytest.approx(0.04)
    assert not difference.tie


def test_what_differs_from_repeat_to_repeat_widens_the_interval() -> None:
    theirs = {(repeat, f"r{i}"): 0.0 for repeat in range(3) for i in range(200)}
    alike = {key: float(int(key[1][1:]) < 10) for key in theirs}  # 5 points better in each
    once = {key: float(key[0] == 0 and int(key[1][1:]) < 30) for key in theirs}  # 15 in one
    assert paired_difference(alike, theirs).value == paired_difference(once, theirs).value
    assert not paired_difference(alike, theirs).tie
    assert paired_difference(once, theirs).tie
    of_one = {key: value for key, value in once.items() if key[0] == 0}
    interval = paired_difference(of_one, theirs)
    width = 2 * 1.96 * (0.15 * 0.85 / 200) ** 0.5
    assert interval.high - interval.low == pytest.approx(width, rel=0.15)


def test_only_requests_that_both_served_are_paired() -> None:
    ours = {(0, "a"): 1.0, (1, "a"): 0.0}
    assert paired_difference(ours, {(0, "a"): 0.0}).value == 1.0
    with pytest.raises(ValueError, match="no request in common"):
        paired_difference(ours, {(2, "a"): 0.0})


def test_the_seed_gives_the_interval() -> None:
    base, other = outcomes(0.5, 100, seed=1), outcomes(0.6, 100, seed=2)
    assert paired_difference(other, base, seed=4) == paired_difference(other, base, seed=4)
