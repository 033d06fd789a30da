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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore

WORD = np.dtype(np.uint64)
ROWS_AT_ONCE = 64  # so that what is copied stays in the cache


@dataclass
class LinkStats:
    """What one direction has moved since start."""

    transfers: int = 0
    bytes: int = 0
    busy_s: float = 0.0

    def count(self, nbytes: int, busy_s: float) -> None:
        """One more transfer, which kept the link busy for ``busy_s``."""
        self.transfers += 1
        self.bytes += nbytes
        self.busy_s += busy_s


class Transfer(ABC):
    """A copy under way. Its source may be read and its target is not valid until it ends."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether the copy has ended well; raises ``ResidencyError`` if it failed."""

    @abstractmethod
    def wait(self) -> None:
        """What compute is asked for from now on comes behind the copy; raises
        ``ResidencyError`` if it failed. The caller is only held up where it computes itself."""


class HostTransfer(Transfer):
    """A copy by this process."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self._ended = threading.Event()
        self._ready_s = 0.0  # when its bytes are across
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        if not self._ended.is_set() or time.perf_counter() < self._ready_s:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise ResidencyError("a KV page transfer failed") from self._error
        if (left := self._ready_s - time.perf_counter()) > 0:
            time.sleep(left)

    def end(self, error: BaseException | None = None, ready_s: float = 0.0) -> None:
        """Called by the engine, once: the copy has ended, well or with ``error``, and counts
        from ``ready_s`` on."""
        self._ready_s, self._error = ready_s, error
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

    def compute(self, work: Callable[[], None]) -> None:
        """Have ``work``, which writes or reads the arena, done in the order of these calls."""
        work()

    def take_stall_s(self) -> float:
        """How long compute has stood still for copies since the last call, as far as it is
        known and whoever asked for it was not held up himself."""
        return 0.0

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


class CPUTransferEngine(TransferEngine):
    """Transfers on a machine without a GPU: a copy thread for each direction, or with
    ``link_bytes_per_s`` two emulated links of that rate."""

    def __init__(self, arena: Arena, host: HostStore, link_bytes_per_s: float | None) -> None:
        self._device = (_as_rows(arena.k), _as_rows(arena.v))
        self._host = (_as_rows(host.k), _as_rows(host.v))
        self._page_size = arena.k.shape[1]
        self._page_bytes = sum(rows[0].nbytes for rows in self._device)
        self._h2d = direction("orbitflow-h2d", link_bytes_per_s)
        self._d2h = direction("orbitflow-d2h", link_bytes_per_s)

    @property
    def h2d(self) -> LinkStats:
        return self._h2d.stats

    @property
    def d2h(self) -> LinkStats:
        return self._d2h.stats

    def fetch(self, host_pages: np.ndarray, device_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target in zip(self._host, self._device, strict=True):
                _copy_rows(source, host_pages, target, device_pages)

        return self._h2d.submit(copy, len(host_pages) * self._page_bytes)

    def write_back(self, device_pages: np.ndarray, host_pages: np.ndarray) -> Transfer:
        def copy() -> None:
            for source, target in zip(self._device, self._host, strict=True):
                _copy_rows(source, device_pages, target, host_pages)

        return self._d2h.submit(copy, len(host_pages) * self._page_bytes)

    def write_through(
        self, k: torch.Tensor, v: torch.Tensor, first_rows: np.ndarray, host_pages: np.ndarray
    ) -> Transfer:
        each = first_rows[:, None] + np.arange(self._page_size)

        def copy() -> None:
            for new, target in zip((k, v), self._host, strict=True):
                pages = _as_bytes(new)[each].reshape(len(each), -1)
                target[host_pages] = pages.view(target.dtype)

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


def _as_rows(pages: torch.Tensor) -> np.ndarray:
    """A NumPy view ``[pages, words]``; of wide words where they fit, which copy faster."""
    rows = _as_bytes(pages.flatten(1))
    return rows.view(WORD) if rows.shape[1] % WORD.itemsize == 0 else rows


def _copy_rows(
    source: np.ndarray, source_rows: np.ndarray, target: np.ndarray, target_rows: np.ndarray
) -> None:
    """``target[target_rows] = source[source_rows]``, in few calls.

    Each call gives the interpreter's lock back and takes it again, which holds up the thread
    that computes: so not one for each contiguous stretch.
    """
    for i in range(0, len(source_rows), ROWS_AT_ONCE):
        rows = slice(i, i + ROWS_AT_ONCE)
        target[target_rows[rows]] = source.take(source_rows[rows], axis=0)


def direction(name: str, link_bytes_per_s: float | None) -> _CopyThread | _EmulatedLink:
    """What carries the copies of one direction."""
    return _CopyThread(name) if link_bytes_per_s is None else _EmulatedLink(link_bytes_per_s)


class _CopyThread:
    """One direction: copies as fast as memory allows, beside compute."""

    def __init__(self, name: str) -> None:
        self.stats = LinkStats()
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], HostTransfer] | None]
        self._queue = queue.SimpleQueue()
        self._last: HostTransfer | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, copy: Callable[[], None], nbytes: int) -> Transfer:
        self._last = HostTransfer(nbytes)
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
            copy, transfer = job
            error, busy_s = _timed(copy)
            self.stats.count(transfer.nbytes, busy_s)
            transfer.end(error)
            del job, copy, transfer  # or the last copy would keep its tensors alive


class _EmulatedLink:
    """One direction of a link of a given rate, whose copies cost compute next to nothing.

    Whoever submits a copy makes it, for beside another thread it would share caches and the
    interpreter's lock; it counts once its bytes would have crossed behind those before it.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.stats = LinkStats()
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0  # when the bytes submitted so far are across
        self._last: HostTransfer | None = None

    def submit(self, copy: Callable[[], None], nbytes: int) -> Transfer:
        self._last = transfer = HostTransfer(nbytes)
        begin_s = max(self._free_s, time.perf_counter())
        error, copied_s = _timed(copy)
        link_s = max(copied_s, nbytes / self._bytes_per_s)
        self._free_s = begin_s + link_s
        self.stats.count(nbytes, link_s)
        transfer.end(error, self._free_s)
        return transfer

    def drain(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.wait()

    def close(self) -> None:
        pass


def _timed(copy: Callable[[], None]) -> tuple[BaseException | None, float]:
    """Makes a copy: what it raised, which is for whoever waits for it, and its seconds."""
    begun = time.perf_counter()
    error: BaseException | None = None
    try:
        copy()
    except BaseException as raised:
        error = raised
    return error, time.perf_counter() - begun
