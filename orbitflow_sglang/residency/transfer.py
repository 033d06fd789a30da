"""Moving pages between arena and host store while the model computes.

Each direction is one first-in first-out queue. That order is what makes it safe
to hand a page out again while a copy that nobody waits for any more still reads
or writes it: whatever overwrites the page is queued behind it, and no page is
called valid before the copy that fills it has ended.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore


@dataclass
class LinkStats:
    """What one direction has moved since start."""

    transfers: int = 0
    bytes: int = 0
    busy_s: float = 0.0


class Transfer:
    """A copy under way. Its source may be read and its target is not valid until it ends."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.submitted_s = time.perf_counter()
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the copy has ended well; raises ``ResidencyError`` if it failed."""
        if self._ended.is_set():
            self.wait()
        return self._ended.is_set()

    def wait(self) -> None:
        """Block until the copy has ended; raises ``ResidencyError`` if it failed."""
        self._ended.wait()
        if self._error is not None:
            raise ResidencyError("a KV page transfer failed") from self._error

    def end(self, error: BaseException | None = None) -> None:
        """Called by the engine, once: the copy has ended, well or with ``error``."""
        self._error = error
        self._ended.set()


class TransferEngine(ABC):
    """Copies of whole pages, K and V together. Page ids are physical.

    A copy is queued at once and in the order of the calls; what goes wrong with it
    is raised by its ``Transfer`` alone. The id arrays must not change afterwards.
    """

    @abstractmethod
    def fetch(self, host_pages: np.ndarray, device_pages: np.ndarray) -> Transfer:
        """H2D: host page i to arena page i."""

    @abstractmethod
    def write_back(self, device_pages: np.ndarray, host_pages: np.ndarray) -> Transfer:
        """D2H: arena page i to host page i."""

    @abstractmethod
    def write_through(
        self, k: torch.Tensor, v: torch.Tensor, first_rows: np.ndarray, host_pages: np.ndarray
    ) -> Transfer:
        """D2H straight from a step's new K and V, ``[tokens, kv_heads, dim]``.

        Page i is the ``page_size`` rows from ``first_rows[i]``. The tensors have the
        store's dtype; they stay alive, and must not be written, until the copy ends.
        """

    @abstractmethod
    def drain(self) -> None:
        """Return when nothing is under way; raises once if the last copy of one failed."""

    @abstractmethod
    def forget(self) -> None:
        """Count from zero again; nothing may be under way."""

    @abstractmethod
    def close(self) -> None:
        """Stop; copies still queued are completed first."""

    @property
    @abstractmethod
    def h2d(self) -> LinkStats: ...

    @property
    @abstractmethod
    def d2h(self) -> LinkStats: ...


class ThreadTransferEngine(TransferEngine):
    """Transfers on a machine without a GPU: a copy thread for each direction.

    ``link_bytes_per_s`` emulates a link: a copy then ends no sooner than its
    bytes would have crossed a link of that rate behind the copies before it. The
    thread sleeps meanwhile, so that compute goes on beside it.
    """

    def __init__(self, arena: Arena, host: HostStore, link_bytes_per_s: float | None) -> None:
        self._device = (_as_bytes(arena.k), _as_bytes(arena.v))
        self._host = (_as_bytes(host.k), _as_bytes(host.v))
        self._page_bytes = sum(t[0].nbytes for t in self._device)
        self._h2d = _CopyThread("orbitflow-h2d", link_bytes_per_s)
        self._d2h = _CopyThread("orbitflow-d2h", link_bytes_per_s)

    @property
    def h2d(self) -> LinkStats:
        return self._h2d.stats

    @property
    def d2h(self) -> LinkStats:
        return self._d2h.stats

    def fetch(self, host_pages: np.ndarray, device_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target, count in _runs(host_pages, device_pages):
                for src, dst in zip(self._host, self._device, strict=True):
                    dst[target : target + count] = src[source : source + count]

        return self._h2d.submit(copy, len(host_pages) * self._page_bytes)

    def write_back(self, device_pages: np.ndarray, host_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target, count in _runs(device_pages, host_pages):
                for src, dst in zip(self._device, self._host, strict=True):
                    dst[target : target + count] = src[source : source + count]

        return self._d2h.submit(copy, len(host_pages) * self._page_bytes)

    def write_through(
        self, k: torch.Tensor, v: torch.Tensor, first_rows: np.ndarray, host_pages: np.ndarray
    ) -> Transfer:
        rows = (_as_bytes(k), _as_bytes(v))
        page_size = self._host[0].shape[1]

        def copy() -> None:
            for first, target, count in _runs(first_rows, host_pages, page_size):
                for src, dst in zip(rows, self._host, strict=True):
                    page_rows = src[first : first + count * page_size]
                    dst[target : target + count] = page_rows.reshape(count, *dst.shape[1:])

        return self._d2h.submit(copy, len(host_pages) * self._page_bytes)

    def drain(self) -> None:
        try:
            self._h2d.drain()
        finally:
            self._d2h.drain()

    def forget(self) -> None:
        self._h2d.stats = LinkStats()
        self._d2h.stats = LinkStats()

    def close(self) -> None:
        self._h2d.close()
        self._d2h.close()


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy view of any dtype's bytes: its copies release the interpreter's lock."""
    return tensor.detach().view(torch.uint8).numpy()


def _runs(
    sources: np.ndarray, targets: np.ndarray, source_step: int = 1
) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, length) of every stretch contiguous on both sides."""
    if not len(sources):
        return
    breaks = (np.diff(sources) != source_step) | (np.diff(targets) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1]).tolist()
    ends = [*starts[1:], len(sources)]
    for start, end in zip(starts, ends, strict=True):
        yield int(sources[start]), int(targets[start]), end - start


@dataclass
class _CopyThread:
    name: str
    link_bytes_per_s: float | None
    stats: LinkStats = field(default_factory=LinkStats)

    def __post_init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], Transfer] | None]
        self._queue = queue.SimpleQueue()
        self._last: Transfer | None = None
        self._link_free_s = 0.0
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def submit(self, copy: Callable[[], None], nbytes: int) -> Transfer:
        self._last = Transfer(nbytes)
        self._queue.put((copy, self._last))
        return self._last

    def drain(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.wait()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            self._perform(*job)
            del job  # or the last copy would keep its tensors alive until there is another

    def _perform(self, copy: Callable[[], None], transfer: Transfer) -> None:
        begun = time.perf_counter()
        error: BaseException | None = None
        try:
            copy()
            if self.link_bytes_per_s is not None:
                self._emulate_link(transfer, self.link_bytes_per_s)
        except BaseException as raised:  # handed to whoever waits for the copy
            error = raised
        self.stats.transfers += 1
        self.stats.bytes += transfer.nbytes
        self.stats.busy_s += time.perf_counter() - begun
        transfer.end(error)

    def _emulate_link(self, transfer: Transfer, bytes_per_s: float) -> None:
        # Counted from the hand-over, not from waking up, or oversleeping would add up.
        begin = max(self._link_free_s, transfer.submitted_s)
        self._link_free_s = begin + transfer.nbytes / bytes_per_s
        if (left := self._link_free_s - time.perf_counter()) > 0:
            time.sleep(left)
