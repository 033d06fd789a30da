"""Joins placement and residency store: from a batch of the engine to one step of the store.

A step begins when the attention backend prepares its metadata and ends when the
forward pass returns. While nothing is placed on the host, a step costs one look-up
of extents: no tables, no copies, no placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from orbitflow_sglang.engine.page_rows import PageRows
from orbitflow_sglang.engine.placement import LiveRequest, Placer, PolicyPlacer, joined
from orbitflow_sglang.planner.cost_model import Profile
from orbitflow_sglang.planner.policies import Policy
from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.store import NO_PAGES, LayerPass, ResidencyStore, Step


@dataclass(frozen=True)
class StepInput:
    """A forward pass as the engine sees it; one entry per request."""

    rows: Sequence[int]
    seq_lens: Sequence[int]  # tokens behind this pass, new ones included
    prefix_lens: Sequence[int] | None  # tokens before this pass; None: a decode step
    slots: np.ndarray  # token slots written, int64, one per row of K and V

    @property
    def before(self) -> Sequence[int]:
        """Tokens that each request had before this pass."""
        if self.prefix_lens is None:
            return [length - 1 for length in self.seq_lens]
        return self.prefix_lens

    @staticmethod
    def of(batch: Any) -> StepInput:
        """Of SGLang's ``ScheduleBatch``, ready to run. Waits for what only the device knows."""
        decode = batch.forward_mode.is_decode_or_idle()
        return StepInput(
            batch.req_pool_indices_cpu.tolist(),
            _either(batch.seq_lens_cpu, batch.seq_lens).tolist(),
            None if decode else list(batch.prefix_lens),
            batch.out_cache_loc.cpu().numpy(),
        )

    @staticmethod
    def of_forward(forward_batch: Any) -> StepInput:
        """Of SGLang's ``ForwardBatch``; on a device this waits for the steps before it, too."""
        decode = forward_batch.forward_mode.is_decode_or_idle()
        return StepInput(
            _either(forward_batch.req_pool_indices_cpu, forward_batch.req_pool_indices).tolist(),
            _either(forward_batch.seq_lens_cpu, forward_batch.seq_lens).tolist(),
            None if decode else list(forward_batch.extend_prefix_lens_cpu),
            forward_batch.out_cache_loc.cpu().numpy(),
        )


def _either(on_host: torch.Tensor | None, on_device: torch.Tensor) -> torch.Tensor:
    return on_device if on_host is None else on_host


@dataclass
class _Uniform:
    """A step in which a page lies at one id in every layer."""

    ids: torch.Tensor
    counts: list[int]
    tokens: list[int]
    slots: torch.Tensor


@dataclass
class Counters:
    """Totals since start."""

    steps: int = 0
    tiered_steps: int = 0  # steps with tables: some page was on the host or had to move
    idle_checks: int = 0
    failed_idle_checks: int = 0
    failed_steps: int = 0  # behind which all KV was given up


@dataclass(frozen=True)
class ProfileOrigin:
    """Where the cost profile is from."""

    source: str  # file, cache or measured
    seconds: float  # that it took to get


