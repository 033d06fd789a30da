"""The store against a dictionary: whatever is asked of it, every token is read back as written.

Half of the runs use a link that copies only what is waited for, and lets everything
issued happen while a part is being read: a wait too few or a page handed out too
early gives wrong tokens every time, not once in a thousand.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from residency_stores import advance, make_store, tokens_read, vectors

from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.store import NO_PAGES, LayerPass, ResidencyStore, Step

# Hypothesis likes the same few numbers best: three of them are seldom the same three.
seeds = st.tuples(*[st.integers(0, 2**32 - 1)] * 3)
Seed = tuple[int, int, int]


@dataclass
class Request:
    pages: list[int] = field(default_factory=list)  # perhaps more than tokens: a pass given up
    tokens: int = 0


@dataclass
class Chunk:
    """What one request does in a pass."""

    request: Request
    pages: list[int]  # all of them, new ones included
    before: int
    after: int
    decode: bool


class StoreMachine(RuleBasedStateMachine):
    """Requests, cached prefixes and what each page holds, beside the real store."""

    store: ResidencyStore

    @initialize(seed=seeds)
    def start(self, seed: Seed) -> None:
        self.turns = 0
        rng = self._rng(seed)
        self.layers, self.size = rng.randint(3, 5), rng.choice([1, 2, 4])
        extents, self.logical = rng.randint(3, 9), rng.randint(12, 40)
        link = rng.choice(["lazy", "lazy", "lazy", "slow", "fast"])
        self.lazy = link == "lazy"
        self.store = self._make_store(
            layers=self.layers,
            page_size=self.size,
            main=self.layers * extents + rng.randint(0, 2),
            ring=rng.choice([1, 2, 2, 3, 4, 6, 8, 12]),
            host=int(self.layers * self.logical * rng.choice([0.2, 0.5, 1.0, 1.0])),
            logical=self.logical,
            lazy=self.lazy,
            link_bytes_per_s=1e6 if link == "slow" else None,
        )
        self.free_ids = list(range(1, self.logical + 1))
        self.holders = np.zeros(self.logical + 1, dtype=int)
        self.live: list[Request] = []
        self.cached: list[Request] = []
        self.numbers = np.zeros((self.layers, self.logical + 1, self.size), dtype=np.int64)
        self.next_number = 1
        self.max_live = extents + 1  # one more than there may be tails
        self.eagerness = 0.0  # how often the link goes on while a part is read
        self.offload = rng.choice([0.2, 0.5, 0.9])  # share of what is placed

    def _make_store(self, **sizes: Any) -> ResidencyStore:
        return make_store(**sizes)

    # --- passes ---------------------------------------------------------------

    @rule(seed=seeds)
    def prefill(self, seed: Seed) -> None:
        """New requests, from nothing or behind a shared prefix, and further chunks of old ones."""
        rng = self._rng(seed)
        requests = rng.sample(self.live, min(len(self.live), rng.choice([0, 0, 1, 2])))
        room = self.max_live - len(self.live)
        requests += [self._new_request(rng) for _ in range(min(room, rng.choice([0, 1, 1, 2])))]
        chunks = []
        for request in requests:
            length = rng.randint(1, rng.choice([1, 3, 8]) * self.size + 1)
            if chunk := self._chunk(request, length, decode=False):
                chunks.append(chunk)
        self._pass(chunks, rng)
        self.live = [request for request in self.live if request.pages]

    @precondition(lambda self: self.live)
    @rule(seed=seeds, steps=st.integers(1, 6), paused=st.booleans())
    def decode(self, seed: Seed, steps: int, paused: bool) -> None:
        """Live requests by a token a step each; some of them are paused, or none."""
        rng = self._rng(seed)
        count = rng.randint(1, len(self.live)) if paused else len(self.live)
        chosen = rng.sample(self.live, count)
        for _ in range(steps):
            running = [r for r in chosen if r.tokens and any(r is other for other in self.live)]
            chunks = [self._chunk(r, 1, decode=True) for r in running]
            self._pass([chunk for chunk in chunks if chunk], rng)
        self.live = [request for request in self.live if request.pages]

    # --- placement and ends ---------------------------------------------------

    @rule(seed=seeds)
    def place(self, seed: Seed) -> None:
        self._place(self._rng(seed), [], old=True)

    @rule(share=st.sampled_from([0.0, 0.0, 0.1, 0.4]))
    def reserve(self, share: float) -> None:
        self.store.reserve_pages = int(self.store.capacity.main_pages * share)

    @precondition(lambda self: self.live)
    @rule(seed=seeds, keep=st.sampled_from(["nothing", "full pages", "all"]))
    def finish(self, seed: Seed, keep: str) -> None:
        """A request ends, or is aborted; what it computed may stay as a cached prefix."""
        request = self.live.pop(self._rng(seed).randrange(len(self.live)))
        tokens = request.tokens if keep == "all" else request.tokens // self.size * self.size
        if keep == "nothing":
            tokens = 0
        count = -(-tokens // self.size)
        if tokens:
            self.cached.append(Request(request.pages[:count], tokens))
        self._let_go(request.pages[count:])

    @precondition(lambda self: self.cached)
    @rule(seed=seeds, share=st.sampled_from([0.3, 1.0]))
    def evict_cache(self, seed: Seed, share: float) -> None:
        rng = self._rng(seed)
        for _ in range(max(1, int(len(self.cached) * share))):
            self._let_go(self.cached.pop(rng.randrange(len(self.cached))).pages)

    @rule()
    def quiesce(self) -> None:
        self.store.quiesce()
        assert self.store.ring.num_free == self.store.ring.num_pages
        assert not self.store._write_backs._under_way

    @rule(h2d=st.integers(0, 5), d2h=st.integers(0, 5))
    def copies_go_on(self, h2d: int, d2h: int) -> None:
        self._advance(h2d, d2h)
        time.sleep(0.0005)

    def _advance(self, h2d: int, d2h: int) -> None:
        advance(self.store, h2d, d2h)

    @invariant()
    def nothing_violated(self) -> None:
        if hasattr(self, "store"):
            assert self.store.check() == []
            in_use = np.flatnonzero(self.holders).tolist()
            assert self.store.table.pages_in_use().tolist() == in_use

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        store = self.store
        for request in [*self.live, *self.cached]:
            self._let_go(request.pages)
        store.clear()
        assert store.check() == []
        assert store.arena.num_free == store.capacity.main_pages
        assert store.host.num_free == store.capacity.host_pages
        assert store.ring.num_free == store.capacity.ring_pages
        store.close()

    def _rng(self, seed: Seed) -> random.Random:
        self.turns += 1
        return random.Random(repr((seed, self.turns)))

    # --- requests -------------------------------------------------------------

    def _new_request(self, rng: random.Random) -> Request:
        request = Request()
        sources = [source for source in [*self.cached, *self.live] if source.tokens]
        if sources and rng.random() < 0.6:
            source = rng.choice(sources)
            cached = any(source is entry for entry in self.cached)
            own = (self.holders[source.pages] == 1).all()
            if cached and own and source.tokens % self.size and rng.random() < 0.7:
                # Goes on in the part filled page of someone who has left.
                self.cached = [entry for entry in self.cached if entry is not source]
                request = source
            elif full := source.tokens // self.size:
                count = rng.randint(1, full)
                request = Request(source.pages[:count], count * self.size)
                self.holders[request.pages] += 1
        self.live.append(request)
        return request

    def _chunk(self, request: Request, length: int, decode: bool) -> Chunk | None:
        """Takes page ids for ``length`` more tokens; None where there are none left."""
        short = -(-(request.tokens + length) // self.size) - len(request.pages)
        if short > len(self.free_ids):
            return None
        taken = [self.free_ids.pop() for _ in range(short)]
        pages = request.pages + taken
        return Chunk(request, pages, request.tokens, request.tokens + length, decode)

    def _let_go(self, pages: list[int]) -> None:
        self.holders[pages] -= 1
        dead = [page for page in pages if self.holders[page] == 0]
        self.store.free(np.array(dead, dtype=np.int64))
        self.free_ids += dead

    # --- a pass ---------------------------------------------------------------

    def _place(self, rng: random.Random, new: list[int], old: bool) -> None:
        """Random layers of some units; a unit is the pages of a request, or new pages."""
        requests = self.live + self.cached if old else []
        for pages in [*(r.pages for r in requests), new]:
            if pages and rng.random() < 0.7:
                share = rng.choice([0.0, 1.0, self.offload, self.offload])
                mask = np.array([rng.random() < share for _ in range(self.layers)])
                self.store.place(np.array(pages, dtype=np.int64), mask)

    def _pass(self, chunks: list[Chunk], rng: random.Random) -> None:
        if not chunks:
            return
        new = [page for c in chunks for page in c.pages[len(c.request.pages) :]]
        if rng.random() < 0.5:
            self._place(rng, new, old=rng.random() < 0.4)
        step = self._step(chunks, rng)
        # Drawn before anything that may depend on how far the copies are.
        try_uniform = rng.random() < 0.4
        last = rng.choice([self.layers] * 5 + list(range(self.layers)))
        last_is_begun, some_is_read = rng.random() < 0.5, rng.random() < 0.7
        kept = [rng.random() < 0.5 for _ in chunks]
        link = random.Random(rng.random())
        self.eagerness = rng.choice([0.0, 0.0, 0.5, 1.0])

        feasible = self._feasible(step)
        # Without a lazy link, finding room all the same would be a matter of timing.
        begun = feasible or self.lazy
        ids = None
        if try_uniform and begun:
            every = np.array([page for c in chunks for page in c.pages], dtype=np.int64)
            written = step.slots // self.size
            ids = self.store.begin_uniform(every, np.array(new, dtype=np.int64), written)
        if ids is None:
            begun = begun and self._begin(step, feasible)
        if not begun:
            self.free_ids += new
            self._let_go(self.live.pop().pages)
            return
        self.holders[new] += 1
        self._run_ahead(step, rng, fetch=ids is None)
        for layer in range(last):
            self._layer(layer, step, chunks, ids is not None, link)
        if last < self.layers and last_is_begun:
            # Given up in the midst of a layer: after its write or within its attention.
            self._write(last, step, ids is not None)
            if ids is None and some_is_read:
                next(self.store.passes(last))
        self.store.end()
        for chunk, keep in zip(chunks, kept, strict=True):
            if last == self.layers:
                chunk.request.pages, chunk.request.tokens = chunk.pages, chunk.after
            elif keep:
                chunk.request.pages = chunk.pages  # a later pass writes them again
            else:
                self._let_go(chunk.pages[len(chunk.request.pages) :])

    def _run_ahead(self, step: Step, rng: random.Random, fetch: bool) -> None:
        """Copies for later steps, as the engine asks for them behind ``begin``."""
        if rng.random() < 0.4 and len(step.idle_pages) and fetch:
            self.store.fetch_ahead(np.unique(step.idle_pages), rng.choice([1, 3, 100]))
        if rng.random() < 0.3:
            closed = np.concatenate([step.idle_pages, *step.reads])
            closed = np.setdiff1d(closed, np.concatenate([step.open_pages, step.new_tails]))
            closed = np.setdiff1d(closed, step.slots // self.size)
            self.store.mirror(closed, rng.choice([1, 3, 100]))

    def _begin(self, step: Step, feasible: bool) -> bool:
        try:
            self.store.begin(step)
        except ResidencyError:
            assert not feasible, "there was room"
            return False
        return True

    def _step(self, chunks: list[Chunk], rng: random.Random) -> Step:
        size, row = self.size, 0
        reads: list[list[int]] = []
        slots: list[int] = []
        tails: list[int] = []
        full: list[int] = []
        full_rows: list[int] = []
        # The partly filled page of a request that is set aside may leave the arena too.
        aside = [r for r in self.live if not any(r is c.request for c in chunks)]
        aside = [r for r in aside if rng.random() < 0.4]
        partial = [r for r in self.live if r.tokens % size and not any(r is a for a in aside)]
        open_pages = [r.pages[r.tokens // size] for r in partial]
        for c in chunks:
            reads.append(c.pages[: -(-(c.after if c.decode else c.before) // size)])
            slots += [c.pages[t // size] * size + t % size for t in range(c.before, c.after)]
            for index in range(c.before // size, -(-c.after // size)):
                page = c.pages[index]
                fills = (index + 1) * size <= c.after
                if index < len(c.request.pages):
                    open_pages.append(page)
                elif fills and not (c.decode and rng.random() < 0.7):
                    full.append(page)
                    full_rows.append(row + index * size - c.before)
                else:
                    tails.append(page)
            row += c.after - c.before
        if rng.random() < 0.5:
            open_pages += tails
        slots += [rng.randrange(size) for _ in range(rng.choice([0, 0, 3]))]  # padding
        in_pass = [c.request for c in chunks]
        idle = [r.pages for r in self.live if not any(r is other for other in in_pass)]
        return Step(
            reads=[np.array(pages, dtype=np.int64) for pages in reads],
            read_tokens=[c.after if c.decode else c.before for c in chunks],
            slots=np.array(slots, dtype=np.int64),
            new_tails=np.array(tails, dtype=np.int64),
            new_full=np.array(full, dtype=np.int64),
            new_full_rows=np.array(full_rows, dtype=np.int64),
            open_pages=np.unique(np.array(open_pages, dtype=np.int64)),
            idle_pages=np.array([page for pages in idle for page in pages], dtype=np.int64),
        )

    def _feasible(self, step: Step) -> bool:
        """Whether arena and host have the room: open pages have to be in the arena."""
        table, capacity = self.store.table, self.store.capacity
        reads = np.concatenate(step.reads)
        read_full = np.intersect1d(step.new_full, reads)
        opened = np.unique(np.concatenate([step.open_pages, step.new_tails, read_full]))
        new = len(step.new_tails) + len(step.new_full)
        total = self.layers * (len(table.pages_in_use()) + new)
        # A page comes back from the host before its place there is free.
        coming_back = self.layers * len(step.open_pages)
        if self.lazy:
            coming_back = int((table.host_page[:, step.open_pages] >= 0).sum())
        in_arena = self.layers * len(opened) <= capacity.main_pages
        return in_arena and total + coming_back <= capacity.main_pages + capacity.host_pages

    def _layer(
        self, layer: int, step: Step, chunks: list[Chunk], uniform: bool, link: random.Random
    ) -> None:
        self._write(layer, step, uniform)
        found: list[list[int]] = [[] for _ in chunks]
        parts = [self._uniform_part(layer, step)] if uniform else self.store.passes(layer)
        for part in parts:
            if link.random() < self.eagerness:
                self._advance(link.choice([0, 1, 100]), link.choice([0, 1, 100]))
            assert len(part.pages) == len(part.tokens) == len(chunks)
            for i in range(len(chunks)):
                self._compute(lambda part=part, i=i: found[i].extend(tokens_read(part, i, layer)))
        wanted = [
            sorted(self.numbers[layer, read].reshape(-1)[:tokens].tolist())
            for read, tokens in zip(step.reads, step.read_tokens, strict=True)
        ]

        def compare() -> None:
            assert [sorted(numbers) for numbers in found] == wanted, f"layer {layer}"

        self._compute(compare)

    def _compute(self, work: Callable[[], None]) -> None:
        """What the model would do with the pages it reads: at once here."""
        work()

    def _write(self, layer: int, step: Step, uniform: bool) -> None:
        slots, size = step.slots, self.size
        numbers = np.arange(self.next_number, self.next_number + len(slots))
        self.next_number += len(slots)
        k, v = vectors(layer, numbers)
        if uniform:
            starts = self.store.table.extent[slots // size].astype(np.int64)
            self._uniform_write(layer, torch.from_numpy(starts * size + slots % size), k, v)
        else:
            self.store.write(layer, k, v)
        self.numbers[layer, slots // size, slots % size] = numbers

    def _uniform_write(
        self, layer: int, where: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        views = self.store.arena.layer_view(layer)

        def write() -> None:
            for new, arena in zip((k, v), views, strict=True):
                arena.view(-1, *arena.shape[2:])[where] = new

        self._compute(write)

    def _uniform_part(self, layer: int, step: Step) -> LayerPass:
        k, v = self.store.arena.layer_view(layer)
        pages = torch.from_numpy(self.store.table.extent[np.concatenate([NO_PAGES, *step.reads])])
        counts = [len(read) for read in step.reads]
        return LayerPass(k, v, pages, counts, step.read_tokens, whole=True)


# Of this test alone: a profile that is loaded would hold for every other test too.
EXAMPLES = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "residency"))
StoreMachine.TestCase.settings = EXAMPLES
TestStoreMachine = pytest.mark.unit(StoreMachine.TestCase)
