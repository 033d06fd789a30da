from __future__ import annotations

import numpy as np
import pytest
import torch
from residency_stores import (
    advance,
    ids,
    make_store,
    number_of,
    prefill_step,
    read_step,
    run,
    settle,
    tokens_read,
    vectors,
)

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.layout import most_logical_pages
from orbitflow_sglang.residency.page_table import PageState
from orbitflow_sglang.residency.store import LayerPass, ResidencyStore, Step

LAYERS, SIZE = 3, 2
ON_HOST = np.ones(LAYERS, dtype=bool)
ON_DEVICE = np.zeros(LAYERS, dtype=bool)


def tail_step(page: int, **more: np.ndarray) -> Step:
    """A first token in a new page."""
    return Step([ids(page)], [1], ids(page * SIZE), new_tails=ids(page), **more)


def states(store: ResidencyStore, page: int) -> set[str]:
    return {PageState(state).name for state in store.table.state[:, page]}


# --- the uniform path ------------------------------------------------------------


def uniform_write(store: ResidencyStore, starts: np.ndarray, pages: np.ndarray) -> None:
    slots = (starts[:, None] * SIZE + np.arange(SIZE)).reshape(-1).astype(np.int64)
    logical = (pages[:, None] * SIZE + np.arange(SIZE)).reshape(-1)
    for layer in range(LAYERS):
        new = vectors(layer, number_of(logical))
        for values, arena in zip(new, store.arena.layer_view(layer), strict=True):
            arena.view(-1, *arena.shape[2:])[torch.from_numpy(slots)] = values


def test_uniform_and_tiered_steps_see_the_same_pages() -> None:
    store = make_store(LAYERS, SIZE)
    starts = store.begin_uniform(ids(1, 2), ids(1, 2), ids(1, 2))
    assert starts is not None
    uniform_write(store, starts, ids(1, 2))
    store.end()
    assert store.check() == []
    run(store, prefill_step([3], SIZE))
    assert run(store, read_step([1, 2, 3], SIZE)) == [1, 1, 1]
    starts = store.begin_uniform(ids(3, 1), ids(), ids(3, 1))
    assert starts is not None
    for layer in range(LAYERS):
        view = store.arena.layer_view(layer)
        part = LayerPass(*view, torch.from_numpy(starts), [2], [4], whole=True)
        assert tokens_read(part, 0, layer) == number_of(ids(6, 7, 2, 3)).tolist()
    assert store.begin_uniform(ids(0), ids(), ids(0)) == 0, "padding is at its extent"


def test_uniform_is_refused_and_nothing_done() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 2 + 2)
    run(store, prefill_step([1], SIZE))
    assert store.begin_uniform(ids(1, 2, 3), ids(2, 3), ids(1, 2, 3)) is None, (
        "one extent is free, not two"
    )
    assert store.check() == [] and store.table.pages_in_use().tolist() == [1]
    store.place(ids(1), np.array([True, False, False]))
    settle(store, [1])
    assert store.begin_uniform(ids(1, 2), ids(2), ids(1, 2)) is None, "page 1 is not in an extent"
    assert store.check() == [] and store.table.pages_in_use().tolist() == [1]
    assert store.begin_uniform(ids(2), ids(2), ids(2)) is not None


def test_a_page_with_a_host_copy_is_not_uniform() -> None:
    """A uniform step might write it, and nobody would renew the host copy."""
    store = make_store(LAYERS, SIZE)
    run(store, tail_step(1))
    store.place(ids(1), ON_HOST)
    store.begin(Step([], [], ids(0), idle_pages=ids(1)))  # closed for once
    store.end()
    assert states(store, 1) == {"TO_HOST"}
    assert store.begin_uniform(ids(1), ids(), ids(1)) is None
    run(store, Step([ids(1)], [2], ids(3), open_pages=ids(1)))
    assert states(store, 1) == {"DEVICE"}
    settle(store, [1])
    assert states(store, 1) == {"HOST"}
    run(store, read_step([1], SIZE))


def test_a_mirrored_page_stays_uniform_for_those_who_only_read_it() -> None:
    store = make_store(LAYERS, SIZE)
    run(store, prefill_step([1, 2], SIZE))
    assert store.mirror(ids(1), 100) == LAYERS
    store.quiesce()
    assert states(store, 1) == {"BOTH"} and store.check() == []
    assert store.begin_uniform(ids(1, 2), ids(), ids(2)) is not None
    assert store.begin_uniform(ids(1, 2), ids(), ids(1)) is None, "its host copy would be stale"


