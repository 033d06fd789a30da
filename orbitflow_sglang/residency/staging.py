"""The staging ring: offloaded pages pass through it on their way to attention.

The transfers of a step form one list in layer order. The ring is filled as far as
it has room, ahead of compute; pages leave it when their layer's attention is done;
behind the last layer the list goes on with the first layers of the next step, so
that the link does not idle between steps. The ring never holds the only copy of a
page, so what was fetched ahead for a step that turns out different is dropped.

A layer whose offloaded pages exceed half the ring is attended in pieces, one half
being filled while the other is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena, PageStack
from orbitflow_sglang.residency.page_table import PageState, PageTable
from orbitflow_sglang.residency.transfer import Transfer, TransferEngine

NOWHERE = np.empty(0, dtype=np.int32)


@dataclass(eq=False)
class Piece:
    """Pages of one layer that are fetched and attended together."""

    layer: int
    pages: np.ndarray  # logical
    # Arena page of each, from the issue to the release.
    target: np.ndarray = field(default_factory=lambda: NOWHERE)
    # Which of them are fetched to an arena page outside the ring; None: none is.
    to_stay: np.ndarray | None = None
    transfer: Transfer | None = None  # None before the issue and behind the release

    def part(self, chosen: np.ndarray) -> Piece:
        """Those of its pages that are ``chosen``, bool, as they are on their way."""
        to_stay = None if self.to_stay is None else self.to_stay[chosen]
        return Piece(self.layer, self.pages[chosen], self.target[chosen], to_stay, self.transfer)


class StagingRing:
    """Which pieces are in the ring, which come next, and the pages of the ring itself.

    ``grant(n)`` gives up to n arena pages outside the ring: a page that should live
    on the device is fetched right there, and stays. ``await_host(layer, pages)``
    returns once the host copies of ``pages`` are valid. One ring page is enough for
    any step to end; below two, nothing is fetched while a piece is read.
    """

    def __init__(
        self,
        table: PageTable,
        arena: Arena,
        engine: TransferEngine,
        grant: Callable[[int], np.ndarray],
        await_host: Callable[[int, np.ndarray], None],
        stall_s: float = 0.0,
    ) -> None:
        self._table = table
        self._arena = arena
        self._engine = engine
        self._grant = grant
        self._await_host = await_host
        self.num_pages = len(arena.ring_pages)
        self.piece_pages = max(1, self.num_pages // 2)
        self.stall_s = stall_s  # time that compute has waited for a fetch
        self._free = PageStack(self.num_pages)
        self._free.push(arena.ring_pages)
        self._required: list[np.ndarray] = []
        self._pieces: list[list[Piece]] = [[] for _ in range(table.layers)]
        self._ahead: list[list[Piece]] = [[] for _ in range(table.layers)]
        self._todo: deque[Piece] = deque()
        self._ahead_layer = 0

    @property
    def num_free(self) -> int:
        return self._free.size

    def free_pages(self) -> np.ndarray:
        """The free arena pages of the ring, for checks."""
        return self._free.values()

    def fetched_ahead(self) -> np.ndarray:
        """Arena page that each (layer, page) is on its way to between steps, or -1; for checks."""
        target = np.full_like(self._table.device_page, -1)
        for piece in chain.from_iterable(self._ahead):
            target[piece.layer, piece.pages] = piece.target
        return target

    # --- one step -------------------------------------------------------------

    def begin(self, required: list[np.ndarray]) -> None:
        """Start a step that reads from the host the pages ``required[l]`` of each layer l.

        They are logical, ascending, each once; each is in the host store, on its way
        there, or was fetched ahead.
        """
        self._required = required
        self._ahead_layer = 0
        self._todo.clear()
        for layer, pages in enumerate(required):
            kept = self._keep(self._ahead[layer], pages)
            self._ahead[layer] = []
            missing = pages
            if kept:  # all of it is in ``pages``
                have = kept[0].pages
                missing = pages[:0] if len(have) == len(pages) else np.setdiff1d(pages, have)
            fresh = [
                Piece(layer, missing[i : i + self.piece_pages])
                for i in range(0, len(missing), self.piece_pages)
            ]
            self._pieces[layer] = kept + fresh
            self._todo.extend(fresh)
        self.pump(0)

    def in_one_pass(self, layer: int) -> bool:
        """Whether all staged pages of ``layer`` are in the ring at once."""
        return len(self._required[layer]) <= self.piece_pages

    def pieces(self, layer: int) -> list[Piece]:
        """The pieces of ``layer``, in the order in which they are to be waited for."""
        return self._pieces[layer]

    def wait(self, piece: Piece) -> None:
        """Return when every page of ``piece`` may be read.

        Raises ``ResidencyError`` when a copy failed, or the ring has no room for the
        piece because earlier ones have not been released.
        """
        begun = time.perf_counter()
        transfer = piece.transfer or self._issue_now(piece)
        transfer.wait()
        self.stall_s += time.perf_counter() - begun
        state = self._table.state[piece.layer]
        if piece.to_stay is None:
            state[piece.pages] = PageState.STAGED
        else:
            state[piece.pages] = np.where(piece.to_stay, PageState.BOTH, PageState.STAGED)

    def release(self, piece: Piece) -> None:
        """``piece`` has been read: its ring pages are free again, the others came to stay.

        What is left of it is what would have to be fetched to read it once more.
        """
        target = piece.target
        if piece.to_stay is not None:
            piece.pages, target = piece.pages[~piece.to_stay], target[~piece.to_stay]
        self._table.state[piece.layer, piece.pages] = PageState.HOST
        self._table.device_page[piece.layer, piece.pages] = -1
        self._free.push(target)
        piece.target, piece.to_stay, piece.transfer = NOWHERE, None, None

    def pump(self, done_layers: int) -> None:
        """Issue what the ring has room for; attention of ``done_layers`` layers is over."""
        self._issue_todo()
        if self._todo:
            return
        while self._ahead_layer < done_layers:
            layer = self._ahead_layer
            pages = self._required[layer][: self.piece_pages]
            # Freed or moved since the step began: the next step will say.
            pages = pages[self._table.state[layer, pages] == PageState.HOST]
            if len(pages):
                piece = Piece(layer, pages)
                if not self._issue(piece):
                    return
                self._ahead[layer] = [piece]
            self._ahead_layer += 1

    def end(self) -> None:
        """The step is over: nothing of it is left in the ring but what is for the next."""
        self.note_stall()
        self._todo.clear()
        for piece in chain.from_iterable(self._pieces):
            if piece.transfer is not None:  # the step was given up before its turn
                self._drop(piece)
        self._pieces = [[] for _ in self._pieces]

    # --- between steps --------------------------------------------------------

    def note_stall(self) -> None:
        """Count what compute has waited on a device, where that is known only behind the step."""
        self.stall_s += self._engine.take_stall_s()

    def forget(self, pages: np.ndarray) -> None:
        """``pages`` are to be freed or written: take them out of what was fetched ahead."""
        for layer, pieces in enumerate(self._ahead):
            if pieces:
                wanted = np.setdiff1d(pieces[0].pages, pages)
                self._ahead[layer] = self._keep(pieces, wanted)

    def clear(self) -> None:
        """Drop everything fetched ahead."""
        for layer in range(len(self._ahead)):
            self._ahead[layer] = self._keep(self._ahead[layer], NOWHERE)

    # --- inside ---------------------------------------------------------------

    def _issue_todo(self) -> None:
        while self._todo and self._issue(self._todo[0]):
            self._todo.popleft()

    def _issue(self, piece: Piece) -> bool:
        """Start fetching ``piece``; False when the ring or a host copy is not ready."""
        table, layer, pages = self._table, piece.layer, piece.pages
        if (table.state[layer, pages] != PageState.HOST).any():
            return False
        away = table.want_host[layer, pages]
        if away.all():
            if len(pages) > self._free.size:
                return False
            target, to_stay = self._free.pop(len(pages)), None
        else:
            stays = np.flatnonzero(~away)
            if len(pages) - len(stays) > self._free.size:
                return False
            home = self._grant(len(stays))
            through_ring = len(pages) - len(home)
            if through_ring > self._free.size:
                self._arena.give_pages(home)
                return False
            target = np.empty(len(pages), dtype=np.int32)
            to_stay = np.zeros(len(pages), dtype=bool)
            to_stay[stays[: len(home)]] = True
            target[to_stay] = home
            target[~to_stay] = self._free.pop(through_ring)
        table.device_page[layer, pages] = target
        table.state[layer, pages] = PageState.TO_DEVICE
        piece.target, piece.to_stay = target, to_stay
        piece.transfer = self._engine.fetch(table.host_page[layer, pages], target)
        return True

    def _issue_now(self, piece: Piece) -> Transfer:
        """Attention is waiting for ``piece``: make it go, whatever was fetched ahead."""
        self._await_host(piece.layer, piece.pages)
        while not self._issue(piece):
            if not self._drop_furthest(piece.layer):
                raise ResidencyError("the staging ring is too small for one piece")
        self._todo.remove(piece)
        self._issue_todo()  # what stood behind it was held up by it alone
        assert piece.transfer is not None
        return piece.transfer

    def _drop_furthest(self, layer: int) -> bool:
        """Drop one fetched piece that is needed later than those of ``layer``.

        Those are pieces that were fetched behind the last step: for the next one nothing
        is fetched before all of this one is.
        """
        for other in range(len(self._pieces) - 1, layer, -1):
            for piece in reversed(self._pieces[other]):
                if piece.transfer is not None:
                    self._drop(piece)
                    if len(piece.pages):
                        self._requeue(piece)
                    else:  # all of it came to stay
                        self._pieces[other].remove(piece)
                    return True
        return False

    def _requeue(self, piece: Piece) -> None:
        ahead_of = next(
            (i for i, other in enumerate(self._todo) if other.layer >= piece.layer),
            len(self._todo),
        )
        self._todo.insert(ahead_of, piece)

    def _keep(self, pieces: list[Piece], wanted: np.ndarray) -> list[Piece]:
        """Those pages of fetched ``pieces`` that are in ``wanted``; the rest leave the ring."""
        kept = []
        for piece in pieces:
            if np.array_equal(piece.pages, wanted):
                kept.append(piece)
                continue
            useful = np.isin(piece.pages, wanted)
            if not useful.all():
                self._drop(piece.part(~useful))
                piece = piece.part(useful)
            if len(piece.pages):
                kept.append(piece)
        return kept

    def _drop(self, piece: Piece) -> None:
        """Give up a fetched ``piece`` before it was read."""
        if piece.to_stay is not None and piece.to_stay.any():
            # A page that came to stay: compute may write where it lies as soon as
            # it is given up, so the copy must have ended.
            self.wait(piece)
        self.release(piece)
