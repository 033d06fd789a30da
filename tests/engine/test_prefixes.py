"""Which cached prefixes give way on the host: a real store, and a stand-in for SGLang's radix tree.

A real server does it in test_larger_than_the_arena.py.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.step import Step
from orbitflow_sglang.residency.store import ResidencyStore

LAYERS, SIZE = 2, 4
MAIN, HOST = 4 * LAYERS, 10 * LAYERS


class Tree:
    """Cached leaves of one page each, oldest first."""

    def __init__(self, store: ResidencyStore, pages: list[int]) -> None:
        self.store, self.pages = store, pages
        self.asked: list[int] = []

    def evictable_size(self) -> int:
        return SIZE * len(self.pages)

    def evict(self, params: Any) -> SimpleNamespace:
        self.asked.append(params.num_tokens)
        count = min(len(self.pages), -(-params.num_tokens // SIZE))
        gone, self.pages = self.pages[:count], self.pages[count:]
        self.store.free(np.array(gone))
        return SimpleNamespace(num_tokens_evicted=SIZE * count)


@pytest.fixture
def make_host_room() -> Any:
    return importlib.import_module("orbitflow_sglang.engine.prefixes").make_host_room


def store_with(on_host: list[int], live: list[int], host: int = HOST) -> ResidencyStore:
    """Four pages fill the arena, ``on_host`` have left it; ``live`` ones belong to a request."""
    layout = KVLayout(LAYERS, SIZE, 1, head_dim=2, v_head_dim=2, dtype=torch.float32)
    store = ResidencyStore(layout, Capacity(MAIN + 2, 2, host, 20))
    held = np.array(live, dtype=np.int64)
    everything = [*on_host, *range(11, 15 if host else 13)]
    store.place(np.array(on_host, dtype=np.int64), np.ones(LAYERS, dtype=bool))
    for page in everything:
        rows = np.zeros(1, dtype=np.int64)
        slots = page * SIZE + np.arange(SIZE)
        new = np.array([page])
        store.begin(Step([], [], slots, new_full=new, new_full_rows=rows, idle_pages=held))
        for layer in range(LAYERS):
            store.write(layer, torch.ones(SIZE, 1, 2), torch.ones(SIZE, 1, 2))
        store.end()
    store.begin(Step([], [], np.zeros(1, dtype=np.int64), idle_pages=held))
    store.end()
    store.quiesce()
    return store


def test_the_oldest_on_the_host_give_way_until_the_arena_could_leave(make_host_room: Any) -> None:
    store = store_with(list(range(1, 10)), live=[])
    tree = Tree(store, [*range(1, 10), *range(11, 15)])
    assert store.host.num_free == LAYERS
    make_host_room(tree, store)
    assert store.host.num_free == MAIN and tree.pages == [*range(4, 10), *range(11, 15)]
    make_host_room(tree, store)
    assert tree.asked == [3 * SIZE]
    assert store.check() == []


def test_what_is_cached_in_the_arena_stays_where_requests_fill_the_host(
    make_host_room: Any,
) -> None:
    live = list(range(1, 9))
    store = store_with([*live, 9], live)
    tree = Tree(store, [9, *range(11, 15)])
    for _ in range(3):
        make_host_room(tree, store)
    assert tree.pages == list(range(11, 15))
    assert store.host.num_free == 2 * LAYERS < MAIN


def test_without_a_host_store_nothing_gives_way(make_host_room: Any) -> None:
    store = store_with([], live=[], host=0)
    tree = Tree(store, [11, 12])
    make_host_room(tree, store)
    assert tree.asked == []
