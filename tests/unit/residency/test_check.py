"""Each invariant, broken by hand in a store that has pages in every state, says so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from residency_stores import ids, make_store, prefill_step, read_step, run, settle

from orbitflow_sglang.residency.page_table import PageState
from orbitflow_sglang.residency.store import ResidencyStore, Step

LAYERS, SIZE = 3, 2
# Pages of the store below, by the state they are in in every layer.
DEVICE, HOST, BOTH, TO_DEVICE, TO_HOST, FREE = 1, 2, 3, 4, 5, 6


@pytest.fixture
def store() -> ResidencyStore:
    store = make_store(LAYERS, SIZE, main=30, ring=8)
    host, device = np.ones(LAYERS, dtype=bool), np.zeros(LAYERS, dtype=bool)
    store.place(ids(HOST, BOTH, TO_DEVICE), host)
    run(store, prefill_step([DEVICE, HOST, BOTH, TO_DEVICE, TO_HOST], SIZE))
    settle(store, [HOST, BOTH, TO_DEVICE])
    store.place(ids(BOTH), device)
    run(store, read_step([BOTH], SIZE, idle_pages=ids(TO_DEVICE)))
    run(store, read_step([TO_DEVICE], SIZE))
    store.place(ids(TO_HOST), host)
    store.begin(Step([ids(TO_DEVICE)], [SIZE], ids(0), idle_pages=ids(TO_HOST)))
    for layer in range(LAYERS):
        list(store.passes(layer))
    store.end()
    for page, state in enumerate(("DEVICE", "HOST", "BOTH", "TO_DEVICE", "TO_HOST", "FREE"), 1):
        assert {PageState(s).name for s in store.table.state[:, page]} == {state}
    assert store.check() == []
    return store


def used_in_some_layers(store: ResidencyStore) -> None:
    store.table.state[1, DEVICE] = PageState.FREE


def device_without(store: ResidencyStore) -> None:
    store.table.device_page[0, DEVICE] = -1


def host_with_arena_page(store: ResidencyStore) -> None:
    store.table.device_page[0, HOST] = store.arena.take_pages(1)[0]


def both_without_host_page(store: ResidencyStore) -> None:
    store.table.host_page[0, BOTH] = -1


def device_with_host_page(store: ResidencyStore) -> None:
    store.table.host_page[0, DEVICE] = store.host.take(1)[0]


def staged_between_steps(store: ResidencyStore) -> None:
    store.table.state[0, TO_DEVICE] = PageState.STAGED


def ring_page_kept(store: ResidencyStore) -> None:
    store.table.state[0, TO_DEVICE] = PageState.BOTH


def copy_forgotten(store: ResidencyStore) -> None:
    store._write_backs._under_way.clear()


def copy_of_another(store: ResidencyStore) -> None:
    store.table.state[0, TO_HOST] = PageState.BOTH


def fetch_forgotten(store: ResidencyStore) -> None:
    store.ring._ahead[0].clear()


def fetched_elsewhere(store: ResidencyStore) -> None:
    pages = store.table.device_page
    pages[[0, 1], TO_DEVICE] = pages[[1, 0], TO_DEVICE]


def arena_page_lost(store: ResidencyStore) -> None:
    store.arena.take_pages(1)


def arena_page_twice(store: ResidencyStore) -> None:
    store.table.device_page[0, BOTH] = store.table.device_page[1, BOTH]


def padding_handed_out(store: ResidencyStore) -> None:
    store.table.device_page[0, BOTH] = 0


def host_page_twice(store: ResidencyStore) -> None:
    store.table.host_page[0, HOST] = store.table.host_page[1, HOST]


def host_page_free(store: ResidencyStore) -> None:
    store.host.give(store.table.host_page[:1, HOST])


def host_page_lost(store: ResidencyStore) -> None:
    store.host.take(2)


def host_miscounted(store: ResidencyStore) -> None:
    store.host.num_free += 1


def not_in_its_extent(store: ResidencyStore) -> None:
    pages = store.table.device_page
    pages[[0, 1], DEVICE] = pages[[1, 0], DEVICE]


@pytest.mark.parametrize(
    ("corrupt", "sentence"),
    [
        (used_in_some_layers, "a page is in use in some layers only"),
        (device_without, "DEVICE pages without an arena page"),
        (host_with_arena_page, "HOST pages with an arena page"),
        (both_without_host_page, "BOTH pages without a host page"),
        (device_with_host_page, "DEVICE pages with a host page"),
        (staged_between_steps, "a page is staged for a pass that is over"),
        (ring_page_kept, "a ring page outlives its pass"),
        (copy_forgotten, "TO_HOST pages with no copy under way"),
        (copy_of_another, "a copy to the host is under way for pages that are not TO_HOST"),
        (fetch_forgotten, "other pages are fetched than those that are TO_DEVICE"),
        (fetched_elsewhere, "a page is being fetched to where the table does not say"),
        (arena_page_lost, "1 arena pages have no owner"),
        (arena_page_twice, "1 arena pages have two owners"),
        (padding_handed_out, "the padding extent was handed out"),
        (host_page_twice, "a host page has two owners"),
        (host_page_free, "a host page in use is marked free"),
        (host_page_lost, "2 host pages have no owner"),
        (host_miscounted, "host pages are free, counted as"),
        (not_in_its_extent, "a page is not where its extent says"),
    ],
)
def test_corruption_is_reported(
    store: ResidencyStore, corrupt: Callable[[ResidencyStore], None], sentence: str
) -> None:
    corrupt(store)
    assert any(sentence in found for found in store.check()), store.check()