def test_whole_pages_come_back_to_extents() -> None:
    store = make_store(LAYERS, SIZE)
    run(store, prefill_step([1, 2, 3], SIZE))
    store.place(ids(1, 2), ON_HOST)
    settle(store, [1, 2])
    store.place(ids(1, 2), ON_DEVICE)
    store.begin(read_step([3], SIZE, idle_pages=ids(1, 2)))
    assert store.fetch_ahead(ids(1, 2), LAYERS + 1) == LAYERS + 1, "one page, and a layer"
    store.end()
    assert store.check() == []
    assert states(store, 1) == {"TO_DEVICE"}
    assert store.begin_uniform(ids(1, 3), ids(), ids(3)) is not None
    assert states(store, 1) == {"BOTH"}, "read only when it has arrived"
    assert store.begin_uniform(ids(1, 2), ids(), ids(3)) is None
    assert run(store, read_step([1, 2, 3], SIZE)) == [1] * LAYERS


def test_cached_pages_give_way_to_those_coming_back() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 4)
    run(store, prefill_step([1, 2], SIZE))
    store.place(ids(1, 2), ON_HOST)
    settle(store, [1, 2])
    run(store, prefill_step([3, 4, 5], SIZE))
    store.place(ids(1, 2), ON_DEVICE)
    store.begin(tail_step(6, idle_pages=ids(1, 2)))
    assert store.arena.num_free == 0, "pages 3 to 5 are nobody's, but cached"
    assert store.fetch_ahead(ids(1, 2), 100) == 0
    store.end()
    assert states(store, 3) == states(store, 4) == {"TO_HOST"} and states(store, 5) == {"DEVICE"}
    store.engine.drain()
    store.begin(read_step([], SIZE, open_pages=ids(6), idle_pages=ids(1, 2)))
    assert store.fetch_ahead(ids(1, 2), 100) == 2 * LAYERS
    store.end()
    assert store.check() == []
    assert run(store, read_step([1, 2, 3, 4, 5], SIZE))


def test_scattered_pages_are_gathered_a_few_in_a_step() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 8)
    pages = list(range(1, 9))
    run(store, prefill_step(pages, SIZE))
    one_layer = np.array([True, False, False])
    store.place(ids(*pages), one_layer)
    settle(store, pages)
    store.place(ids(*pages), ON_DEVICE)
    run(store, read_step(pages, SIZE))  # fetches what is missing
    loose = []
    for _ in pages:
        loose.append(int((store.table.extent[pages] < 0).sum()))
        run(store, read_step(pages, SIZE))
    assert loose == [8, 7, 6, 5, 4, 3, 2, 1]
    assert store.begin_uniform(ids(*pages), ids(), ids(0)) is not None


# --- eviction --------------------------------------------------------------------


def test_cached_pages_leave_first_and_the_oldest_of_them() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 4)
    for page in (1, 2, 3, 4):
        run(store, prefill_step([page], SIZE))
    run(store, read_step([1], SIZE))
    run(store, tail_step(5, idle_pages=ids(4)))
    assert states(store, 2) == {"HOST"}
    assert states(store, 1) == states(store, 3) == states(store, 4) == {"DEVICE"}
    run(store, tail_step(6, open_pages=ids(5), idle_pages=ids(4, 5)))
    assert states(store, 3) == {"HOST"}
    run(store, tail_step(7, open_pages=ids(5, 6), idle_pages=ids(4, 5, 6)))
    assert states(store, 1) == {"HOST"} and states(store, 4) == {"DEVICE"}
    run(store, tail_step(8, open_pages=ids(5, 6, 7), idle_pages=ids(4, 5, 6, 7)))
    assert states(store, 4) == {"HOST"}, "a live one, when there is no other"
    with pytest.raises(ResidencyError, match="3 arena pages needed, 0 can be had"):
        store.begin(tail_step(9, open_pages=ids(5, 6, 7, 8)))
    assert store.step is None and store.check() == []
    run(store, read_step([1, 2, 3, 4], SIZE, open_pages=ids(5, 6, 7, 8)))


def test_uniform_steps_count_as_use() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 2)
    for page in (1, 2):
        run(store, prefill_step([page], SIZE))
    assert store.begin_uniform(ids(1), ids(), ids(1)) is not None
    store.end()
    run(store, tail_step(3))
    assert states(store, 2) == {"HOST"} and states(store, 1) == {"DEVICE"}


def test_the_reserve_is_kept_free_of_cached_pages() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 4)
    run(store, prefill_step([1, 2, 3], SIZE))
    store.reserve_pages = 2 * LAYERS
    for _ in range(2):
        run(store, tail_step(9) if not store.table.in_use[9] else read_step([], SIZE))
        store.quiesce()
    run(store, Step([], [], ids(0), open_pages=ids(9)))
    assert store.arena.num_free >= 2 * LAYERS


