"""Where the pages of live requests should live: by a fixed policy, or by the controller's plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orbitflow_sglang.control.view import StepDecision, UnitView
from orbitflow_sglang.planner.policies import Policy, fit
from orbitflow_sglang.planner.units import group_pages
from orbitflow_sglang.residency.store import NO_PAGES, ResidencyStore, Step

RESERVE_SHARE = 4  # at most one arena page in so many is kept free for tails


@dataclass(frozen=True)
class LiveRequest:
    """A request that holds KV: running, between two chunks of its prompt, or paused."""

    rid: str
    row: int  # of req_to_token
    tokens: int  # with a slot, the ones this step writes included
    paused: bool = False


class Placer(Protocol):
    """Tells the store where pages should live."""

    name: str
    placements: int  # that were made

    @property
    def spills(self) -> bool:
        """Whether a step may need tables because of it."""

    @property
    def mirrors(self) -> bool:
        """Whether pages that stay are to be copied to the host, which needs no tables."""

    def place(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray], step: Step) -> None:
        """Ahead of ``store.begin(step)``; ``held``: the pages of each live request."""

    def begun(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray]) -> None:
        """Behind ``store.begin``: what may be copied under this step for later ones."""

    def reset(self) -> None:
        """Forget what was placed so far."""


class PolicyPlacer:
    """A planner policy that says which layers of which unit are offloaded."""

    def __init__(self, store: ResidencyStore, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self._store = store
        self.reset()

    def reset(self) -> None:
        """Forget what was placed so far."""
        self.placements = 0
        self._masks: dict[str, np.ndarray] = {}  # of each live request's new pages
        self._steps = 0

    @property
    def spills(self) -> bool:
        """Whether pages ever leave the device."""
        return self.policy.spills

    @property
    def mirrors(self) -> bool:
        """Never."""
        return False

    def place(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray], step: Step) -> None:
        """Place anew when somebody has come or gone, or memory has become too small."""
        store, table = self._store, self._store.table
        layers = store.layout.layers
        self._steps += 1
        reserve_tails(store, len(live))
        room = store.capacity.main_pages - layers * len(step.open_pages)
        rids = [request.rid for request in live]
        over = self.policy.period is not None and self._steps >= self.policy.period
        if self._masks.keys() == set(rids) and not over:
            for rid, pages in zip(rids, held, strict=True):
                new = pages[~table.in_use[pages]]
                if len(new):
                    store.place(new, self._masks[rid])
            if self._resident(held, step.open_pages) <= room:
                return
        units = group_pages(list(held), len(table.in_use))
        placement = fit(
            self.policy.place(units.count, layers),
            units.sizes,
            max(0, room - store.reserve_pages),
            self._host_room(held),
        )
        for pages, mask in zip(units.pages, placement, strict=True):
            store.place(pages, mask)
        # The first units are the private ones, in the order of the requests.
        self._masks = dict(zip(rids, placement, strict=False))
        self._steps = 0
        self.placements += 1

    def begun(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray]) -> None:
        """Nothing is copied ahead."""

    def _resident(self, held: Sequence[np.ndarray], open_pages: np.ndarray) -> int:
        """Arena pages that the placement in force gives to closed pages of live requests."""
        wanted = np.zeros_like(self._store.table.in_use)
        wanted[joined(held)] = True
        wanted[open_pages] = False
        return int((~self._store.table.want_host[:, wanted]).sum())

    def _host_room(self, held: Sequence[np.ndarray]) -> int:
        """Host pages for live requests when everything cached has had to leave the arena."""
        store = self._store
        cached = store.table.in_use.copy()
        cached[joined(held)] = False
        on_host = store.layout.layers * int(cached[1:].sum())
        return max(0, store.host.num_pages - on_host)


class PlanPlacer:
    """What the controller decides: a plan for those that decode, the host for the others."""

    def __init__(self, store: ResidencyStore, name: str) -> None:
        self.name = name
        self._store = store
        self.reset()

    def reset(self) -> None:
        """Forget what was placed so far."""
        self.placements = 0
        self.forget()

    def forget(self) -> None:
        """Nothing is placed any more."""
        # Of each placed request: row index of its first own page, pages on the host [layers].
        self._placed: dict[str, tuple[int, np.ndarray]] = {}
        self._away: frozenset[str] = frozenset()
        self._settled = True  # whoever is away has left the arena
        self._decision = StepDecision()

    @property
    def spills(self) -> bool:
        """Whether somebody is offloaded, on the way out or coming back."""
        return bool(self._placed or self._decision.fetch) or not self._settled

    @property
    def mirrors(self) -> bool:
        """Whether somebody is to be mirrored in case of a pause."""
        return bool(self._decision.mirror)

    def adopt(
        self,
        decision: StepDecision,
        away: Collection[str],
        holders: Callable[[], tuple[Sequence[LiveRequest], Sequence[np.ndarray]]],
    ) -> None:
        """Carry out ``decision``; the requests in ``away`` live on the host as a whole.

        ``holders`` gives the live requests and the pages of each.
        """
        self._decision = decision
        gone = frozenset(away)
        if decision.placement is None and gone == self._away:
            return
        live, held = holders()
        self._away, self._settled = gone, not gone
        if decision.placement is not None:
            self._place_units(decision.placement, live, held)
        elif gone:
            for request, pages in zip(live, held, strict=True):
                if request.rid in gone:
                    self._set(pages, len(pages))

    def place(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray], step: Step) -> None:
        """New pages go where the plan has their request's pages of that index."""
        store = self._store
        store.move_pages = self._decision.move_pages or None
        reserve_tails(store, sum(not request.paused for request in live))
        if not self._placed:
            return
        in_use = store.table.in_use
        for request, pages in zip(live, held, strict=True):
            placed = self._placed.get(request.rid)
            if placed is None:
                continue
            new = np.flatnonzero(~in_use[pages])
            if len(new):
                first, offloaded = placed
                wanted = (new - first)[None, :] < offloaded[:, None]
                store.table.want_host[:, pages[new]] = wanted

    def begun(self, live: Sequence[LiveRequest], held: Sequence[np.ndarray]) -> None:
        """Fetch for those coming back, then mirror who may be paused next."""
        decision, table = self._decision, self._store.table
        if not self._settled:
            leaving = [p for r, p in zip(live, held, strict=True) if r.rid in self._away]
            self._settled = not (table.device_page[:, self._used(joined(leaving))] >= 0).any()
        if not (decision.fetch or decision.mirror):
            return
        pages_of = {request.rid: pages for request, pages in zip(live, held, strict=True)}
        budget = decision.fetch_pages
        for rid in decision.fetch:
            if budget > 0 and rid in pages_of:
                budget -= self._store.fetch_ahead(self._used(pages_of[rid]), budget)
        budget = decision.mirror_pages
        for rid in decision.mirror:
            if budget > 0 and rid in pages_of:
                closed = self._used(pages_of[rid])[:-1]
                budget -= self._store.mirror(closed, budget)

    def missing(self, pages: np.ndarray) -> int:
        """Copies to fetch before a request with ``pages`` is as its placement has it."""
        return self._store.arrivals.missing(self._used(pages))

    def _used(self, pages: np.ndarray) -> np.ndarray:
        used: np.ndarray = pages[self._store.table.in_use[pages]]
        return used

    def _place_units(
        self,
        placement: Mapping[str, np.ndarray],
        live: Sequence[LiveRequest],
        held: Sequence[np.ndarray],
    ) -> None:
        nothing = np.zeros(self._store.layout.layers, dtype=np.int64)
        self._placed = {}
        for unit, pages in units_of(
            live, held, len(self._store.table.in_use), self._store.layout.page_size
        ):
            if self._away.issuperset(unit.users):
                self._set(pages, len(pages))
                continue
            offloaded = placement.get(unit.id, nothing)
            self._set(pages, offloaded)
            if len(unit.users) == 1 and offloaded.any():
                request = next(i for i, r in enumerate(live) if r.rid == unit.id)
                first = len(held[request]) - len(pages)
                self._placed[unit.id] = first, offloaded
        self.placements += 1

    def _set(self, pages: np.ndarray, offloaded: np.ndarray | int) -> None:
        count = np.broadcast_to(offloaded, (self._store.layout.layers,))
        wanted = np.arange(len(pages))[None, :] < count[:, None]
        self._store.table.want_host[:, pages] = wanted


