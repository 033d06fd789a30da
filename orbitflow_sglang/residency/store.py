"""The one owner of every page's state: allocation, placement, movement, release.

The engine above speaks of *logical* pages, one id for all layers. The store
decides nothing: a policy says which pages should live on the host in which layers
(``place``), and the store brings that about without ever losing a page's only
copy. Between two steps every page in use is in the arena, in the host store, or
in both, in every layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.check import violations
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.page_table import PageState, PageTable
from orbitflow_sglang.residency.staging import StagingRing
from orbitflow_sglang.residency.transfer import ThreadTransferEngine, Transfer

NO_PAGES = np.empty(0, dtype=np.int64)
# Layers whose new KV may be on its way to the host at once. It bounds the memory
# that a prefill on a slow link holds; more would not make the link faster.
WRITE_THROUGH_LAYERS = 2


@dataclass
class Step:
    """One forward pass, in logical pages. All arrays are int64."""

    reads: list[np.ndarray]  # per request: pages with the tokens it attends to, in order
    read_tokens: list[int]  # per request: tokens of those pages
    slots: np.ndarray  # token slots written, one per row of K and V
    new_tails: np.ndarray = NO_PAGES  # new pages that stay open behind this pass
    new_full: np.ndarray = NO_PAGES  # new pages that this pass fills
    new_full_rows: np.ndarray = NO_PAGES  # first row of K and V of each of ``new_full``
    open_pages: np.ndarray = NO_PAGES  # tails of live requests: they stay in the arena
    idle_pages: np.ndarray = NO_PAGES  # pages of live requests outside this pass


@dataclass
class LayerPass:
    """A part of one layer's attention: what may be read at once.

    ``pages[i]`` are arena pages of request i holding ``tokens[i]`` tokens, the last
    page perhaps partly filled. ``k`` and ``v`` are what the page ids index.
    """

    k: torch.Tensor
    v: torch.Tensor
    pages: list[torch.Tensor]
    tokens: list[int]


@dataclass
class _WriteBack:
    """Host copies under way: of pages (layer, page) as they were owned at the time."""

    transfer: Transfer
    layers: np.ndarray
    pages: np.ndarray
    generation: np.ndarray


class ResidencyStore:
    """KV pages of one rank. Not thread-safe: the scheduler's thread owns it."""

    def __init__(
        self,
        layout: KVLayout,
        capacity: Capacity,
        device: str = "cpu",
        link_bytes_per_s: float | None = None,
    ) -> None:
        self.layout = layout
        self.capacity = capacity
        self.table = PageTable(layout.layers, capacity.logical_pages)
        self.arena = Arena(layout, capacity, device)
        self.host = HostStore(layout, capacity.host_pages, pinned=device != "cpu")
        self.engine = ThreadTransferEngine(self.arena, self.host, link_bytes_per_s)
        self.ring = StagingRing(
            self.table, self.arena, self.engine, self._grant_home, self._await_host
        )
        # Arena pages kept free for the tails of the next steps: nothing is fetched into them.
        self.reserve_pages = 0
        self.step: Step | None = None
        self._write_backs: deque[_WriteBack] = deque()
        self._clock = 0

    # --- ownership ------------------------------------------------------------

    @property
    def uniform(self) -> bool:
        """Whether every page in use is resident in one extent, and nothing is under way."""
        return self.table.scattered == 0 and not self._write_backs

    def place(self, pages: np.ndarray, on_host: np.ndarray) -> None:
        """Ask that ``pages`` live on the host in the layers where ``on_host[l]``."""
        self.table.want_host[:, pages] = on_host[:, None]

    def free(self, pages: np.ndarray) -> None:
        """Give up ``pages`` in every layer, wherever they are."""
        table = self.table
        if not table.in_use[pages].all():
            raise ResidencyError(f"freeing pages nobody owns: {pages[~table.in_use[pages]]}")
        self.ring.forget(pages)
        starts = table.extent[pages]
        self.arena.give_extents(starts[starts >= 0])
        device = table.device_page[:, pages[starts < 0]]
        self.arena.give_pages(device[device >= 0])
        host = table.host_page[:, pages]
        self.host.give(host[host >= 0])
        table.release(pages)

    def clear(self) -> None:
        """Give up every page."""
        self.free(self.table.pages_in_use())
        self.quiesce()

    # --- one step -------------------------------------------------------------

    def begin_uniform(self, new_pages: np.ndarray) -> bool:
        """Open ``new_pages`` when that needs neither copies nor tables; False if it would."""
        if self.uniform and self.arena.num_free >= len(new_pages) * self.layout.layers:
            self._open(new_pages, np.zeros((self.layout.layers, len(new_pages)), bool))
        return self.uniform and bool(self.table.in_use[new_pages].all())

    def begin(self, step: Step) -> None:
        """Open the pages that ``step`` writes and start fetching those it reads."""
        self.step = step
        self._clock += 1
        self._retire()
        batch = np.unique(np.concatenate([*step.reads, step.new_tails, step.new_full]))
        batch = batch[self.table.in_use[batch]]
        self.table.last_used[batch] = self._clock
        closed = np.setdiff1d(batch, step.open_pages)
        live = np.union1d(closed, np.setdiff1d(step.idle_pages, step.open_pages))
        self._settle(live)
        self._open_new(step, live)
        self._settle_cached(live, step.open_pages)
        state = self.table.state[:, batch]
        away = (state == PageState.HOST) | (state == PageState.STAGED)
        away |= state == PageState.TO_DEVICE
        away |= (state == PageState.TO_HOST) & (self.table.device_page[:, batch] < 0)
        self.ring.begin([batch[row] for row in away])

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the step's new K and V of one layer, ``[tokens, kv_heads, dim]``."""
        step, table, size = self.step, self.table, self.layout.page_size
        assert step is not None
        pages = table.device_page[layer, step.slots // size]
        rows = np.flatnonzero(pages >= 0)
        slots = torch.from_numpy(pages[rows] * np.int64(size) + step.slots[rows] % size)
        everything = len(rows) == len(pages)
        for new, arena in ((k, self.arena.k), (v, self.arena.v)):
            kept = new if everything else new[torch.from_numpy(rows)]
            arena.view(-1, *arena.shape[2:])[slots] = kept
        if len(step.new_full):
            self._write_through(step, layer, k, v)

    def passes(self, layer: int) -> Iterator[LayerPass]:
        """The parts in which ``layer`` is attended. A part is valid until the next is asked for."""
        step, ring = self.step, self.ring
        assert step is not None
        pieces = ring.pieces(layer)
        if ring.in_one_pass(layer):
            for piece in pieces:
                ring.wait(piece)
            yield self._pass(layer, step.reads, step.read_tokens)
            for piece in pieces:
                ring.release(piece)
        else:
            staged = np.concatenate([piece.pages for piece in pieces])
            yield self._part(layer, staged, invert=True)
            for piece in pieces:
                ring.wait(piece)
                yield self._part(layer, piece.pages)
                ring.release(piece)
                ring.pump(layer)
        ring.pump(layer + 1)

    def end(self) -> None:
        """The forward pass is over."""
        self.ring.end()
        self.step = None

    # --- checks ---------------------------------------------------------------

    def quiesce(self) -> None:
        """Finish what is under way and drop what was fetched ahead."""
        self.ring.clear()
        self.engine.drain()
        self._retire()

    def check(self) -> list[str]:
        """Violated invariants, in words; empty when all hold. Call between steps."""
        return violations(self.table, self.arena, self.host, self.ring)

    @property
    def transfers_under_way(self) -> int:
        return len(self._write_backs)

    def close(self) -> None:
        self.engine.close()

    # --- reading --------------------------------------------------------------

    def _pass(self, layer: int, reads: list[np.ndarray], tokens: list[int]) -> LayerPass:
        ids = self.table.device_page[layer, np.concatenate(reads)]
        pages = torch.from_numpy(ids).split([len(r) for r in reads])
        return LayerPass(self.arena.k, self.arena.v, list(pages), tokens)

    def _part(self, layer: int, pages: np.ndarray, invert: bool = False) -> LayerPass:
        """Only those pages of every request that are in ``pages`` (or are not)."""
        step, size = self.step, self.layout.page_size
        assert step is not None
        reads, tokens = [], []
        for read, total in zip(step.reads, step.read_tokens, strict=True):
            chosen = np.isin(read, pages, invert=invert)
            reads.append(read[chosen])
            unfilled = len(read) * size - total if len(read) and chosen[-1] else 0
            tokens.append(len(reads[-1]) * size - unfilled)
        return self._pass(layer, reads, tokens)

    # --- opening pages --------------------------------------------------------

    def _open_new(self, step: Step, live: np.ndarray) -> None:
        """Places for the pages that the step writes: arena, or host for full ones placed there."""
        pages = np.concatenate([step.new_tails, step.new_full])
        if not len(pages):
            return
        on_host = np.zeros((self.layout.layers, len(pages)), dtype=bool)
        on_host[:, len(step.new_tails) :] = self.table.want_host[:, step.new_full]
        for layer in np.flatnonzero(on_host.any(axis=1)):
            columns = np.flatnonzero(on_host[layer])
            taken = self.host.take(len(columns), hint=self._host_page_before(step, layer))
            self.table.host_page[layer, pages[columns[: len(taken)]]] = taken
            on_host[layer, columns[len(taken) :]] = False
        self._make_room(int((~on_host).sum()), live, step.open_pages)
        self._open(pages, on_host)

    def _open(self, pages: np.ndarray, on_host: np.ndarray) -> None:
        table = self.table
        table.claim(pages)
        table.last_used[pages] = self._clock
        whole = pages[~on_host.any(axis=0)]
        starts = self.arena.take_extents(len(whole))
        table.set_extents(whole[: len(starts)], starts)
        single = np.isin(pages, whole[len(starts) :]) | on_host.any(axis=0)
        layers, columns = np.nonzero(~on_host & single)
        table.device_page[layers, pages[columns]] = self.arena.take_pages(len(layers))
        table.state[layers, pages[columns]] = PageState.DEVICE
        layers, columns = np.nonzero(on_host)
        table.state[layers, pages[columns]] = PageState.TO_HOST

    def _host_page_before(self, step: Step, layer: int) -> int:
        """Where the first writing request's last page of ``layer`` lies, so as to go on there."""
        for read in step.reads:
            if len(read):
                return int(self.table.host_page[layer, read[-1]])
        return -1

    def _write_through(self, step: Step, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Full new pages placed on the host go there without an arena page."""
        away = self.table.device_page[layer, step.new_full] < 0
        if not away.any():
            return
        pages = step.new_full[away]
        if len(self._write_backs) >= WRITE_THROUGH_LAYERS:
            self._write_backs[-WRITE_THROUGH_LAYERS].transfer.wait()
        transfer = self.engine.write_through(
            k, v, step.new_full_rows[away], self.table.host_page[layer, pages]
        )
        self._track(transfer, np.full(len(pages), layer), pages)

    # --- moving pages ---------------------------------------------------------

    def _settle(self, pages: np.ndarray) -> None:
        """Start what brings closed ``pages`` from the arena to where they were placed."""
        table = self.table
        wanted = table.want_host[:, pages]
        state = table.state[:, pages]
        layers, columns = np.nonzero(wanted & (state == PageState.BOTH))
        self._drop_device_copies(layers, pages[columns])
        layers, columns = np.nonzero(wanted & (state == PageState.DEVICE))
        self._write_back(layers, pages[columns])

    def _settle_cached(self, live: np.ndarray, open_pages: np.ndarray) -> None:
        """Keep ``reserve_pages`` free by moving out, ahead of need, pages nobody runs with."""
        short = self.reserve_pages - self.arena.num_free
        if short > 0:
            self._evict(self._cached(live, open_pages), short)

    def _cached(self, live: np.ndarray, open_pages: np.ndarray) -> np.ndarray:
        """Pages in use by no live request, least recently used first."""
        pages = np.setdiff1d(self.table.pages_in_use(), np.union1d(live, open_pages))
        if self.step is not None:
            pages = np.setdiff1d(pages, np.concatenate(self.step.reads))
        return pages[np.argsort(self.table.last_used[pages], kind="stable")]

    def _make_room(self, need: int, live: np.ndarray, open_pages: np.ndarray) -> None:
        """Have ``need`` arena pages free, moving out cached pages first, then live ones."""
        for candidates in (self._cached, lambda *_: live):
            if self.arena.num_free >= need:
                return
            self._evict(candidates(live, open_pages), need - self.arena.num_free)
            if self.arena.num_free >= need:
                return
            while self._write_backs:
                self._write_backs[0].transfer.wait()
                self._retire()
            self._evict(candidates(live, open_pages), need - self.arena.num_free)
        if self.arena.num_free < need:
            raise ResidencyError(
                f"{need} arena pages needed, {self.arena.num_free} can be had: "
                "more requests are running than the arena has tail pages for"
            )

    def _evict(self, pages: np.ndarray, count: int) -> None:
        """Move out about ``count`` arena pages of ``pages``, in that order; copies not awaited."""
        table = self.table
        state = table.state[:, pages]
        movable = (state == PageState.DEVICE) | (state == PageState.BOTH)
        total = np.cumsum(movable.sum(axis=0))
        pages = pages[: int(np.searchsorted(total, count)) + 1]
        table.want_host[:, pages] = True
        self._settle(pages)

    def _drop_device_copies(self, layers: np.ndarray, pages: np.ndarray) -> None:
        table = self.table
        if not len(pages):
            return
        table.break_extents(np.unique(pages))
        self.arena.give_pages(table.device_page[layers, pages])
        table.device_page[layers, pages] = -1
        table.state[layers, pages] = PageState.HOST

    def _write_back(self, layers: np.ndarray, pages: np.ndarray) -> None:
        """Start copying arena pages to the host: as many as it has room for."""
        if not len(pages):
            return
        table = self.table
        host = np.concatenate(
            [
                self.host.take(int((layers == layer).sum()), self._host_hint(layer, pages, layers))
                for layer in np.unique(layers)
            ]
        )
        if len(host) < len(pages):
            raise ResidencyError("host store full")
        table.host_page[layers, pages] = host
        table.state[layers, pages] = PageState.TO_HOST
        transfer = self.engine.write_back(table.device_page[layers, pages], host)
        self._track(transfer, layers, pages)