def test_cached_pages_make_way_for_live_ones_that_are_to_come_back() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 3, ring=4)
    store.place(ids(1), ON_HOST)
    run(store, prefill_step([1], SIZE))
    run(store, prefill_step([2, 3, 4], SIZE, idle_pages=ids(1)))  # finished, and cached
    assert store.arena.num_free == 0
    store.place(ids(1), ON_DEVICE)
    for _ in range(3):  # the cached pages are written back, then dropped, then there is room
        run(store, read_step([1], SIZE))
        store.engine.drain()
    home = store.table.device_page[:, 1]
    assert ((home >= 0) & (home < store.arena.ring_start)).all()


def test_whoever_hits_a_cached_page_has_it_in_the_arena() -> None:
    """Wherever those wanted it who have left, and whatever it had to give way to since."""
    store = make_store(LAYERS, SIZE, main=LAYERS * 3)
    store.place(ids(1), ON_HOST)
    run(store, prefill_step([1], SIZE))
    run(store, prefill_step([2], SIZE))  # the first has ended
    store.reserve_pages = 3 * LAYERS
    run(store, tail_step(9))  # the second, too
    store.engine.drain()
    run(store, read_step([], SIZE, open_pages=ids(9)))
    assert states(store, 1) == states(store, 2) == {"HOST"}
    store.reserve_pages = 0
    for _ in range(2):
        run(store, read_step([1, 2], SIZE, open_pages=ids(9)))
    home = store.table.device_page[:, [1, 2]]
    assert ((home >= 0) & (home < store.arena.ring_start)).all()
    assert store.ring.num_free == store.capacity.ring_pages, "nothing is streamed any more"


def test_what_the_ring_fetches_to_the_arena_can_leave_again() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 2, ring=6)
    run(store, prefill_step([1], SIZE))
    for tail in (2, 3):
        run(store, tail_step(tail, open_pages=ids(2) if tail == 3 else ids()))
    assert states(store, 1) == {"HOST"}
    store.place(ids(1), ON_DEVICE)
    run(store, read_step([1], SIZE, open_pages=ids(2, 3)))  # ahead, through the ring
    store.free(ids(3))
    run(store, read_step([1], SIZE, open_pages=ids(2)))  # ahead, now to the arena
    assert states(store, 1) == {"TO_DEVICE"} and store.arena.num_free == 0
    run(store, tail_step(3, open_pages=ids(2), idle_pages=ids(1)))
    assert states(store, 1) == {"HOST"}


# --- new pages -------------------------------------------------------------------


def test_full_pages_placed_on_the_host_never_have_an_arena_page() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS)
    store.place(ids(1, 2, 3, 4, 5), ON_HOST)
    run(store, prefill_step([1, 2, 3, 4, 5], SIZE))
    assert store.arena.num_free == LAYERS
    run(store, read_step([1, 2, 3, 4, 5], SIZE))
    assert store.engine._d2h.stats.bytes == 5 * LAYERS * store.layout.page_bytes


def test_pages_that_go_straight_to_the_host_leave_the_arena_untouched() -> None:
    store = make_store()
    store.place(ids(1, 2), np.arange(LAYERS) % 2 == 0)
    store.arena.k.fill_(-7.0)
    run(store, prefill_step([1, 2], SIZE))
    touched = np.flatnonzero((store.arena.k != -7.0).flatten(1).any(1).numpy())
    table = store.table
    own = table.device_page[:, [1, 2]]
    assert set(touched) <= {*own[own >= 0].tolist()}, "written where nobody owns a page"
    assert len(touched) == LAYERS // 2 * 2


def test_full_pages_without_room_go_to_the_host() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 2)
    run(store, prefill_step([1, 2, 3, 4], SIZE, new_tails=ids(5)))
    assert states(store, 5) == states(store, 1) == {"DEVICE"}, "the first stay together"
    run(store, read_step([1, 2, 3, 4], SIZE, open_pages=ids(5)))


def test_without_room_anywhere_nothing_is_opened() -> None:
    store = make_store(LAYERS, SIZE, main=LAYERS * 2, host=LAYERS * 2)
    store.place(ids(1, 2, 3), ON_HOST)
    with pytest.raises(ResidencyError, match="arena pages needed"):
        store.begin(prefill_step([1, 2, 3, 4, 5], SIZE))
    assert store.step is None and store.check() == []
    assert store.host.num_free == LAYERS * 2 and store.arena.num_free == LAYERS * 2
    run(store, prefill_step([1, 2, 3, 4], SIZE))
    run(store, read_step([1, 2, 3, 4], SIZE))


