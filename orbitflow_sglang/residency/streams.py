"""Transfers on a device that does what it is told later: copies on streams of their own.

Whoever calls runs ahead of the device. Order comes from three queues, one that computes and one
for each direction of the link, and from events between them:

- a copy begins behind everything that compute was asked for before it: so it reads what was
  written, and overwrites only what has been read;
- what compute is asked for behind ``Transfer.wait`` begins behind the copy.

What computes is the stream that is current. Copies are asked for within steps alone; between two,
SGLang's overlap scheduler has another stream current, which the next step begins behind.

A page is handed on only behind a ``wait``, or once its copy is seen to be ``done``; so these
two are enough, also between the two directions: a fetch that somebody waited for is over
before a later write-back to the same host page, which begins behind that compute.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.kernels import PageKernels, run_begins
from orbitflow_sglang.residency.transfer import LinkStats, Transfer, TransferEngine

Event = Any


class Streams(Protocol):
    """A device's queues. ``direction``: 0, to the device; 1, to the host."""

    def compute(self, work: Callable[[], None]) -> None:
        """Queue ``work`` where the model computes."""

    def copy(self, direction: int, work: Callable[[], None]) -> Event:
        """Queue a copy behind all that compute has been asked for; the event is its end."""

    def compute_waits(self, event: Event) -> Event:
        """What compute is asked for from now on comes behind ``event``; the end of its wait."""

    def query(self, event: Event) -> bool:
        """Whether ``event`` has come."""

    def seconds(self, event: Event) -> float:
        """How long the copy, or the wait, that ends with ``event`` took; it has come."""

    def synchronize(self) -> None:
        """Return when both directions are idle."""


