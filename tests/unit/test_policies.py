"""Policies by name, and what makes a placement fit into memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orbitflow_sglang.planner.policies import (
    RANDOM_PERIOD,
    BoolArray,
    IntArray,
    fit,
    make_policy,
    spread_order,
)

pytestmark = pytest.mark.unit

NAMES = ["resident", "static:1", "static:12", "all-host", "random:0", "random:12345"]


@dataclass(frozen=True)
class Case:
    """A preferred placement, the pages of its units, and the memory it has to fit into."""

    preferred: BoolArray
    pages: IntArray
    device_pages: int
    host_pages: int

    @property
    def total(self) -> int:
        return int(self.pages.sum()) * self.preferred.shape[1]

    def on_host(self, placement: BoolArray) -> int:
        return int((placement * self.pages[:, None]).sum())

    def on_device(self, placement: BoolArray) -> int:
        return self.total - self.on_host(placement)

    def fitted(self) -> BoolArray:
        return fit(self.preferred, self.pages, self.device_pages, self.host_pages)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    units, layers = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    pages = np.array(
        draw(st.lists(st.integers(0, 9), min_size=units, max_size=units)), dtype=np.int64
    )
    flags = draw(st.lists(st.booleans(), min_size=units * layers, max_size=units * layers))
    preferred = np.array(flags, dtype=bool).reshape(units, layers)
    room = st.integers(0, int(pages.sum()) * layers + 5)
    return Case(preferred, pages, draw(room), draw(room))


ONE_PAGE_SHORT = Case(np.zeros((1, 2), dtype=bool), np.array([3]), 5, 10)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_made_by_its_name_and_knows_it(name: str) -> None:
    policy = make_policy(name)
    assert policy.name == name
    placement = policy.place(3, 5)
    assert placement.shape == (3, 5)
    assert placement.dtype == np.bool_


@pytest.mark.parametrize(
    "name",
    ["", "Resident", "resident:1", "all-host:2", "static", "static:", "static:-1", "static:1.5",
     "static:²", "random", "random:x", "orbitflow"],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"resident, static:d .*all-host or random:SEED"):
        make_policy(name)


def test_a_distance_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_policy("static:0")


def test_resident_and_all_host_place_everything_on_one_side() -> None:
    assert not make_policy("resident").place(2, 4).any()
    assert make_policy("all-host").place(2, 4).all()


def test_only_resident_keeps_every_page_on_the_device() -> None:
    assert [name for name in NAMES if not make_policy(name).spills] == ["resident"]


@given(distance=st.integers(1, 20), layers=st.integers(1, 80), units=st.integers(0, 4))
def test_a_distance_offloads_every_layer_whose_number_it_divides(
    distance: int, layers: int, units: int
) -> None:
    placement = make_policy(f"static:{distance}").place(units, layers)
    offloaded = [j % (distance + 1) == 0 for j in range(1, layers + 1)]
    assert placement.tolist() == [offloaded] * units


@given(seed=st.integers(0, 2**32), units=st.integers(1, 4), layers=st.integers(1, 16))
def test_a_seed_gives_the_same_placements_again(seed: int, units: int, layers: int) -> None:
    one, other = make_policy(f"random:{seed}"), make_policy(f"random:{seed}")
    for _ in range(3):
        assert np.array_equal(one.place(units, layers), other.place(units, layers))


def test_random_asks_to_place_again_and_then_places_otherwise() -> None:
    policy = make_policy("random:1")
    assert policy.period == RANDOM_PERIOD
    placements = [policy.place(4, 16) for _ in range(8)]
    assert len({placement.tobytes() for placement in placements}) == 8
    assert len({make_policy(f"random:{seed}").place(4, 16).tobytes() for seed in range(8)}) == 8


def test_fixed_policies_are_asked_once() -> None:
    assert [make_policy(name).period for name in ("resident", "static:2", "all-host")] == [None] * 3


@given(st.integers(1, 300))
def test_spread_order_names_every_layer_once(layers: int) -> None:
    assert sorted(spread_order(layers).tolist()) == list(range(layers))


@given(st.integers(1, 7))
def test_every_prefix_of_spread_order_lies_spread_over_the_depth(bits: int) -> None:
    layers = 1 << bits
    order = spread_order(layers)
    for level in range(bits + 1):
        count = 1 << level
        assert sorted(order[:count] * count // layers) == list(range(count))


@given(cases())
@example(ONE_PAGE_SHORT)
def test_what_fit_leaves_on_the_device_fits_it(case: Case) -> None:
    assert case.on_device(case.fitted()) <= case.device_pages


@given(cases())
def test_fit_leaves_the_preferred_placement_itself_alone(case: Case) -> None:
    before = case.preferred.copy()
    case.fitted()
    assert np.array_equal(case.preferred, before)


@given(cases())
def test_nothing_moves_when_nothing_is_short(case: Case) -> None:
    short_device = case.on_device(case.preferred) > case.device_pages
    short_host = case.on_host(case.preferred) > case.host_pages
    if not short_device and not short_host:
        assert np.array_equal(case.fitted(), case.preferred)


@given(cases())
@example(ONE_PAGE_SHORT)
def test_fit_moves_pages_in_one_direction_only(case: Case) -> None:
    moved_out = case.fitted() & ~case.preferred
    moved_in = case.preferred & ~case.fitted()
    if case.on_device(case.preferred) > case.device_pages:
        assert not moved_in.any()
    else:
        assert not moved_out.any()


@given(cases())
@example(ONE_PAGE_SHORT)
def test_no_more_goes_to_the_host_than_the_last_pair_needs(case: Case) -> None:
    surplus = case.on_device(case.preferred) - case.device_pages
    if surplus > 0:
        moved = case.on_host(case.fitted()) - case.on_host(case.preferred)
        assert surplus <= moved < surplus + max(1, int(case.pages.max()))


@given(cases())
def test_what_the_host_cannot_hold_comes_back_as_far_as_there_is_room(case: Case) -> None:
    resident = case.on_device(case.preferred)
    surplus = case.on_host(case.preferred) - case.host_pages
    if resident <= case.device_pages and surplus > 0:
        wanted = min(surplus, case.device_pages - resident)
        back = case.on_device(case.fitted()) - resident
        # A pair comes back whole or not at all, so the last one may be too large.
        assert wanted - int(case.pages.max()) < back <= wanted or back == wanted


@given(cases())
def test_units_of_single_pages_fit_the_host_whenever_both_together_hold_them(case: Case) -> None:
    single = Case(case.preferred, np.minimum(case.pages, 1), case.device_pages, case.host_pages)
    if single.total <= single.device_pages + single.host_pages:
        assert single.on_host(single.fitted()) <= single.host_pages
