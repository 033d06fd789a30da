from __future__ import annotations

import numpy as np
from residency_stores import ids, layout

from orbitflow_sglang.residency.host_store import RUN_PAGES, HostStore


def make_host(groups: int = 4, rest: int = 0) -> HostStore:
    return HostStore(layout(), groups * RUN_PAGES + rest)


def test_streams_stay_contiguous() -> None:
    """Two streams that grow in turn, each naming its last page, are a run each."""
    host = make_host()
    streams: list[list[int]] = [[], []]
    for _ in range(RUN_PAGES // 2):
        for stream in streams:
            stream += host.take(2, stream[-1] if stream else -1).tolist()
    for stream in streams:
        assert stream == list(range(stream[0], stream[0] + RUN_PAGES))


def test_a_long_take_is_runs_of_whole_groups() -> None:
    host = make_host()
    assert host.take(2 * RUN_PAGES + 3).tolist() == list(range(2 * RUN_PAGES + 3))


def test_a_hint_that_cannot_be_followed() -> None:
    host = make_host()
    first = host.take(2)
    host.take(1, int(first[1]))
    assert host.take(1, int(first[1])).tolist() == [RUN_PAGES], "its next page is taken"
    last_of_group = host.take(RUN_PAGES - 3, int(first[1]) + 1)[-1]
    assert last_of_group == RUN_PAGES - 1
    assert host.take(1, int(last_of_group)).tolist() == [2 * RUN_PAGES]


def test_pages_of_one_layer_go_on_behind_its_first_hint() -> None:
    host = make_host(groups=2)
    first, second = host.take(1)[0], RUN_PAGES
    assert host.take_by_layer(ids(1, 0, 1, 0), ids(-1, first, first, 7)).tolist() == [
        *(second, first + 1, second + 1, first + 2)
    ]
    layers = ids(*[0] * 2 * RUN_PAGES)
    taken = host.take_by_layer(layers, np.full(len(layers), -1))
    assert sorted(taken[:-5]) == sorted(set(range(2 * RUN_PAGES)) - {0, 1, 2, second, second + 1})
    assert taken[-5:].tolist() == [-1] * 5, "the store is full"


def test_full() -> None:
    host = make_host(groups=1, rest=3)
    assert sorted(host.take(100, 4).tolist()) == list(range(RUN_PAGES + 3))
    assert host.num_free == 0
    assert len(host.take(1)) == len(host.take(1, 0)) == 0
    host.give(ids(RUN_PAGES + 1, 5))
    assert host.num_free == 2
    assert host.is_free(ids(5, 6)).tolist() == [True, False]
    assert sorted(host.take(5, RUN_PAGES).tolist()) == [5, RUN_PAGES + 1]


def test_a_group_given_back_is_a_run_again() -> None:
    host = make_host(groups=2)
    taken = host.take(2 * RUN_PAGES)
    host.give(np.random.default_rng(0).permutation(taken[:RUN_PAGES]))
    assert host.take(RUN_PAGES).tolist() == list(range(RUN_PAGES))


def test_no_pages_at_all() -> None:
    host = make_host(groups=0)
    assert len(host.take(1)) == 0
    host.give(ids())
    assert host.num_free == 0