class PageCopier(Protocol):
    """Queues copies of pages on the current stream; ids are NumPy arrays that stay as they are."""

    def pages(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        """``target[to[i]] = source[of[i]]``."""

    def rows(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, first: np.ndarray
    ) -> None:
        """Page ``target[to[i]]`` = the rows of ``source`` from ``first[i]`` on."""


class StreamTransfer(Transfer):
    """A copy on a stream. ``waits``: where waiting for it counts as a stall; None: nowhere.
    ``source`` is kept until compute waits for the copy, or it has ended: who is given that memory
    next is behind it then."""

    def __init__(
        self, nbytes: int, streams: Streams, event: Event, waits: deque[Event] | None, source: Any
    ) -> None:
        super().__init__(nbytes)
        self._streams = streams
        self._waits = waits
        self._source = source
        self.event = event

    @property
    def done(self) -> bool:
        if ended := self._streams.query(self.event):
            self._source = None
        return ended

    def wait(self) -> None:
        waited = self._streams.compute_waits(self.event)
        self._source = None
        if self._waits is not None:
            self._waits.append(waited)


class StreamTransferEngine(TransferEngine):
    """Copies of whole pages between an arena on a device and pinned host memory."""

    def __init__(self, arena: Arena, host: HostStore, streams: Streams, copier: PageCopier) -> None:
        self._device = arena.k, arena.v
        self._host = host.k, host.v
        self._page_bytes = sum(t[0].numel() * t.itemsize for t in self._device)
        self._streams = streams
        self._copier = copier
        self._stats = LinkStats(), LinkStats()
        self._under_way: tuple[deque[StreamTransfer], deque[StreamTransfer]] = deque(), deque()
        self._waits: deque[Event] = deque()

    def compute(self, work: Callable[[], None]) -> None:
        self._streams.compute(work)

    def fetch(self, host_pages: np.ndarray, device_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target in zip(self._host, self._device, strict=True):
                self._copier.pages(target, source, device_pages, host_pages)

        return self._submit(0, copy, len(host_pages))

    def write_back(self, device_pages: np.ndarray, host_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target in zip(self._device, self._host, strict=True):
                self._copier.pages(target, source, host_pages, device_pages)

        return self._submit(1, copy, len(host_pages))

    def write_through(
        self, k: torch.Tensor, v: torch.Tensor, first_rows: np.ndarray, host_pages: np.ndarray
    ) -> Transfer:
        def copy() -> None:
            for source, target in zip((k, v), self._host, strict=True):
                self._copier.rows(target, source, host_pages, first_rows)

        return self._submit(1, copy, len(host_pages), source=(k, v))

    def take_stall_s(self) -> float:
        seconds = 0.0
        while self._waits and self._streams.query(self._waits[0]):
            seconds += self._streams.seconds(self._waits.popleft())
        return seconds

    def drain(self) -> None:
        self._streams.synchronize()
        self._count()

    def forget(self) -> None:
        self._count()
        self._stats = LinkStats(), LinkStats()

    def close(self) -> None:
        self._streams.synchronize()

    @property
    def h2d(self) -> LinkStats:
        self._count()
        return self._stats[0]

    @property
    def d2h(self) -> LinkStats:
        self._count()
        return self._stats[1]

    def _submit(
        self, direction: int, copy: Callable[[], None], pages: int, source: Any = None
    ) -> Transfer:
        event = self._streams.copy(direction, copy)
        nbytes, waits = pages * self._page_bytes, None if direction else self._waits
        transfer = StreamTransfer(nbytes, self._streams, event, waits, source)
        self._count()  # where nobody asks for it, ended copies would pile up
        self._under_way[direction].append(transfer)
        return transfer

    def _count(self) -> None:
        """Count the copies that have ended: oldest first, which is how they end."""
        for under_way, stats in zip(self._under_way, self._stats, strict=True):
            while under_way and under_way[0].done:
                transfer = under_way.popleft()
                stats.count(transfer.nbytes, self._streams.seconds(transfer.event))


class CUDAStreams:
    """The queues of a CUDA device: PyTorch's current stream, where the model runs, and two."""

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._streams = stream(device), stream(device)

    def compute(self, work: Callable[[], None]) -> None:
        work()

    def copy(self, direction: int, work: Callable[[], None]) -> Event:
        stream = self._streams[direction]
        stream.wait_stream(torch.cuda.current_stream())
        begin, end = _timer(), _timer()
        with torch.cuda.stream(stream):
            begin.record()
            work()
            end.record()
        return begin, end

    def compute_waits(self, event: Event) -> Event:
        begin, end = _timer(), _timer()
        begin.record()
        torch.cuda.current_stream().wait_event(event[1])
        end.record()
        return begin, end

    def query(self, event: Event) -> bool:
        return bool(event[1].query())

    def seconds(self, event: Event) -> float:
        return float(event[0].elapsed_time(event[1])) / 1e3

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()


class CUDACopier:
    """Long runs of pages by the copy engine, which takes no processor; short ones by a kernel,
    which takes no call for each run. ``least_run`` pages are a long run: measured, see
    ``measured_least_run``."""

    def __init__(self, kernels: PageKernels, device: torch.device, least_run: float) -> None:
        self._kernels = kernels
        self._device = device
        self.least_run = least_run

    def pages(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        if not len(to):
            return
        if len(to) >= self.least_run * len(run_begins(to, of)):
            self._kernels.copy_runs(target, source, to, of)
        else:
            self._kernels.copy_pages(target, source, *self._on_device(to, of))

    def rows(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, first: np.ndarray
    ) -> None:
        if not len(to):
            return
        self._kernels.copy_rows(target, source.contiguous(), *self._on_device(to, first))

    def _on_device(
        self, to: np.ndarray, of: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both ids, and how many, in one small copy."""
        sent = to_device(np.concatenate([to, of, [len(to)]]).astype(np.int32), self._device)
        return sent[: len(to)], sent[len(to) : -1], sent[-1:]


def measured_least_run(
    copier: CUDACopier, arena: Arena, host: HostStore, lengths: tuple[int, ...] = (8, 16, 32)
) -> float:
    """The shortest run of pages from which the copy engine is as fast as the kernel; infinite
    where it never is. Not below 8: each run is a call, on the thread that schedules. Between
    steps, with the arena free; its contents are lost."""
    pages = min(2048, host.num_pages, arena.num_pages)
    for length in lengths:
        spaced = np.arange(pages) // length * (length + 1) + np.arange(pages) % length
        of = spaced[spaced < host.num_pages][:pages]
        to = np.arange(len(of))
        work = functools.partial(copier.pages, arena.k, host.k, to, of)
        copier.least_run = 0.0
        by_copy_engine = _seconds(work)
        copier.least_run = float("inf")
        if by_copy_engine <= _seconds(work):
            return float(length)
    return float("inf")


def _seconds(work: Callable[[], None], repeats: int = 5) -> float:
    """The least time that ``work`` takes on the device, seconds."""
    best = float("inf")
    for _ in range(repeats):
        begin, end = _timer(), _timer()
        begin.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, float(begin.elapsed_time(end)) / 1e3)
    return best


def _timer() -> Any:
    event: Any = torch.cuda.Event
    return event(enable_timing=True)
