"""Tiny residency stores for tests, and a link whose copies are as late as they may be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.step import NO_PAGES, LayerPass, Step
from orbitflow_sglang.residency.store import ResidencyStore
from orbitflow_sglang.residency.transfer import HostTransfer, LinkStats


def layout(layers: int = 3, page_size: int = 2) -> KVLayout:
    return KVLayout(layers, page_size, 1, head_dim=2, v_head_dim=3, dtype=torch.float32)


def make_store(
    layers: int = 3,
    page_size: int = 2,
    main: int = 12,
    ring: int = 4,
    host: int = 60,
    logical: int = 20,
    lazy: bool = True,
    link_bytes_per_s: float | None = None,
    in_lockstep: bool = False,
    kind: type[ResidencyStore] = ResidencyStore,
) -> ResidencyStore:
    """A store on the CPU; with ``lazy``, over a link that copies only when it must."""
    capacity = Capacity(main + ring, ring, host, logical)
    store = kind(layout(layers, page_size), capacity, "cpu", link_bytes_per_s, in_lockstep)
    for tensor in (store.arena.k, store.arena.v, store.host.k, store.host.v):
        tensor.fill_(-1.0)  # what was never written belongs to no token
    if lazy:
        store.engine.close()
        store.engine._h2d, store.engine._d2h = LazyQueue(), LazyQueue()  # type: ignore[assignment]
    return store


class LazyQueue:
    """A direction of the link in which a copy is made when someone waits for it or it is told to.

    Nothing that was not waited for has happened: a missing wait shows every time.
    """

    def __init__(self) -> None:
        self.stats = LinkStats()
        self._jobs: deque[tuple[Callable[[], None], HostTransfer]] = deque()

    def submit(self, copy: Callable[[], None], nbytes: int) -> HostTransfer:
        transfer = _LazyTransfer(nbytes, self)
        self._jobs.append((copy, transfer))
        return transfer

    def advance(self, copies: int) -> None:
        for _ in range(min(copies, len(self._jobs))):
            copy, transfer = self._jobs.popleft()
            copy()
            self.stats.transfers += 1
            self.stats.bytes += transfer.nbytes
            transfer.end()

    def drain(self) -> None:
        self.advance(len(self._jobs))

    def close(self) -> None:
        self.drain()


class _LazyTransfer(HostTransfer):
    def __init__(self, nbytes: int, link: LazyQueue) -> None:
        super().__init__(nbytes)
        self._link = link

    def wait(self) -> None:
        while not self._ended.is_set():
            self._link.advance(1)
        super().wait()


def advance(store: ResidencyStore, h2d: int, d2h: int) -> None:
    """Let so many copies of a lazy store happen."""
    for link, copies in ((store.engine._h2d, h2d), (store.engine._d2h, d2h)):
        if isinstance(link, LazyQueue):
            link.advance(copies)


def vectors(layer: int, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V that tell which token of which layer they are: ``numbers`` below 2**24."""
    number = torch.from_numpy(numbers.astype(np.float32))[:, None, None]
    k = torch.cat([number, -number], dim=2)
    return k, torch.cat([number, -number, torch.full_like(number, layer)], dim=2)


def tokens_read(part: LayerPass, request: int, layer: int) -> list[int]:
    """The numbers of the tokens that a request finds in one part of a layer."""
    pages, tokens = part.pages[request].long(), part.tokens[request]
    k = part.k[pages].flatten(0, 1)[:tokens]
    v = part.v[pages].flatten(0, 1)[:tokens]
    assert len(k) == tokens, "fewer slots than tokens"
    numbers = k[:, 0, 0]
    written = [-1 if number < 0 else int(number) for number in numbers.tolist()]
    expected = vectors(layer, np.array(written, dtype=np.int64))
    assert torch.equal(k, expected[0]) and torch.equal(v, expected[1]), "a mix of tokens"
    return written


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def prefill_step(pages: list[int], size: int, **more: np.ndarray) -> Step:
    """A first chunk that fills ``pages``."""
    return Step(
        reads=[NO_PAGES],
        read_tokens=[0],
        slots=(np.array(pages)[:, None] * size + np.arange(size)).reshape(-1),
        new_full=np.array(pages),
        new_full_rows=size * np.arange(len(pages)),
        **more,
    )


def number_of(slots: np.ndarray) -> np.ndarray:
    """What ``run`` writes to a token slot."""
    return slots + 1


def run(store: ResidencyStore, step: Step) -> list[int]:
    """One pass that writes each slot's number and checks what it reads; parts of each layer."""
    store.begin(step)
    parts, size = [], store.layout.page_size
    for layer in range(store.layout.layers):
        store.write(layer, *vectors(layer, number_of(step.slots)))
        found: list[list[int]] = [[] for _ in step.reads]
        parts.append(0)
        for part in store.passes(layer):
            parts[-1] += 1
            for i, numbers in enumerate(found):
                numbers += tokens_read(part, i, layer)
        for pages, tokens, numbers in zip(step.reads, step.read_tokens, found, strict=True):
            slots = (pages[:, None] * size + np.arange(size)).reshape(-1)[:tokens]
            assert sorted(numbers) == sorted(number_of(slots).tolist())
    store.end()
    assert store.check() == []
    return parts


def read_step(pages: list[int], size: int, **more: np.ndarray) -> Step:
    """A pass that reads full ``pages`` and writes nothing but padding."""
    return Step([ids(*pages)], [len(pages) * size], slots=ids(0), **more)


def settle(store: ResidencyStore, pages: list[int]) -> None:
    """Two steps in which ``pages`` are live: what is to leave for the host has left."""
    for _ in range(2):
        store.begin(Step([], [], ids(0), idle_pages=np.array(pages)))
        store.end()
        store.quiesce()
    assert store.check() == []
