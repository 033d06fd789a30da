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
    assert sorted(arena.take_extents(2).tolist()) == [3, 6]
    assert arena.ring_pages.tolist() == [13, 14]
    assert len(arena.k) == len(arena.v) == 15
    assert not arena.k[:LAYERS].any() and not arena.v[:LAYERS].any()


def test_fewer_extents_where_fewer_are_whole() -> None:
    arena = make_arena()
    assert sorted(arena.take_extents(5).tolist()) == [3, 6, 9]
    assert arena.num_free == 1 and arena.free_pages().tolist() == [12]
    assert len(arena.take_extents(1)) == 0
    assert len(arena.take_extents(0)) == 0


def test_single_pages_come_from_what_is_left_over_first() -> None:
    arena = make_arena()
    assert arena.take_pages(1).tolist() == [12]
    taken = arena.take_pages(2)
    assert len(arena.take_extents(3)) == 2, "one extent is broken, no more"
    assert sorted([*taken, *arena.free_pages()]) in ([3, 4, 5], [6, 7, 8], [9, 10, 11])


def test_extents_coalesce() -> None:
    arena = make_arena()
    arena.take_extents(3)
    arena.give_pages(ids(10, 4, 9, 7))
    assert len(arena.take_extents(1)) == 0
    arena.give_pages(ids(11, 3))
    assert arena.take_extents(2).tolist() == [9]
    assert sorted(arena.free_pages().tolist()) == [3, 4, 7, 12]
    arena.give_pages(ids(5))
    assert arena.take_extents(2).tolist() == [3]
    arena.give_extents(np.array([3, 9], dtype=np.int32))
    arena.give_pages(ids(6, 8))
    assert arena.num_free == 10
    assert sorted(arena.free_pages().tolist()) == list(range(3, 13))
    assert sorted(arena.take_extents(3).tolist()) == [3, 6, 9]


def test_too_many_pages_take_none() -> None:
    arena = make_arena()
    with pytest.raises(ResidencyError, match="11 arena pages wanted, 10 free"):
        arena.take_pages(11)
    assert arena.num_free == 10
    assert sorted(arena.take_pages(10).tolist()) == list(range(3, 13))


def test_an_extent_is_at_one_id_in_every_layer() -> None:
    arena = make_arena()
    start = int(arena.take_extents(1)[0])
    for layer in range(LAYERS):
        k, v = arena.layer_view(layer)
        k[start], v[start] = layer, layer + 10
    assert arena.k[start : start + LAYERS, 0, 0, 0].tolist() == [0, 1, 2]
    assert arena.v[start : start + LAYERS, 0, 0, 0].tolist() == [10, 11, 12]