class Runtime:
    """One rank's OrbitFlow. The scheduler's thread owns it."""

    current: ClassVar[Runtime | None] = None  # of this process, for those SGLang tells nothing

    def __init__(self, store: ResidencyStore, placer: Placer) -> None:
        self.store = store
        self.placer = placer
        self.control: Any = None  # engine.control.SchedulerControl, where there is a controller
        self.profile: Profile | None = None
        self.profile_origin: ProfileOrigin | None = None
        self.counters = Counters()
        self.decode_batch_sizes: Counter[int] = Counter()
        self.rows: PageRows  # set by the attention backend
        self.coming: StepInput | None = None  # announced, and not begun
        self.live: Callable[[], list[LiveRequest]] = list
        self.cached_pages: Callable[[], np.ndarray] = lambda: NO_PAGES  # of the radix tree
        self.emulated: Any = None  # engine.emulated_compute.EmulatedCompute, on a test bed
        self.before_step: Callable[[Runtime], None] | None = None  # test control only
        self._uniform: _Uniform | None = None
        self._checked_at: tuple[int, int] | None = None
        Runtime.current = self

    def set_policy(self, policy: Policy) -> None:
        """Place by another policy from the next step on."""
        before, self.placer = self.placer, PolicyPlacer(self.store, policy)
        self.placer.placements = before.placements  # a counter never falls

    def start_over(self) -> None:
        """Forget what was done so far: it was not for any request. All pages must be free."""
        self.store.renew()
        self.counters = Counters()
        self.decode_batch_sizes.clear()
        if self.emulated is not None:
            self.emulated.forget()
        self.placer.reset()
        self._checked_at = None

    # --- one step -------------------------------------------------------------

    def announce(self, step: StepInput) -> None:
        """``step`` is next; its rows are read now. When attention is prepared, steps before it
        may still run on the device, and would be waited for."""
        if step.prefix_lens is None:
            self.rows.appended(step.rows, step.seq_lens, step.slots)
        else:
            self.rows.written(step.rows, step.seq_lens)
        self.coming = step

    def begin(self, step: StepInput) -> None:
        """Make the pages of ``step``, announced or not, ready to be written and read."""
        if step is not self.coming:
            self.rows.written(step.rows, step.seq_lens)
        self.coming = None
        if self.store.step is not None:  # given up without an end: nobody reads it any more
            self.end()
        if self.before_step is not None:
            self.before_step(self)
        self.counters.steps += 1
        if step.prefix_lens is None:
            self.decode_batch_sizes[len(step.rows)] += 1
        pages = list(map(self.rows.pages, step.rows, step.seq_lens))
        self._uniform = None if self.placer.spills else self._begin_uniform(step, pages)
        if self._uniform is None:
            self.counters.tiered_steps += 1
            self._begin_tiered(step, pages)
        elif self.placer.mirrors:
            live = self.live()
            self.placer.begun(live, [self.pages_of(request) for request in live])

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the step's new K and V of one layer, ``[tokens, kv_heads, head_dim]``."""
        if self._uniform is None:
            self.store.write(layer, k, v)
            return
        for new, arena in zip((k, v), self.store.arena.layer_view(layer), strict=True):
            arena.view(-1, *arena.shape[2:])[self._uniform.slots] = new

    def passes(self, layer: int) -> Iterator[LayerPass]:
        """The parts in which ``layer`` is attended; each is valid until the next is asked for."""
        if self._uniform is None:
            yield from self.store.passes(layer)
        else:
            k, v = self.store.arena.layer_view(layer)
            step = self._uniform
            yield LayerPass(k, v, step.ids, step.counts, step.tokens, whole=True)

    def end(self) -> None:
        """The forward pass is over, or was given up."""
        self.coming = self._uniform = None
        if self.store.step is not None:
            self.store.end()

    @property
    def stall_s(self) -> float:
        """Seconds that compute has waited for pages since start."""
        return self.store.ring.stall_s

    def pages_of(self, request: LiveRequest) -> np.ndarray:
        """Logical pages of a request, in the order of its tokens."""
        return self.rows.pages(request.row, request.tokens)

    # --- between steps --------------------------------------------------------

    def check_idle(self) -> list[str]:
        """Violated invariants of an idle server, in words; looked at once an idle period.

        Every page in use belongs to the radix tree, and nothing is under way.
        """
        in_use = self.store.table.pages_in_use()
        now = (self.counters.steps, len(in_use))
        if now == self._checked_at:
            return []
        self._checked_at = now
        self.counters.idle_checks += 1
        self.store.quiesce()
        found = self.store.check()
        cached = np.unique(self.cached_pages())
        if not np.array_equal(cached, in_use):
            lost, foreign = np.setdiff1d(in_use, cached), np.setdiff1d(cached, in_use)
            found.append(
                f"{lost.size} pages in use belong to no cached prefix {lost[:8]}, "
                f"{foreign.size} cached pages have no place {foreign[:8]}"
            )
        self.counters.failed_idle_checks += bool(found)
        return found

    # --- inside ---------------------------------------------------------------

    def _begin_uniform(self, step: StepInput, pages: list[np.ndarray]) -> _Uniform | None:
        size = self.store.layout.page_size
        first_new, read, tokens = spans(step, size)
        new = np.concatenate([p[first:] for p, first in zip(pages, first_new, strict=True)])
        written = step.slots // size
        starts = self.store.begin_uniform(np.concatenate(pages), new[new > 0], written)
        if starts is None:
            return None
        if step.prefix_lens is not None:  # an extend step does not read what it writes
            ends = np.cumsum([len(p) for p in pages])[:-1]
            each = zip(np.split(starts, ends), read, strict=True)
            starts = np.concatenate([ids[:count] for ids, count in each])
        extent, device = self.store.table.extent, self.store.arena.k.device
        slots = extent[written].astype(np.int64) * size + step.slots % size
        return _Uniform(to_device(starts, device), read, tokens, to_device(slots, device))

    def _begin_tiered(self, step: StepInput, pages: list[np.ndarray]) -> None:
        live, size = self.live(), self.store.layout.page_size
        first_new, read, tokens = spans(step, size)
        in_pass = set(step.rows)
        held = [self.pages_of(request) for request in live]
        idle = [p for p, r in zip(held, live, strict=True) if r.row not in in_pass]
        # The tail of a paused request is written again only once it is back.
        partial = [
            p[-1:] for p, r in zip(held, live, strict=True) if r.tokens % size and not r.paused
        ]
        new_tails, new_full, rows, written = [], [], [], []
        first_row = 0
        requests = zip(pages, first_new, step.before, step.seq_lens, strict=True)
        for p, first, before, length in requests:
            # A decode step reads the page it fills, so that page is open like a tail.
            full = len(p) if length % size == 0 and step.prefix_lens is not None else len(p) - 1
            new_full.append(p[first:full])
            rows.append(first_row + first * size - before + size * np.arange(max(0, full - first)))
            new_tails.append(p[max(first, full) :])
            written.append(p[before // size : before // size + 1] if before % size else p[:0])
            written.append(new_tails[-1])
            first_row += length - before
        tails = joined(new_tails)
        store_step = Step(
            reads=[p[:n].astype(np.int64) for p, n in zip(pages, read, strict=True)],
            read_tokens=tokens,
            slots=step.slots,
            new_tails=tails[tails > 0],
            new_full=joined(new_full),
            new_full_rows=joined(rows),
            open_pages=np.unique(joined([*partial, *written])),
            idle_pages=joined(idle),
        )
        self.placer.place(live, held, store_step)
        self.store.begin(store_step)
        self.placer.begun(live, held)


def spans(step: StepInput, size: int) -> tuple[list[int], list[int], list[int]]:
    """Per request: the first new page, the pages that are read back, the tokens in those."""
    first_new = [-(-before // size) for before in step.before]
    # A decode step reads its new token back, an extend step has its own at hand.
    tokens = list(step.seq_lens if step.prefix_lens is None else step.before)
    return first_new, [-(-count // size) for count in tokens], tokens
