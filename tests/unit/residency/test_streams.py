"""The store on a device that runs later and in any order that events allow.

The machine of ``test_store_machine`` asks; what it would check at once is queued where the model
computes, so that a read before its copy, or a copy over what is still to be read, is found.
"""

from __future__ import annotations

import math
import os
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import Event, FakeCopier, FakeStreams
from hypothesis import settings
from residency_stores import (
    ids,
    layout,
    make_store,
    number_of,
    prefill_step,
    read_step,
    tokens_read,
    vectors,
)
from test_store_machine import StoreMachine

from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.kernels import TorchKernels, run_begins
from orbitflow_sglang.residency.layout import Capacity
from orbitflow_sglang.residency.store import ResidencyStore
from orbitflow_sglang.residency.streams import CUDACopier, StreamTransferEngine

pytestmark = pytest.mark.unit


def store_on(streams: FakeStreams, **sizes: Any) -> ResidencyStore:
    """A store whose arena is on a fake device."""

    class OnDevice(ResidencyStore):
        @staticmethod
        def new_engine(arena: Arena, host: HostStore, link: float | None) -> StreamTransferEngine:
            return StreamTransferEngine(arena, host, streams, FakeCopier())

    sizes = {key: value for key, value in sizes.items() if key not in ("lazy", "link_bytes_per_s")}
    return make_store(kind=OnDevice, lazy=False, **sizes)


class DeviceMachine(StoreMachine):
    """The same requests; compute and copies happen when the device gets round to them."""

    def _make_store(self, **sizes: Any) -> ResidencyStore:
        seed = self._rng((1, 2, 3)).getrandbits(32)
        self.streams = FakeStreams(seed, most_at_once=random.Random(seed).choice([0, 2, 20]))
        self.lazy = True  # nothing is a matter of timing here either
        return store_on(self.streams, **sizes)

    def _advance(self, h2d: int, d2h: int) -> None:
        for _ in range(h2d + d2h):
            self.streams._step()

    def _compute(self, work: Callable[[], None]) -> None:
        self.store.engine.compute(work)

    def teardown(self) -> None:
        if hasattr(self, "streams"):
            self.streams.finish()
            super().teardown()
            self.streams.finish()


EXAMPLES = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "residency"))
DeviceMachine.TestCase.settings = EXAMPLES
TestDeviceMachine = pytest.mark.unit(DeviceMachine.TestCase)


def _swapped(streams: FakeStreams) -> list[list[int]]:
    """A prefill whose pages go to the host and come back for a pass that reads them."""
    store = store_on(streams, main=6, ring=4)
    size, layers = store.layout.page_size, store.layout.layers
    store.place(ids(1, 2), np.array([False, True, True]))
    found: list[list[int]] = []
    for step in (prefill_step([1, 2], size), read_step([1, 2], size), read_step([1, 2], size)):
        store.begin(step)
        for layer in range(layers):
            k, v = vectors(layer, number_of(step.slots))
            store.write(layer, k, v)
            for part in store.passes(layer):
                if step.read_tokens[0]:
                    store.engine.compute(
                        lambda part=part, layer=layer: found.append(tokens_read(part, 0, layer))
                    )
        store.end()
    streams.finish()
    assert store.check() == []
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_pass_reads_what_was_written_however_late_copies_are(seed: int) -> None:
    wanted = number_of(np.arange(2, 6)).tolist()
    assert all(sorted(numbers) == wanted for numbers in _swapped(FakeStreams(seed)))


def test_copies_that_do_not_wait_for_compute_are_found_out() -> None:
    """The test can fail: without the event a page is written back before it was written."""
    wanted = number_of(np.arange(2, 6)).tolist()
    failed = 0
    for seed in range(20):
        try:
            found = _swapped(FakeStreams(seed, ordered=False))
            failed += any(sorted(numbers) != wanted for numbers in found)
        except AssertionError:  # a mix of tokens
            failed += 1
    assert failed > 10


