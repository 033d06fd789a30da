"""Pages grouped by who uses them, against sets."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orbitflow_sglang.planner.units import group_pages

pytestmark = pytest.mark.unit

NUM_PAGES = 24
requests = st.lists(st.sets(st.integers(0, NUM_PAGES - 1)), max_size=6)


def grouped(held: list[set[int]]) -> list[list[int]]:
    arrays = [np.array(sorted(pages), dtype=np.int32) for pages in held]
    return [unit.tolist() for unit in group_pages(arrays, NUM_PAGES).pages]


def by_users(held: list[set[int]]) -> dict[frozenset[int], list[int]]:
    """Pages with the same set of users, the definition taken literally."""
    groups = defaultdict(list)
    for page in range(NUM_PAGES):
        users = frozenset(r for r, pages in enumerate(held) if page in pages)
        if users:
            groups[users].append(page)
    return groups


@given(requests)
@example([])
@example([set(), set()])
@example([{1, 2, 3}, {1, 2, 3}, {1, 2, 4}])
def test_units_are_the_pages_with_the_same_users(held: list[set[int]]) -> None:
    expected = by_users(held)
    private = [expected.pop(frozenset({r}), []) for r in range(len(held))]
    units = grouped(held)
    assert units[: len(held)] == private
    assert sorted(units[len(held) :]) == sorted(expected.values())


@given(requests)
def test_every_page_in_use_is_in_exactly_one_unit(held: list[set[int]]) -> None:
    pages = [page for unit in grouped(held) for page in unit]
    assert sorted(pages) == sorted(set().union(*held))


@given(requests, st.randoms())
def test_the_order_in_which_a_request_lists_its_pages_does_not_matter(
    held: list[set[int]], random: Random
) -> None:
    shuffled = [list(pages) for pages in held]
    for pages in shuffled:
        random.shuffle(pages)
    found = group_pages([np.array(p, dtype=np.int64) for p in shuffled], NUM_PAGES)
    assert [unit.tolist() for unit in found.pages] == grouped(held)


@given(requests)
def test_sizes_count_the_pages_of_each_unit(held: list[set[int]]) -> None:
    units = group_pages([np.array(sorted(p), dtype=np.int64) for p in held], NUM_PAGES)
    assert units.count == len(units.pages)
    assert units.sizes.tolist() == [len(pages) for pages in units.pages]


def test_requests_without_a_page_in_common_are_one_unit_each() -> None:
    assert grouped([{4, 5}, {1}, {2, 9}]) == [[4, 5], [1], [2, 9]]


def test_a_shared_prefix_is_a_unit_behind_the_private_ones() -> None:
    assert grouped([{1, 2, 3}, {1, 2, 7}]) == [[3], [7], [1, 2]]
