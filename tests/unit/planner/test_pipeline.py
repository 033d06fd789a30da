from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import page_by_page, seeded

from orbitflow_sglang.planner.pipeline import (
    cold_step_s,
    cyclic_step_s,
    simulate,
    step_ends,
    trace,
)

loads = st.lists(st.integers(0, 12), min_size=1, max_size=8)
times = st.floats(1e-4, 1e-2)


@seeded(300)
@given(loads, times, times, st.integers(2, 40), st.booleans(), st.floats(0, 0.02))
def test_three_simulations_agree(
    pages: list[int], t: float, t_b: float, ring: int, with_setup: bool, lead: float
) -> None:
    setup = [1e-3 * (count > 0) for count in pages] if with_setup else None
    expected = page_by_page(pages, t, t_b, ring, setup=setup, steps=5, lead=lead)
    assert step_ends(
        pages, t, t_b, ring, setup_s=setup, steps=5, lead_s=lead
    ) == pytest.approx(expected, rel=1e-9)  # fmt: skip
    vectorised = simulate(
        np.array([pages, pages]), t, t_b, np.array([ring, ring]),
        setup_s=None if setup is None else np.array([setup, setup]), steps=5, lead_s=lead,
    )  # fmt: skip
    assert vectorised.tolist() == [pytest.approx(expected, rel=1e-9)] * 2


@seeded(100)
@given(st.lists(st.tuples(loads, st.integers(2, 40)), min_size=2, max_size=5), times, times)
def test_plans_simulated_together_do_not_disturb_each_other(
    plans: list[tuple[list[int], int]], t: float, t_b: float
) -> None:
    layers = min(len(pages) for pages, _ in plans)
    pages = np.array([row[:layers] for row, _ in plans])
    rings = np.array([ring for _, ring in plans])
    together = simulate(pages, t, t_b, rings, steps=3)
    for row, ends in enumerate(together):
        alone = step_ends(pages[row].tolist(), t, t_b, int(rings[row]), steps=3)
        assert ends.tolist() == pytest.approx(alone, rel=1e-9)


@seeded(300)
@given(loads, times, times, st.integers(2, 60))
def test_the_cyclic_step_is_that_in_the_middle_of_many(
    pages: list[int], t: float, t_b: float, ring: int
) -> None:
    ends = page_by_page(pages, t, t_b, ring, steps=240)
    mean = (ends[-1] - ends[119]) / 120
    assert cyclic_step_s(np.array(pages), t, t_b, ring) == pytest.approx(mean, rel=1e-6)


@seeded(200)
@given(loads, times, times)
def test_a_first_step_with_room_for_all_is_the_authors_formula(
    pages: list[int], t: float, t_b: float
) -> None:
    ring = 2 * max(1, sum(pages))
    first = step_ends(pages, t, t_b, ring)[0]
    assert cold_step_s(np.array(pages), t, t_b) == pytest.approx(first, rel=1e-12)


@seeded(200)
@given(loads, times, times, st.integers(2, 60))
def test_no_step_beats_compute_or_the_link(
    pages: list[int], t: float, t_b: float, ring: int
) -> None:
    step = cyclic_step_s(np.array(pages), t, t_b, ring)
    bound = max(len(pages) * t, sum(pages) * t_b)
    assert step >= bound * (1 - 1e-9)
    assert step <= len(pages) * t + sum(pages) * t_b + 1e-12


@seeded(100)
@given(loads, times, times, st.integers(2, 40))
def test_a_larger_ring_and_a_head_start_never_slow_a_first_step(
    pages: list[int], t: float, t_b: float, ring: int
) -> None:
    ring = 2 * max(max(pages), 1) + ring  # no layer in pieces
    end = step_ends(pages, t, t_b, ring)[0]
    assert step_ends(pages, t, t_b, 2 * ring)[0] <= end + 1e-12
    assert step_ends(pages, t, t_b, ring, lead_s=0.01)[0] <= end + 1e-12


def test_an_even_spread_over_a_ring_of_two_layers_reaches_the_bound() -> None:
    pages = np.full(32, 50)
    for t_b in (1e-6, 2e-5, 4e-5, 1e-3):
        assert cyclic_step_s(pages, 1e-3, t_b, 100) == pytest.approx(
            max(32e-3, 1600 * t_b), rel=1e-9
        )


def test_pieces_of_a_trace_are_in_order_and_complete() -> None:
    pieces = trace([5, 0, 3], 1e-3, 1e-4, 4, steps=2)
    assert [(p.step, p.layer, p.pages) for p in pieces[:5]] == [
        (0, 1, 2), (0, 1, 2), (0, 1, 1), (0, 2, 0), (0, 3, 2),
    ]  # fmt: skip
    for before, after in itertools.pairwise(pieces):
        assert after.begin_s >= before.end_s
        assert after.link_end_s >= before.link_end_s
    assert all(p.begin_s >= p.link_end_s for p in pieces if p.pages)


def test_streaming_without_a_ring_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a ring"):
        trace([1], 1e-3, 1e-3, 0)
    assert step_ends([0, 0], 1e-3, 1e-3, 0) == [pytest.approx(2e-3)]
