from __future__ import annotations

import pytest

from eval.bench.measure import DecodeWindow, Event, Spread, decode_window, without_comments
from eval.bench.overhead import KINDS, Run, orders, ratios
from eval.bench.stream import Sample, bound_s, nothing, table
from orbitflow_sglang.planner.policies import make_policy

pytestmark = pytest.mark.unit


def events(*pairs: tuple[float, int]) -> list[Event]:
    return [Event(at_s, tokens) for at_s, tokens in pairs]


def sample(step_s: float, nbytes: float = 0.0) -> Sample:
    return Sample(step_s, 10, nbytes, 0.0, 0.0, 0.0)


def test_the_window_leaves_out_the_time_in_which_some_request_is_prefilled_or_done() -> None:
    early = events((0.0, 1), (10.0, 2), (12.0, 6), (14.0, 10))
    late = events((10.0, 1), (12.0, 5), (14.0, 9), (30.0, 10))
    window = decode_window([early, late])
    assert (window.begin_s, window.end_s) == (10.0, 14.0)
    assert window.tokens_per_s == pytest.approx(4.0)
    assert window.step_s == pytest.approx(0.5)


def test_only_whole_steps_between_two_events_of_a_request_count() -> None:
    one = events((0.0, 1), (4.0, 9), (8.0, 17))
    other = events((1.0, 1), (5.0, 9), (9.0, 17))
    # Of the first request 4 s to 8 s lie inside, of the second 1 s to 5 s: 2 tokens/s each.
    assert decode_window([one, other]) == DecodeWindow(1.0, 8.0, 2, 4.0)


def test_steps_before_a_given_moment_do_not_count() -> None:
    one = events((0.0, 1), (10.0, 2), (12.0, 6), (14.0, 10))
    assert decode_window([one], 10.5) == DecodeWindow(10.5, 14.0, 1, 2.0)
    assert decode_window([one]).begin_s == 0.0


def test_requests_that_never_decode_together_have_no_window() -> None:
    with pytest.raises(ValueError, match="did not decode together"):
        decode_window([events((0.0, 1), (1.0, 9)), events((2.0, 1), (3.0, 9))])


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert str(Spread.of([0.98])) == "0.980 (0.980 to 0.980)"


def test_every_pair_has_each_kind_once_and_the_seed_gives_the_order() -> None:
    drawn = orders(sorted(KINDS), 20, seed=0)
    assert all(sorted(order) == sorted(KINDS) for order in drawn)
    assert len({tuple(order) for order in drawn}) == 2
    assert drawn == orders(sorted(KINDS), 20, seed=0)


def test_both_kinds_differ_only_in_orbitflow() -> None:
    stock, orbitflow = KINDS["stock"], KINDS["orbitflow"]
    assert orbitflow[: len(stock)] == stock
    assert not any("orbitflow-" in arg or arg == "--enable-orbitflow" for arg in stock)


def test_the_ratio_of_a_pair_is_the_median_over_batches_that_both_decoded() -> None:
    runs = [
        # The machine is half as fast for the second batch, and stops for one of the third.
        Run(1, "stock", (100.0, 50.0, 1.0)),
        Run(1, "orbitflow", (98.0, 51.0, 97.0)),
        Run(2, "orbitflow", (50.0,)),
        Run(2, "stock", (40.0,)),
        Run(3, "stock", (40.0,)),
    ]
    assert ratios(runs, "orbitflow") == pytest.approx([1.02, 1.25])


def test_the_bound_is_the_slower_of_compute_and_link() -> None:
    assert bound_s(0.030, 10e6, 1.0) == 0.030
    assert bound_s(0.030, 60e6, 1.0) == pytest.approx(0.060)
    assert bound_s(0.030, 60e6, 4.0) == 0.030


def test_rows_are_measured_against_the_resident_step_of_the_same_server() -> None:
    found = {
        "resident": [sample(0.020), sample(0.030), sample(0.500)],
        "static:1": [sample(0.033, 15e6), sample(0.036, 15e6), sample(0.030, 15e6)],
        "all-host": [sample(0.066, 60e6)],
    }
    half, whole = table(1.0, found)
    assert (half.policy, half.compute_s, half.limit) == ("static:1", 0.030, "compute")
    assert half.ratio == Spread(pytest.approx(1.1), pytest.approx(1.0), pytest.approx(1.2))
    assert (whole.link_s, whole.limit) == (pytest.approx(0.060), "link")
    assert whole.ratio.median == pytest.approx(1.1)


def test_nothing_names_a_policy_that_spills_and_offloads_no_layer() -> None:
    policy = make_policy(nothing(12))
    assert policy.spills
    assert not policy.place(units=3, layers=12).any()


def test_what_code_does_outlives_comments_and_docstrings() -> None:
    documented = '''"""A module."""

# why
def f(x: str) -> str:
    """What it does.

    At length.
    """
    y = "# not a comment"  # but this is
    """Nor is this a docstring."""
    return x + y
'''
    bare = '''def f(x: str) -> str:
    y = "# not a comment"
    """Nor is this a docstring."""
    return x + y'''
    assert without_comments(documented) == without_comments(bare) == bare
    assert without_comments(bare.replace("    return", "return")) != bare
