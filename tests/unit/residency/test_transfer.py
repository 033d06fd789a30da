from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from residency_stores import ids

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.transfer import CPUTransferEngine

SIZE = 2
LAYOUT = KVLayout(2, SIZE, 2, head_dim=4, v_head_dim=6, dtype=torch.bfloat16)


@pytest.fixture
def parts() -> tuple[Arena, HostStore]:
    arena = Arena(LAYOUT, Capacity(12, 2, 10, 10), "cpu")
    host = HostStore(LAYOUT, 10)
    for tensor in (arena.k, arena.v, host.k, host.v):
        tensor.copy_(torch.randn(tensor.shape))
    return arena, host


def engine_of(parts: tuple[Arena, HostStore], rate: float | None = None) -> CPUTransferEngine:
    return CPUTransferEngine(*parts, rate)


@pytest.mark.parametrize("heads", [1, 2])  # V pages of 12 bytes a token, or of 24
def test_many_scattered_pages_of_any_width(heads: int) -> None:
    layout = KVLayout(1, 1, heads, head_dim=4, v_head_dim=6, dtype=torch.bfloat16)
    arena, host = Arena(layout, Capacity(400, 2, 400, 400), "cpu"), HostStore(layout, 400)
    for tensor in (arena.k, arena.v, host.k, host.v):
        tensor.copy_(torch.randn(tensor.shape))
    engine = CPUTransferEngine(arena, host, None)
    order = np.random.default_rng(0).permutation(400)
    source, target = order[:150], order[150:300]
    engine.fetch(source, target).wait()
    for on_device, on_host in ((arena.k, host.k), (arena.v, host.v)):
        assert torch.equal(on_device[target], on_host[source])
    engine.close()


@pytest.mark.parametrize("rate", [None, 1e7])
def test_bytes_in_order(parts: tuple[Arena, HostStore], rate: float | None) -> None:
    arena, host = parts
    engine = engine_of(parts, rate)
    k, v = arena.k[[4, 5, 9]].clone(), arena.v[[4, 5, 9]].clone()
    first = engine.write_back(ids(4, 5, 9), ids(2, 3, 7))
    second = engine.write_back(ids(9), ids(2))  # behind the first: it is what remains
    second.wait()
    assert first.done and second.done
    assert torch.equal(host.k[[3, 7, 2]], k[[1, 2, 2]])
    assert torch.equal(host.v[[3, 7, 2]], v[[1, 2, 2]])
    engine.fetch(ids(7, 3), ids(10, 11)).wait()
    assert torch.equal(arena.k[10:12], k[[2, 1]]) and torch.equal(arena.v[10:12], v[[2, 1]])
    assert (engine.d2h.transfers, engine.d2h.bytes) == (2, 4 * LAYOUT.page_bytes)
    assert (engine.h2d.transfers, engine.h2d.bytes) == (1, 2 * LAYOUT.page_bytes)
    engine.close()


def test_a_copy_over_an_emulated_link_counts_when_its_bytes_are_across(
    parts: tuple[Arena, HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    slept: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr("orbitflow_sglang.residency.transfer.time", clock)
    engine = engine_of(parts, rate=LAYOUT.page_bytes / 2)  # two seconds a page
    first, second = engine.fetch(ids(1), ids(10)), engine.fetch(ids(2, 3), ids(10, 11))
    other_way = engine.write_back(ids(4), ids(4))
    now[0] = 101.9
    assert not (first.done or second.done or other_way.done)
    now[0] = 102.1
    assert first.done and other_way.done and not second.done, "one behind the other"
    second.wait()
    assert slept == pytest.approx([106 - 102.1])
    now[0] = 106.1
    assert second.done
    now[0] = 200.0
    late = engine.fetch(ids(1), ids(10))
    now[0] = 201.9
    assert not late.done, "the link has stood idle, and saved up nothing"
    assert (engine.h2d.busy_s, engine.d2h.busy_s) == (8.0, 2.0)


def test_write_through_from_strided_tensors(parts: tuple[Arena, HostStore]) -> None:
    _, host = parts
    engine = engine_of(parts)
    both = torch.randn(9, 2, 10).bfloat16()  # as K and V come out of one projection
    k, v = both[..., :4], both[..., 4:]
    engine.write_through(k, v, ids(1, 3, 6), ids(4, 5, 0)).wait()
    for page, row in ((4, 1), (5, 3), (0, 6)):
        assert torch.equal(host.k[page], k[row : row + SIZE])
        assert torch.equal(host.v[page], v[row : row + SIZE])
    engine.close()


def test_nothing_to_copy(parts: tuple[Arena, HostStore]) -> None:
    engine = engine_of(parts)
    engine.fetch(ids(), ids()).wait()
    engine.write_back(ids(), ids()).wait()
    assert engine.h2d.bytes == engine.d2h.bytes == 0
    engine.close()


def test_error_is_raised_by_its_own_transfer(parts: tuple[Arena, HostStore]) -> None:
    engine = engine_of(parts)
    engine.drain()  # of nothing
    wrong = engine.fetch(ids(10_000), ids(1))
    right = engine.fetch(ids(1), ids(10))
    right.wait()
    assert right.done
    with pytest.raises(ResidencyError, match="transfer failed"):
        wrong.wait()
    with pytest.raises(ResidencyError, match="transfer failed"):
        _ = wrong.done
    engine.drain()
    engine.fetch(ids(10_000), ids(1))
    with pytest.raises(ResidencyError, match="transfer failed"):
        engine.drain()
    engine.close()


def test_directions_do_not_wait_for_each_other(parts: tuple[Arena, HostStore]) -> None:
    engine, gate = engine_of(parts), threading.Event()
    held = engine._d2h.submit(lambda: assert_opens(gate), 0)
    engine.fetch(ids(1), ids(10)).wait()
    assert not held.done
    gate.set()
    held.wait()
    engine.close()


def assert_opens(gate: threading.Event) -> None:
    assert gate.wait(30)


def test_tensors_live_until_their_copy_ends_and_no_longer(parts: tuple[Arena, HostStore]) -> None:
    engine, gate = engine_of(parts), threading.Event()
    engine._d2h.submit(lambda: assert_opens(gate), 0)
    k, v = torch.zeros(2, 2, 4).bfloat16(), torch.zeros(2, 2, 6).bfloat16()
    array = np.zeros(1)
    kept = weakref.ref(array)
    transfer = engine.write_through(k, v, ids(0), ids(0))
    last = engine._d2h.submit(lambda held=array: None, 0)
    del array
    assert kept() is not None
    gate.set()
    transfer.wait()
    last.wait()
    engine.close()  # the thread has come back for its next copy
    gc.collect()
    assert kept() is None
