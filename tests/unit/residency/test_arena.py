from __future__ import annotations

import numpy as np
import pytest
from residency_stores import ids, layout

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.layout import Capacity

LAYERS = 3


def make_arena(main: int = 10, ring: int = 2) -> Arena:
    return Arena(layout(LAYERS), Capacity(main + ring, ring, 0, 0), "cpu")


def test_pages_in_order() -> None:
    arena = make_arena()
    assert sorted(arena.take_extents(2).tolist()) == [1, 2]
    assert arena.ring_pages.tolist() == [13, 14]
    assert len(arena.k) == len(arena.v) == 15
    assert arena.padding_pages.tolist() == [0, 4, 8]
    assert not arena.k[[0, 4, 8]].any() and not arena.v[[0, 4, 8]].any()


def test_fewer_extents_where_fewer_are_whole() -> None:
    arena = make_arena()
    assert sorted(arena.take_extents(5).tolist()) == [1, 2, 3]
    assert arena.num_free == 1 and arena.free_pages().tolist() == [12]
    assert len(arena.take_extents(1)) == 0
    assert len(arena.take_extents(0)) == 0


def test_single_pages_come_from_what_is_left_over_first() -> None:
    arena = make_arena()
    assert arena.take_pages(1).tolist() == [12]
    taken = arena.take_pages(2)
    assert len(arena.take_extents(3)) == 2, "one extent is broken, no more"
    assert sorted([*taken, *arena.free_pages()]) in ([1, 5, 9], [2, 6, 10], [3, 7, 11])


def test_extents_coalesce() -> None:
    arena = make_arena()
    arena.take_extents(3)
    arena.give_pages(ids(7, 5, 11, 2))
    assert len(arena.take_extents(1)) == 0
    arena.give_pages(ids(3, 1))
    assert arena.take_extents(2).tolist() == [3]
    assert sorted(arena.free_pages().tolist()) == [1, 2, 5, 12]
    arena.give_pages(ids(9))
    assert arena.take_extents(2).tolist() == [1]
    arena.give_extents(np.array([1, 3], dtype=np.int32))
    arena.give_pages(ids(6, 10))
    assert arena.num_free == 10
    assert sorted(arena.free_pages().tolist()) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    assert sorted(arena.take_extents(3).tolist()) == [1, 2, 3]


def test_too_many_pages_take_none() -> None:
    arena = make_arena()
    with pytest.raises(ResidencyError, match="11 arena pages wanted, 10 free"):
        arena.take_pages(11)
    assert arena.num_free == 10
    assert sorted(arena.take_pages(10).tolist()) == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]


def test_an_extent_is_at_one_id_in_every_layer() -> None:
    arena = make_arena()
    start = int(arena.take_extents(1)[0])
    for layer in range(LAYERS):
        k, v = arena.layer_view(layer)
        k[start], v[start] = layer, layer + 10
    pages = start + arena.stride * np.arange(LAYERS)
    assert arena.k[pages, 0, 0, 0].tolist() == [0, 1, 2]
    assert arena.v[pages, 0, 0, 0].tolist() == [10, 11, 12]


def test_extents_taken_in_a_row_are_adjacent_in_every_layer() -> None:
    arena = make_arena()
    starts = arena.take_extents(3)
    assert np.diff(starts).tolist() == [1, 1]
    assert len(arena.layer_view(LAYERS - 1)[0]) > starts.max()