def test_a_new_page_that_is_read_at_once_is_in_the_arena() -> None:
    store = make_store(LAYERS, page_size=1)
    store.place(ids(7), ON_HOST)
    run(store, Step([ids(7)], [1], ids(7), new_full=ids(7), new_full_rows=ids(0)))
    assert states(store, 7) == {"DEVICE"}
    settle(store, [7])
    assert states(store, 7) == {"HOST"}


@pytest.mark.parametrize("layers_written", [0, 1, 2])
def test_a_pass_given_up_leaves_pages_that_can_be_written_again(layers_written: int) -> None:
    store = make_store(LAYERS, SIZE)
    store.place(ids(1, 2), np.array([True, False, True]))
    step = prefill_step([1, 2], SIZE)
    store.begin(step)
    for layer in range(layers_written):
        store.write(layer, *vectors(layer, number_of(step.slots)))
        list(store.passes(layer))
    store.end()
    assert store.check() == []
    again = Step([ids()], [0], step.slots, open_pages=ids(1, 2))
    run(store, again)
    run(store, read_step([1, 2], SIZE))
    store.free(ids(1, 2))
    assert store.check() == []


def test_a_reopened_page_has_no_second_copy() -> None:
    store = make_store(LAYERS, SIZE)
    run(store, tail_step(1))
    store.place(ids(1), np.array([True, True, False]))
    settle(store, [1])
    store.place(ids(1), ON_DEVICE)
    run(store, Step([ids(1)], [1], ids(0)))  # BOTH here, HOST there
    assert store.host.num_free < store.host.num_pages
    run(store, Step([ids(1)], [2], ids(3), open_pages=ids(1)))
    assert states(store, 1) == {"DEVICE"}
    assert store.host.num_free == store.host.num_pages


# --- ownership -------------------------------------------------------------------


def test_tails_come_back_although_arena_and_host_are_full() -> None:
    """With one page to spare, as ``most_logical_pages`` leaves it, however many they are."""
    main = host = 3 * LAYERS
    logical = most_logical_pages(main, host, LAYERS)
    assert logical == 5
    store = make_store(LAYERS, SIZE, main, host=host, logical=logical)
    for page in (1, 2):
        run(store, tail_step(page))
    store.place(ids(1, 2), ON_HOST)
    settle(store, [1, 2])
    run(store, prefill_step([3, 4, 5], SIZE, idle_pages=ids(1, 2)))
    assert (store.arena.num_free, store.host.num_free) == (0, LAYERS)
    slots = ids(SIZE + 1, 2 * SIZE + 1)
    tails = {"open_pages": ids(1, 2), "idle_pages": ids(3, 4, 5)}
    run(store, Step([ids(1), ids(2)], [SIZE, SIZE], slots, **tails))
    assert states(store, 1) == states(store, 2) == {"DEVICE"}
    run(store, read_step([3, 4, 5], SIZE, idle_pages=ids(1, 2)))


def test_free_with_copies_under_way() -> None:
    store = make_store(LAYERS, SIZE)
    store.place(ids(1, 2), ON_HOST)
    run(store, prefill_step([1], SIZE))
    store.begin(prefill_step([2], SIZE))
    store.end()
    assert store._write_backs._under_way
    store.free(ids(1, 2))
    assert store.check() == []
    store.place(ids(1), ON_HOST)
    run(store, prefill_step([1], SIZE))  # the same host pages, behind the copies for nobody
    advance(store, 0, 1)
    run(store, read_step([1], SIZE))
    store.clear()
    assert store.check() == [] and not store._write_backs._under_way
    assert store.arena.num_free == store.capacity.main_pages
    assert store.host.num_free == store.capacity.host_pages


def test_freeing_what_nobody_owns_is_refused() -> None:
    store = make_store(LAYERS, SIZE)
    run(store, prefill_step([1], SIZE))
    with pytest.raises(ResidencyError, match="nobody owns: \\[2\\]"):
        store.free(ids(1, 2))
    assert store.table.pages_in_use().tolist() == [1]
    store.free(ids())


def test_no_requests_at_all() -> None:
    store = make_store(LAYERS, SIZE)
    step = Step([], [], ids())
    assert run(store, step) == [1] * LAYERS
    assert list(store.table.pages_in_use()) == []


def test_a_failed_copy_is_raised() -> None:
    store = make_store(LAYERS, SIZE, lazy=False)
    store.place(ids(1), ON_HOST)
    run(store, prefill_step([1], SIZE))
    store.quiesce()
    store.table.host_page[0, 1] += 10_000
    store.begin(read_step([1], SIZE))
    with pytest.raises(ResidencyError, match="transfer failed"):
        list(store.passes(0))
    store.close()
