"""The ring, driven by the store: what is fetched when, and through which pages."""

from __future__ import annotations

import numpy as np
import pytest
from residency_stores import ids, make_store, prefill_step, read_step, run, settle

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.page_table import PageState
from orbitflow_sglang.residency.staging import Piece
from orbitflow_sglang.residency.store import ResidencyStore

SIZE = 2


def store_with(pages: list[int], on_host: list[bool], ring: int, main: int = 30) -> ResidencyStore:
    """Full ``pages`` that have been written and are where they were placed."""
    store = make_store(len(on_host), SIZE, main=main, ring=ring)
    store.place(np.array(pages), np.array(on_host))
    run(store, prefill_step(pages, SIZE))
    settle(store, pages)
    return store


def issued(store: ResidencyStore) -> list[list[bool]]:
    """Of each layer's pieces, whether their fetch has been issued."""
    return [[piece.transfer is not None for piece in pieces] for pieces in store.ring._pieces]


def test_one_part_while_a_layer_takes_no_more_than_half_the_ring() -> None:
    store = store_with([1, 2, 3], [True, False, True], ring=6)
    assert run(store, read_step([1, 2, 3], SIZE)) == [1, 1, 1]


def test_piecewise_beyond() -> None:
    store = store_with([1, 2, 3, 4], [True, False, True], ring=6)
    # What is resident (nothing here), then pieces of at most 3 pages.
    assert run(store, read_step([1, 2, 3, 4], SIZE)) == [3, 1, 3]


def test_a_ring_of_one_page() -> None:
    store = store_with([1, 2, 3], [True, True, True], ring=1)
    assert run(store, read_step([1, 2, 3], SIZE)) == [4, 4, 4]


def test_first_layers_of_the_next_step_are_fetched_behind_the_last() -> None:
    store = store_with([1, 2], [True, True, False], ring=4)
    step = read_step([1, 2], SIZE)
    run(store, step)
    ring_pages = store.arena.ring_start
    assert (store.table.state[:2, 1:3] == PageState.TO_DEVICE).all()
    assert (store.table.device_page[:2, 1:3] >= ring_pages).all()
    fetched = store.engine._h2d.stats.bytes + 4 * store.layout.page_bytes
    store.begin(step)
    store.engine._h2d.drain()
    assert store.engine._h2d.stats.bytes == fetched, "nothing is fetched twice"
    assert [list(store.passes(layer)) for layer in range(3)]
    store.end()


def test_the_order_of_the_link_is_the_order_of_layers() -> None:
    store = store_with([1, 2], [True, True, True], ring=4)
    store.begin(read_step([1, 2], SIZE))
    assert issued(store) == [[True], [True], [False]]
    list(store.passes(0))
    assert issued(store)[1:] == [[True], [True]]
    store.end()
    assert store.ring.num_free == 4 and store.check() == []


def test_a_changed_step_drops_what_it_does_not_read() -> None:
    store = store_with([1, 2, 3], [True, True, True], ring=12)
    run(store, read_step([1, 2], SIZE))
    run(store, read_step([2, 3], SIZE))
    run(store, read_step([1], SIZE))
    store.free(ids(1))
    assert store.ring.num_free == 12 and store.check() == []


def test_a_page_that_should_stay_is_fetched_home() -> None:
    store = store_with([1, 2], [True, True, True], ring=2)
    store.place(ids(1, 2), np.zeros(3, dtype=bool))
    free = store.arena.num_free
    store.reserve_pages = free - 4
    run(store, read_step([1, 2], SIZE))
    assert store.arena.num_free == store.reserve_pages, "all but the reserve is used"
    state = store.table.state[:, 1:3]
    assert (state == PageState.BOTH).sum() == 4
    store.reserve_pages = 0
    run(store, read_step([1, 2], SIZE))
    assert run(store, read_step([1, 2], SIZE)) == [1, 1, 1]
    assert (store.table.state[:, 1:3] == PageState.BOTH).all()


def test_room_is_made_for_the_layer_whose_turn_it_is() -> None:
    store = store_with([1, 2], [True] * 4, ring=4)
    run(store, read_step([1], SIZE, idle_pages=ids(2)))
    assert store.ring.num_free == 0, "one page of each layer has been fetched ahead"
    store.begin(read_step([1, 2], SIZE))
    assert issued(store) == [[True, False]] * 4
    next(parts := store.passes(0))
    assert issued(store) == [[True, True], [True, False], [True, False], [False, False]]
    assert len(list(parts)) == 0
    store.end()
    assert run(store, read_step([1, 2], SIZE)) == [1, 1, 1, 1]


def test_what_came_to_stay_is_not_fetched_again_when_its_piece_is_dropped() -> None:
    store = store_with([1, 2, 3], [True] * 4, ring=4)
    run(store, read_step([1], SIZE))  # ahead: page 1 of each layer, through the ring
    store.ring._drop(store.ring._ahead[3].pop())
    store.place(ids(2), np.array([True, True, True, False]))
    piece = Piece(3, ids(1, 2))  # one page for the ring and one for the arena
    assert store.ring._issue(piece)
    store.ring._ahead[3] = [piece]
    assert (piece.target < store.arena.ring_start).tolist() == [False, True]
    step = read_step([1, 2], SIZE)
    store.begin(step)
    next(store.passes(0))  # takes two ring pages at once: layer 3 has to give way
    assert store.table.state[3, 1:3].tolist() == [PageState.HOST, PageState.BOTH]
    assert piece.pages.tolist() == [1] and issued(store)[3] == [False]
    store.end()
    assert store.check() == []
    assert run(store, step) == [1, 1, 1, 1]


def test_passes_out_of_order_are_refused() -> None:
    store = store_with([1, 2], [True, True, True], ring=2)
    store.begin(read_step([1, 2], SIZE))
    next(parts := store.passes(0))
    next(parts)
    next(parts)  # a piece of layer 0 is held
    with pytest.raises(ResidencyError, match="too small"):
        list(store.passes(2))
    store.end()
    assert store.check() == []


def test_stall_is_counted() -> None:
    store = store_with([1], [True, True, True], ring=4)
    before = store.ring.stall_s
    run(store, read_step([1], SIZE))
    assert store.ring.stall_s > before