def units_of(
    live: Sequence[LiveRequest], held: Sequence[np.ndarray], num_pages: int, page_size: int
) -> list[tuple[UnitView, np.ndarray]]:
    """The units of live requests, which count closed pages, with all their pages.

    A request's own pages are in the order of its tokens.
    """
    groups = group_pages(list(held), num_pages).pages
    found = []
    for request, pages, own in zip(live, held, groups, strict=False):
        # Own pages come behind shared ones, unless the tree gave a request another's page.
        ordered = pages[len(pages) - len(own) :]
        if len(own) and not np.array_equal(np.sort(ordered), np.sort(own)):
            ordered = pages[np.isin(pages, own)]
        closed = len(own) - bool(len(own) and request.tokens % page_size)
        found.append((UnitView(request.rid, closed, (request.rid,)), ordered))
    for group in groups[len(live) :]:
        users = tuple(
            request.rid
            for request, pages in zip(live, held, strict=True)
            if np.isin(group[0], pages)
        )
        found.append((UnitView(f"prefix:{group[0]}", len(group), users), group))
    return found


def reserve_tails(store: ResidencyStore, requests: int) -> None:
    """Keep arena pages free for the tails that ``requests`` open next."""
    reserve = store.layout.layers * max(1, requests)
    store.reserve_pages = min(reserve, store.capacity.main_pages // RESERVE_SHARE)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """All pages of ``parts``, int64."""
    return np.concatenate([NO_PAGES, *parts]).astype(np.int64)