def test_reads_that_do_not_wait_for_their_copy_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeStreams, "compute_waits", lambda self, event: Event(come=True))
    wanted = number_of(np.arange(2, 6)).tolist()
    failed = 0
    for seed in range(20):
        try:
            found = _swapped(FakeStreams(seed))
            failed += any(sorted(numbers) != wanted for numbers in found)
        except AssertionError:
            failed += 1
    assert failed > 10


def test_what_has_moved_is_counted_once_it_has() -> None:
    streams = FakeStreams(0)
    arena_layout = layout()
    capacity = Capacity(12, 4, 8, 6)
    arena, host = Arena(arena_layout, capacity, "cpu"), HostStore(arena_layout, 8)
    engine = StreamTransferEngine(arena, host, streams, FakeCopier())
    transfer = engine.write_back(np.array([3, 4]), np.array([0, 1]))
    assert not transfer.done and engine.d2h.bytes == 0
    engine.drain()
    assert transfer.done
    assert (engine.d2h.transfers, engine.d2h.bytes) == (1, 2 * arena_layout.page_bytes)
    engine.forget()
    assert engine.d2h.transfers == 0
    engine.close()


@pytest.mark.parametrize("by", ["wait", "done"])
def test_what_a_copy_reads_is_kept_until_it_cannot_be_overwritten(by: str) -> None:
    """Until compute waits for the copy, or the copy has ended: and then no longer."""
    streams = FakeStreams(0)
    store = store_on(streams, layers=2, page_size=2, main=8, ring=4)
    k, v = vectors(0, np.arange(2))
    sources = [weakref.ref(k), weakref.ref(v)]
    transfer = store.engine.write_through(k, v, ids(0), ids(1))
    del k, v
    streams.finish()
    assert all(source() is not None for source in sources)
    assert transfer.done if by == "done" else transfer.wait() is None
    assert all(source() is None for source in sources)


def test_what_compute_has_waited_is_counted_once_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeStreams, "seconds", lambda self, event: 0.25)
    streams = FakeStreams(0)
    store = store_on(streams, layers=2, page_size=2, main=8, ring=4)
    transfer = store.engine.fetch(ids(0), ids(store.arena.ring_start))
    transfer.wait()
    assert store.engine.take_stall_s() == 0, "compute has not got there"
    streams.finish()
    store.ring.note_stall()
    assert store.ring.stall_s == 0.25
    assert store.engine.take_stall_s() == 0, "taken"
    store.engine.write_back(ids(0), ids(1)).wait()
    streams.finish()
    assert store.engine.take_stall_s() == 0, "no step is late for what leaves the device"


def test_copies_that_ended_are_forgotten_though_nobody_counts_them() -> None:
    streams = FakeStreams(0)
    store = store_on(streams, layers=2, page_size=2, main=8, ring=4)
    engine = store.engine
    assert isinstance(engine, StreamTransferEngine)
    for _ in range(9):
        engine.write_back(ids(0), ids(1))
        streams.finish()
    assert sum(map(len, engine._under_way)) == 1


@pytest.mark.parametrize("least_run", [1.0, 3.0, math.inf])
@pytest.mark.parametrize("to", [[], [5], [2, 3, 4, 7, 0]])
def test_pages_are_copied_in_runs_of_any_length_and_none(least_run: float, to: list[int]) -> None:
    source, of = torch.arange(40.0).reshape(10, 4), np.arange(len(to))
    target = torch.zeros_like(source)
    copier = CUDACopier(TorchKernels(), torch.device("cpu"), least_run)
    copier.pages(target, source, np.array(to, dtype=int), of)
    wanted = torch.zeros_like(source)
    wanted[to] = source[: len(to)]
    assert torch.equal(target, wanted)


def test_runs_are_stretches_in_which_both_sides_go_up_by_one() -> None:
    assert run_begins(np.array([4, 5, 6, 9, 10]), np.array([0, 1, 2, 3, 4])) == [0, 3]
    assert run_begins(np.array([4, 5, 6]), np.array([7, 8, 3])) == [0, 2]
    assert run_begins(np.array([4, 3]), np.array([1, 0])) == [0, 1]
    assert run_begins(np.array([], dtype=int), np.array([], dtype=int)) == []
