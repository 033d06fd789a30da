"""The one owner of every page's state: allocation, placement, movement, release.

The engine above speaks of *logical* pages, one id for all layers. The store decides nothing: a
policy says which pages should live on the host in which layers (``place``), and the store brings
that about without ever losing a page's only copy. Between two steps every page in use is in the
arena, in the host store, or in both, in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.ahead import Arrivals
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.check import violations
from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.engines import engine_for
from orbitflow_sglang.residency.gathering import Gathering
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.page_table import PageState, PageTable, whole_pages
from orbitflow_sglang.residency.reading import Reading
from orbitflow_sglang.residency.staging import StagingRing
from orbitflow_sglang.residency.step import NO_PAGES, LayerPass, Step
from orbitflow_sglang.residency.write_backs import WriteBacks

__all__ = ["NO_PAGES", "LayerPass", "ResidencyStore", "Step"]

# Layers whose new KV may be on its way to the host at once. It bounds the memory
# that a prefill on a slow link holds; more would not make the link faster.
WRITE_THROUGH_LAYERS = 2


class ResidencyStore:
    """KV pages of one rank. Not thread-safe: the scheduler's thread owns it.

    ``link_bytes_per_s`` emulates a link of that rate in each direction; None: as fast as memory.
    ``in_lockstep``: where pages are depends on the calls alone, never on how fast copies are, at
    the price of waiting for them. A step raises ``ResidencyError`` where a copy has failed.
    """

    new_engine = staticmethod(engine_for)

    def __init__(
        self,
        layout: KVLayout,
        capacity: Capacity,
        device: str = "cpu",
        link_bytes_per_s: float | None = None,
        in_lockstep: bool = False,
    ) -> None:
        self.layout = layout
        self.capacity = capacity
        self.arena = Arena(layout, capacity, device)
        self.table = PageTable(layout.layers, capacity.logical_pages, self.arena.stride)
        self.host = HostStore(layout, capacity.host_pages, None if device == "cpu" else device)
        self.engine = self.new_engine(self.arena, self.host, link_bytes_per_s)
        self._gathering = Gathering(self.table, self.arena, self.engine.compute)
        self.ring = self._new_ring()
        self.arrivals = Arrivals(self.table, self.engine, self._grant_home, self._grant_extents)
        self._in_lockstep = in_lockstep
        self._write_backs = WriteBacks(self.table, self._in_lockstep)
        # Arena pages kept free for the tails of the next steps: nothing is fetched into them.
        self.reserve_pages = 0
        # Most pages whose copy to the host a step starts for the sake of their placement.
        self.move_pages: int | None = None
        self.step: Step | None = None
        self._reading: Reading | None = None  # by ``step``
        self._broken: ResidencyError | None = None  # a copy failed: no step until ``abandon``
        self._clock = 0
        # As the present step began: closed pages of live requests, and of no live request.
        self._live = np.zeros_like(self.table.in_use)
        self._cached = np.zeros_like(self.table.in_use)
        self._read = np.zeros_like(self.table.in_use)  # by the present step
        self._written = 0  # layers that the present step has written
        # Of the tokens that it writes: arena page, -1 on the host, and slot, [layers, tokens].
        self._places = np.empty((layout.layers, 0), dtype=np.int32)
        self._slots = torch.empty((layout.layers, 0), dtype=torch.int64)
        self._some_away = False

    # --- ownership ------------------------------------------------------------

    def place(self, pages: np.ndarray, on_host: np.ndarray) -> None:
        """Ask that ``pages`` live on the host in the layers where ``on_host[l]``, bool.

        Holds until the next ``place`` or ``free``, also for pages yet to be opened. Full
        pages follow as steps begin in which they are live.
        """
        self.table.want_host[:, pages] = on_host[:, None]

    def free(self, pages: np.ndarray) -> None:
        """Give up ``pages`` in every layer, wherever they are; between two steps.

        Raises ``ResidencyError`` when one of them is not in use. A failed copy is raised by
        the next step: whoever frees has nothing to do with it.
        """
        table = self.table
        if not table.in_use[pages].all():
            raise ResidencyError(f"freeing pages nobody owns: {pages[~table.in_use[pages]]}")
        if (table.state[:, pages] == PageState.TO_DEVICE).any():
            try:
                self.arrivals.complete()
                self.ring.forget(pages)
            except ResidencyError as error:
                self._broken = error
        if self._broken is not None:
            table.release(pages)  # their places are no longer known for sure: see ``abandon``
            return
        starts = table.extent[pages]
        self.arena.give_extents(starts[starts >= 0])
        device = table.device_page[:, pages[starts < 0]]
        self.arena.give_pages(device[device >= 0])
        host = table.host_page[:, pages]
        self.host.give(host[host >= 0])
        table.release(pages)

    def fetch_ahead(self, pages: np.ndarray, limit: int) -> int:
        """Start bringing up to ``limit`` of the copies that ``pages`` lack to the arena; how
        many. Behind ``begin``, for requests that wait; what the step reads comes by itself."""
        pages = pages[~self._read[pages]]
        self._give_way(min(limit, self.arrivals.missing(pages)))
        return self.arrivals.fetch(pages, limit)

    def mirror(self, pages: np.ndarray, limit: int) -> int:
        """Start copying up to ``limit`` of closed ``pages``, which stay, to the host; how many."""
        table = self.table
        single = (table.state[:, pages] == PageState.DEVICE) & ~table.want_host[:, pages]
        columns, layers = np.nonzero(single.T)
        room = min(limit, self.host.num_free)
        return self._write_back(layers[:room], pages[columns[:room]])

    def clear(self) -> None:
        """Give up every page."""
        self.free(self.table.pages_in_use())
        self.quiesce()

    def abandon(self) -> None:
        """Behind a failed copy: forget every page, its contents are lost, and be as built."""
        with suppress(ResidencyError):
            self.engine.drain()
        self._broken = self.step = self._reading = None
        for part in (self.table, self.arena, self.host):
            part.reset()
        self.ring = self._new_ring(self.ring.stall_s)
        self.arrivals = Arrivals(self.table, self.engine, self._grant_home, self._grant_extents)
        self._write_backs = WriteBacks(self.table, self._in_lockstep)

    def renew(self) -> None:
        """As built: pages are handed out in the first order again, nothing was ever moved.

        Raises ``ResidencyError`` while a page is in use.
        """
        self.quiesce()
        if len(self.table.pages_in_use()):
            raise ResidencyError("the store can only be renewed when all its pages are free")
        self.arena.reset()
        self.host.reset()
        self.reserve_pages = 0
        self.engine.forget()

    # --- one step -------------------------------------------------------------

    def begin_uniform(
        self, pages: np.ndarray, new_pages: np.ndarray, written: np.ndarray
    ) -> np.ndarray | None:
        """A step whose ``pages``, ``new_pages`` among them, need neither tables nor copies.

        Opens ``new_pages`` and returns where each of ``pages`` starts its extent: ids
        that hold in every layer's ``arena.layer_view``. None, and nothing done, when
        some page is not in one extent, one of the ``written`` ones has a host copy, or too
        few extents are free: ``begin`` is then the way.
        """
        table = self.table
        self._check_whole()
        if self.host.num_free < self.host.num_pages:
            self.arrivals.complete()
            self._write_backs.note()
            if (table.host_page[:, written] >= 0).any():
                return None
        starts = self.arena.take_extents(len(new_pages))
        if len(starts) == len(new_pages):
            table.extent[new_pages] = starts
            ids: np.ndarray = table.extent[pages]
            if (ids >= 0).all():
                table.claim(new_pages)
                table.set_extents(new_pages, starts)
                table.state[:, new_pages] = PageState.DEVICE
                self._clock += 1
                table.last_used[pages] = self._clock
                return ids
            table.extent[new_pages] = -1
        self.arena.give_extents(starts)
        return None

    def begin(self, step: Step) -> None:
        """Open the pages that ``step`` writes and start fetching those it reads.

        Raises ``ResidencyError``, with no page opened and no step begun, when arena and
        host together lack the room.
        """
        table = self.table
        self._clock, self._written = self._clock + 1, 0
        self._check_whole()
        self.arrivals.complete()
        self._write_backs.note()
        self._read = read = table.mask(*step.reads)
        batch = (read | table.mask(step.open_pages)) & table.in_use
        live = batch | table.mask(step.idle_pages)
        table.last_used[live] = self._clock
        closed = ~table.mask(np.zeros(1, dtype=np.int64), step.open_pages)
        self._live, was_cached = live & closed, self._cached
        self._cached = table.in_use & ~live & closed
        table.want_host[:, self._cached & ~was_cached] = False  # that was for who has left
        self._reopen(step.open_pages)
        self._settle(np.flatnonzero(self._live))
        self._open_new(step, read)
        self.step = step
        pages = np.flatnonzero(batch)
        self._gathering.gather(pages)
        state, device = table.state[:, pages], table.device_page[:, pages]
        away = (state == PageState.HOST) | (state == PageState.TO_DEVICE)
        away |= (state == PageState.TO_HOST) & (device < 0)
        homeless = (device < 0) | (device >= self.arena.ring_start)
        self._give_way(int((away & homeless & ~table.want_host[:, pages]).sum()))
        self.ring.begin([pages[row] for row in away])
        size = np.int64(self.layout.page_size)
        self._reading = Reading(step, table, self.arena, self.ring, self.layout.page_size)
        self._places = table.device_page[:, step.slots // size]
        self._some_away = bool((self._places < 0).any())
        self._slots = to_device(self._places * size + step.slots % size, self.arena.k.device)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the step's new K and V of one layer, ``[tokens, kv_heads, dim]``.

        Layers come in order. The tensors, in the layout's dtype, must not be written
        afterwards: pages placed on the host are copied from them behind this call.
        """
        step = self.step
        assert step is not None
        self._written = layer + 1
        places, slots = self._places[layer], self._slots[layer]
        rows = None
        if self._some_away:
            rows = to_device(np.flatnonzero(places >= 0), slots.device)
            slots = slots[rows]
        self.engine.compute(lambda: self.arena.write(slots, rows, k, v))
        if len(step.new_full):
            self._write_through(step, layer, k, v)

    def passes(self, layer: int) -> Iterator[LayerPass]:
        """The parts in which ``layer`` is attended; a part is valid until the next is asked for."""
        assert self._reading is not None
        return self._reading.passes(layer)

    def end(self) -> None:
        """The forward pass is over, or was given up."""
        self.ring.end()
        if self.step is not None and self._written < self.layout.layers:
            # Given up: no copy to the host will ever come from the layers not written.
            pages, rest = self.step.new_full, slice(self._written, None)
            never = self.table.device_page[rest, pages] < 0
            self.table.state[rest, pages] = np.where(
                never, PageState.HOST, self.table.state[rest, pages]
            )
        self.step = self._reading = None

    # --- checks ---------------------------------------------------------------

    def cached_on_host(self) -> int:
        """Host pages of what no live request held as the last step with tables began."""
        cached = np.flatnonzero(self._cached & self.table.in_use)
        return int((self.table.host_page[:, cached] >= 0).sum())

    def quiesce(self) -> None:
        """Finish what is under way and drop what was fetched ahead; between two steps."""
        self._check_whole()
        self.arrivals.complete()
        self.ring.clear()
        self.engine.drain()
        self._write_backs.note()

    def check(self) -> list[str]:
        """Violated invariants, in words; empty when all hold. Call between steps."""
        leaving = self._write_backs.leaving()
        arriving = np.maximum(self.ring.fetched_ahead(), self.arrivals.targets())
        return violations(self.table, self.arena, self.host, self.ring, leaving, arriving)

    def close(self) -> None:
        """Stop the copies, completing those under way. Nothing may be asked for afterwards."""
        self.engine.close()

    # --- opening pages --------------------------------------------------------

    def _open_new(self, step: Step, read: np.ndarray) -> None:
        """Claim the pages that the step opens, each with a place in every layer."""
        table, pages = self.table, np.concatenate([step.new_tails, step.new_full])
        if not len(pages):
            return
        # Not claimed yet, or the search for room would take them for cached pages.
        host = self._host_for_new(step, pages, read)
        table.claim(pages)
        self._live[pages] = True
        table.last_used[pages] = self._clock
        table.host_page[:, pages] = host
        table.want_host[:, pages] |= host >= 0
        table.state[:, pages] = np.where(host >= 0, PageState.TO_HOST, PageState.DEVICE)
        whole = np.flatnonzero((host < 0).all(axis=0))
        starts = self.arena.take_extents(len(whole))
        whole = whole[: len(starts)]
        table.set_extents(pages[whole], starts)
        singly = host < 0
        singly[:, whole] = False
        layers, columns = np.nonzero(singly)
        table.device_page[layers, pages[columns]] = self.arena.take_pages(len(layers))

    def _host_for_new(self, step: Step, pages: np.ndarray, read: np.ndarray) -> np.ndarray:
        """Host pages for new ``pages``, ``[layers, len(pages)]``; -1: the arena has room for it.

        Full pages are on the host where they were placed there, and where the arena has
        no room. Raises ``ResidencyError`` when neither has.
        """
        host = np.full((self.layout.layers, len(pages)), -1, dtype=np.int32)
        may_leave = np.zeros(host.shape, dtype=bool)
        may_leave[:, len(step.new_tails) :] = ~read[step.new_full]
        layers, columns = np.nonzero(may_leave & self.table.want_host[:, pages])
        host[layers, columns] = self._take_host(layers, pages[columns])
        self._make_room(int((host < 0).sum()))
        if (short := int((host < 0).sum()) - self.arena.num_free) > 0:
            columns, layers = np.nonzero((may_leave & (host < 0)).T)
            columns, layers = columns[-short:], layers[-short:]
            host[layers, columns] = self._take_host(layers, pages[columns])
        if (need := int((host < 0).sum())) > self.arena.num_free:
            self.host.give(host[host >= 0])
            raise ResidencyError(
                f"{need} arena pages needed, {self.arena.num_free} can be had: "
                "more requests are running than the arena has tail pages for"
            )
        return host

    def _write_through(self, step: Step, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Full new pages placed on the host go there without an arena page."""
        away = self.table.device_page[layer, step.new_full] < 0
        if not away.any():
            return
        pages = step.new_full[away]
        self._write_backs.bound(WRITE_THROUGH_LAYERS)
        transfer = self.engine.write_through(
            k, v, step.new_full_rows[away], self.table.host_page[layer, pages]
        )
        self._write_backs.track(transfer, np.full(len(pages), layer), pages)

    # --- moving pages ---------------------------------------------------------

    def _settle(self, pages: np.ndarray) -> None:
        """Start what brings closed ``pages`` from the arena to where they were placed."""
        state, away = self.table.state[:, pages], self.table.want_host[:, pages]
        layers, columns = np.nonzero(away & (state == PageState.BOTH))
        self._drop_device_copies(layers, pages[columns])
        columns, layers = np.nonzero((away & (state == PageState.DEVICE)).T)
        if self.move_pages is not None:
            layers, columns = layers[: self.move_pages], columns[: self.move_pages]
        self._write_back(layers, pages[columns])

    def _reopen(self, pages: np.ndarray) -> None:
        """Pages about to be written live in the arena alone: bring back what had left it."""
        table = self.table
        if not (table.host_page[:, pages] >= 0).any():
            return
        self.ring.forget(pages)
        self._await_host(slice(None), pages)
        self._make_room(away := int((table.state[:, pages] == PageState.HOST).sum()))
        # Where both are full, what one page gives up on the host makes room for the next.
        for part in [pages] if self.arena.num_free >= away else pages[:, None]:
            layers, columns = np.nonzero(table.state[:, part] == PageState.HOST)
            self._make_room(len(layers))
            home = self.arena.take_pages(len(layers))
            table.device_page[layers, part[columns]] = home
            self.engine.fetch(table.host_page[layers, part[columns]], home).wait()
            layers, columns = np.nonzero(table.host_page[:, part] >= 0)
            self._drop_host_copies(layers, part[columns])

    def _cached_pages(self) -> np.ndarray:
        """Pages of no live request that are in the arena, least recently used first."""
        pages = np.flatnonzero(self._cached & (self.table.device_page >= 0).any(axis=0))
        return pages[np.argsort(self.table.last_used[pages], kind="stable")]

    def _give_way(self, count: int) -> None:
        """Have cached pages leave for ``count`` that come back, some only at a later step."""
        need = self.reserve_pages + count
        if self.arena.num_free < need:
            self._evict(self._cached_pages(), need)

    def _make_room(self, need: int) -> None:
        """Have ``need`` arena pages free, or all that can be: the caller looks.

        Cached pages move out first, then live ones.
        """
        if self.arena.num_free >= need:
            return
        self._evict_until(self._cached_pages(), need)
        self._evict_until(np.flatnonzero(self._live), need)
        if self.arena.num_free < need:
            # What the ring is fetching to the arena can only leave once it has arrived.
            self.ring.clear()
            self._evict_until(np.flatnonzero(self._cached | self._live), need)

    def _evict_until(self, pages: np.ndarray, need: int) -> None:
        while self.arena.num_free < need:
            if not self._evict(pages, need) or self.arena.num_free >= need:
                return
            self._write_backs.await_first()

    def _evict(self, pages: np.ndarray, need: int) -> int:
        """Go towards ``need`` free arena pages with those of ``pages``, in that order.

        Where the host has a copy the arena page is free at once; elsewhere the copy is started:
        how many that will free is returned. Pages go in all layers, so that extents come free.
        """
        table = self.table
        columns, layers = np.nonzero(table.state[:, pages].T == PageState.BOTH)
        chosen = whole_pages(columns, need - self.arena.num_free)
        layers, there = layers[chosen], pages[columns[chosen]]
        table.want_host[layers, there] = self._live[there]  # whoever hits others has them back
        self._drop_device_copies(layers, there)

        state = table.state[:, pages]
        leaving = (state == PageState.TO_HOST) & (table.device_page[:, pages] >= 0)
        on_way = int(leaving.sum())
        columns, layers = np.nonzero(state.T == PageState.DEVICE)
        chosen = whole_pages(columns, need - self.arena.num_free - on_way)
        layers, to_go = layers[chosen], pages[columns[chosen]]
        table.want_host[layers, to_go] = self._live[to_go]
        return on_way + self._write_back(layers, to_go)

    def _drop_device_copies(self, layers: np.ndarray, pages: np.ndarray) -> None:
        table = self.table
        table.break_extents(pages)
        self.arena.give_pages(table.device_page[layers, pages])
        table.device_page[layers, pages] = -1
        table.state[layers, pages] = PageState.HOST

    def _drop_host_copies(self, layers: np.ndarray, pages: np.ndarray) -> None:
        table = self.table
        self.host.give(table.host_page[layers, pages])
        table.host_page[layers, pages] = -1
        table.state[layers, pages] = PageState.DEVICE

    def _write_back(self, layers: np.ndarray, pages: np.ndarray) -> int:
        """Start copying arena pages to the host: as many as it has room for, returned."""
        if not len(pages):
            return 0
        table = self.table
        host = self._take_host(layers, pages)
        layers, pages, host = layers[host >= 0], pages[host >= 0], host[host >= 0]
        if len(pages):
            table.host_page[layers, pages] = host
            table.state[layers, pages] = PageState.TO_HOST
            transfer = self.engine.write_back(table.device_page[layers, pages], host)
            self._write_backs.track(transfer, layers, pages)
        return len(pages)

    def _take_host(self, layers: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """Host pages for (layer, page) pairs, -1 where the store is full."""
        table = self.table
        if len(pages) > self.host.num_free:
            # A second copy is a convenience where the arena copy is to stay.
            spare_layers, spare = np.nonzero((table.state == PageState.BOTH) & ~table.want_host)
            short = len(pages) - self.host.num_free
            self._drop_host_copies(spare_layers[:short], spare[:short])
        return self.host.take_by_layer(layers, table.host_page[layers, pages - 1])

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise self._broken

    # --- what the ring asks for -----------------------------------------------

    def _new_ring(self, stall_s: float = 0.0) -> StagingRing:
        grant, await_host = self._grant_home, self._await_host
        return StagingRing(self.table, self.arena, self.engine, grant, await_host, stall_s)

    def _grant_home(self, count: int) -> np.ndarray:
        room = max(0, self.arena.num_free - self.reserve_pages)
        return self.arena.take_pages(min(count, room))

    def _grant_extents(self, count: int) -> np.ndarray:
        room = max(0, self.arena.num_free - self.reserve_pages)
        return self.arena.take_extents(min(count, room // self.layout.layers))

    def _await_host(self, layers: int | slice, pages: np.ndarray) -> None:
        """Return when no write-back of ``pages`` is under way."""
        while (self.table.state[layers, pages] == PageState.TO_HOST).any():
            self._write_backs.await_first()
