from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.client import Generation
from eval.identity import (
    Comparison,
    assert_identical,
    compare,
    mixed_requests,
    write_summary,
)

pytestmark = pytest.mark.unit


def generation(
    ids: tuple[int, ...] = (7, 8, 9),
    logprobs: tuple[float, ...] = (-1.0, -2.0, -3.0),
    gaps: tuple[float, ...] = (0.5, 0.5, 0.5),
    rid: str = "r",
    finish: str = "length",
) -> Generation:
    return Generation(rid, ids, logprobs, gaps, finish)


def test_equal_generations_are_identical() -> None:
    result = compare([generation()], [generation()])
    assert result == Comparison(requests=1, tokens=3)
    assert result.ok


def test_rounding_within_the_tolerance_is_identical_and_its_size_is_kept() -> None:
    result = compare([generation()], [generation(logprobs=(-1.0, -2.00004, -3.00001))])
    assert result.ok
    assert result.max_drift == pytest.approx(4e-5)


@pytest.mark.parametrize("other", [-2.001, float("nan"), float("-inf")])
def test_an_equal_token_with_another_logprob_fails(other: float) -> None:
    result = compare([generation()], [generation(logprobs=(-1.0, other, -3.0))])
    assert not result.ok
    assert "logprob of token 1" in result.failures[0]
    assert result.tokens == 1


def test_a_differing_token_with_a_wide_gap_fails() -> None:
    result = compare([generation()], [generation(ids=(7, 5, 9))])
    assert not result.ok
    assert "token 1 is 5 instead of 8" in result.failures[0]
    with pytest.raises(AssertionError, match="token 1 is 5 instead of 8"):
        assert_identical([generation()], [generation(ids=(7, 5, 9))])


def test_a_differing_token_where_only_the_candidates_gap_is_narrow_fails() -> None:
    assert not compare([generation()], [generation(ids=(7, 5, 9), gaps=(0.5, 1e-6, 0.5))]).ok


def test_a_tie_is_counted_and_ends_the_comparison_of_that_request() -> None:
    reference = generation(gaps=(0.5, 5e-5, 0.5))
    other_text = generation(ids=(7, 5, 1), logprobs=(-1.0, -2.0001, -9.0), finish="stop")
    result = compare([reference], [other_text])
    assert (result.ties, result.tokens, result.failures) == (1, 1, ())


def test_a_wrong_token_that_happens_to_meet_a_narrow_gap_is_no_tie() -> None:
    reference = generation(gaps=(0.5, 5e-5, 0.5))
    assert compare([reference], [generation(ids=(7, 5, 9), logprobs=(-1.0, -2.6, -3.0))]).failures


def test_a_difference_before_the_tie_fails() -> None:
    reference = generation(gaps=(0.5, 0.5, 5e-5))
    assert compare([reference], [generation(ids=(4, 8, 5))]).failures


@pytest.mark.parametrize(("requests", "ok"), [(99, False), (100, True)])
def test_ties_of_more_than_one_percent_fail(requests: int, ok: bool) -> None:
    rids = [f"r{index}" for index in range(requests)]
    reference = [generation(rid=rid, gaps=(0.5, 0.5, 5e-5)) for rid in rids]
    candidate = [replace(one, gaps=()) for one in reference]
    candidate[17] = replace(candidate[17], output_ids=(7, 8, 5))
    result = compare(reference, candidate)
    assert result.ties == 1
    assert result.ok is ok


def test_missing_tokens_fail_unless_the_request_was_cut_short_on_purpose() -> None:
    short = generation(ids=(7, 8), logprobs=(-1.0, -2.0), gaps=(), finish="abort")
    assert "2 tokens instead of 3" in compare([generation()], [short]).failures[0]
    result = compare([generation()], [short], cut_short={"r"})
    assert result.ok
    assert result.tokens == 2


def test_a_request_cut_short_is_still_compared() -> None:
    short = generation(ids=(7, 5), logprobs=(-1.0, -2.0), gaps=(), finish="abort")
    assert not compare([generation()], [short], cut_short={"r"}).ok


def test_another_finish_reason_fails() -> None:
    assert "ended by stop" in compare([generation()], [generation(finish="stop")]).failures[0]


def test_nothing_compared_is_not_ok() -> None:
    assert not compare([], []).ok


def test_other_requests_or_missing_logprobs_are_refused() -> None:
    with pytest.raises(ValueError, match="not the same requests"):
        compare([generation()], [generation(rid="other")])
    with pytest.raises(ValueError, match="logprob"):
        compare([generation()], [replace(generation(), logprobs=())])


def test_a_wider_tolerance_is_for_half_precisions() -> None:
    noisy = generation(logprobs=(-1.0, -2.01, -3.0))
    assert compare([generation()], [noisy], tolerance=0.02).ok


def test_comparisons_add_up() -> None:
    total = Comparison(2, 10, 1, 1e-5) + Comparison(3, 20, 0, 3e-5, ("x",))
    assert total == Comparison(5, 30, 1, 3e-5, ("x",))


@given(
    n=st.integers(0, 30),
    seed=st.integers(0, 5),
    shortest=st.integers(1, 40),
    spread=st.integers(0, 300),
    shared=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_mixed_requests_keep_their_bounds_and_repeat(
    n: int, seed: int, shortest: int, spread: int, shared: float
) -> None:
    def make() -> list[tuple[str, tuple[int, ...], int]]:
        requests = mixed_requests(
            n, seed, shortest=shortest, longest=shortest + spread, shared_fraction=shared
        )
        return [(one.rid, one.input_ids, one.max_new_tokens) for one in requests]

    requests = make()
    assert requests == make()
    assert len({rid for rid, _, _ in requests}) == n
    for _, prompt, _ in requests:
        assert shortest <= len(prompt) <= shortest + spread
        assert all(3 <= token < 2048 for token in prompt)


def test_requests_that_share_begin_with_few_prefixes() -> None:
    requests = mixed_requests(20, 0, shortest=60, longest=90, shared_fraction=0.5, shared_tokens=50)
    heads = [one.input_ids[:50] for one in requests]
    shared = {head for head in heads if heads.count(head) > 1}
    assert len(shared) == 2
    assert sum(head in shared for head in heads) == 10


def test_the_summary_tells_each_cell_and_how_to_repeat_it(tmp_path: Path) -> None:
    write_summary(tmp_path / "a" / "s.json", {"static:1": Comparison(2, 10, 0, 1e-5)}, "make it")
    text = (tmp_path / "a" / "s.json").read_text()
    assert '"command": "make it"' in text
    assert '"tokens": 10' in text
