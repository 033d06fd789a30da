"""The arena, the host store and the link to the host: who holds how many pages.

Pages are of one layer. What leaves the device goes through a backlog that drains at the
link's rate; until then it still takes arena. Every page that moves is counted, so that the
books can be balanced at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.sim.job import Job
from orbitflow_sglang.planner.problem import IntArray


@dataclass
class Memory:
    """Counts of pages of one layer."""

    arena_pages: int
    ring_pages: int
    host_pages: int
    layers: int
    d2h_page_s: float
    backlog: float = 0.0  # to be written to the host, still in the arena
    h2d_pages: int = 0  # that crossed the link so far
    d2h_pages: int = 0
    forced_pages: int = 0  # of these, that somebody had to wait for
    # The books, each kept where a page changes hands: see ``balance``.
    left: int = 0  # pages whose only copy is on the host from then on
    came_back: int = 0
    given_up: int = 0  # on the host when their request ended or was thrown out
    reused: int = 0  # of those that left, there was a copy
    mirrored: int = 0
    tails: int = 0  # that went to the host with a pause
    tails_back: int = 0
    streamed: int = 0  # read for a step; those that stayed are among ``came_back`` too
    fetched: int = 0  # while their request was paused

    @property
    def main_pages(self) -> int:
        """The arena without the ring."""
        return self.arena_pages - self.ring_pages

    def used(self, live: Iterable[Job]) -> int:
        """Arena pages of live requests, tails included."""
        total = 0
        for job in live:
            if job.view.phase != "waiting":
                total += job.resident + (self.layers if job.view.phase != "paused" else 0)
        return total

    def on_host(self, live: Iterable[Job]) -> int:
        """Host pages that hold the only copy."""
        return sum(job.on_host for job in live)

    def pass_time(self, seconds: float) -> None:
        """What waits to be written goes on."""
        if self.backlog:
            self.backlog = max(0.0, self.backlog - seconds / self.d2h_page_s)

    def write(self, pages: int) -> None:
        """So many pages begin to leave the device."""
        self.backlog += pages
        self.d2h_pages += pages

    def balance(self, live: Sequence[Job] = ()) -> list[str]:
        """What does not add up, in words; ``live`` are those that still hold pages."""
        faults = []
        held = self.on_host(live)
        if self.left != self.came_back + self.given_up + held:
            faults.append(
                f"{self.left} pages left the device, {self.came_back} came back, "
                f"{self.given_up} were given up, and the host holds {held}"
            )
        written = self.left - self.reused + self.mirrored + self.tails
        if self.d2h_pages != written:
            faults.append(f"{self.d2h_pages} pages were written, {written} had to be")
        read = self.streamed + self.fetched + self.tails_back
        if self.h2d_pages != read:
            faults.append(f"{self.h2d_pages} pages were read, {read} had to be")
        if self.came_back > self.streamed + self.fetched:
            faults.append(f"{self.came_back} pages came back, {read - self.tails_back} were read")
        if self.tails != self.tails_back + self.layers * sum(
            job.view.phase == "paused" for job in live
        ):
            faults.append(f"{self.tails} tails left, {self.tails_back} came back")
        return faults

    # --- one request ------------------------------------------------------------

    def release(self, job: Job) -> None:
        """Its request has ended or was thrown out: every copy is given up."""
        self.given_up += job.on_host
        job.goal, job.copied = None, 0
        job.put(None)

    def set_aside(self, job: Job) -> None:
        """Its pages and its tail go to the host, but for those that are there already."""
        self.left += job.resident
        self.reused += job.copied
        self.tails += self.layers
        self.write(job.resident - job.copied + self.layers)
        job.copied, job.goal, job.host = 0, None, None
        job.on_host = job.closed_pages

    def fetch(self, job: Job, limit: int) -> int:
        """Pages of a paused request that come back, at most ``limit``."""
        moved = min(limit, job.on_host)
        job.on_host -= moved
        job.copied += moved
        self.came_back += moved
        self.fetched += moved
        self.h2d_pages += moved
        return moved

    def bring_back(self, job: Job) -> None:
        """A paused request decodes again; what it still misses is streamed."""
        missing = job.on_host
        self.h2d_pages += self.layers  # its tail
        self.tails_back += self.layers
        job.put(job.spread(missing) if missing else None)

    def mirror(self, job: Job, limit: int) -> int:
        """Pages copied to the host ahead of a pause; they stay in the arena."""
        moved = max(0, min(limit, job.resident - job.copied))
        job.copied += moved
        self.mirrored += moved
        self.d2h_pages += moved
        return moved

    def offload(self, job: Job, host: IntArray) -> int:
        """Pages go to the host until ``host``; those copied before need not be written."""
        before = job.resident
        copied = min(job.copied, before)
        job.copied = copied
        job.put(host)
        moved = before - job.resident
        written = max(0, moved - copied)
        job.copied = max(0, copied - moved)
        self.left += moved
        self.reused += moved - written
        self.write(written)
        return moved

    def settle(self, job: Job, limit: int, room: int) -> int:
        """One step towards ``job.goal``: at most ``limit`` pages leave, and at most ``room``
        of those streamed stay. Returns how many left."""
        goal = job.goal
        if goal is None and job.host is None:
            return 0
        now = np.zeros(self.layers, np.int64) if job.host is None else job.host
        goal = np.zeros(self.layers, np.int64) if goal is None else np.minimum(goal, job.closed)
        if np.array_equal(now, goal):
            return 0
        back = _first(np.maximum(0, now - goal), room)
        if back.any():
            job.put(now - back)
            job.copied += int(back.sum())
            self.came_back += int(back.sum())
            now = now - back
        away = _first(np.maximum(0, goal - now), limit)
        return self.offload(job, now + away) if away.any() else 0

    def squeeze(self, jobs: Iterable[Job], missing: int) -> int:
        """The arena lacks ``missing`` pages: closed pages leave at once, of the largest
        requests first. Returns how many could."""
        moved = 0
        for job in sorted(jobs, key=lambda one: (-one.resident, one.order)):
            left = missing - moved
            if left <= 0:
                break
            take = min(left, job.resident)
            if take > 0:
                now = np.zeros(self.layers, np.int64) if job.host is None else job.host
                moved += self.offload(job, now + _share(job.closed - now, take))
        self.forced_pages += moved
        return moved


def _first(moves: IntArray, most: int) -> IntArray:
    """``moves``, ``[layers]``, cut to ``most`` in total; those of the first layers stay."""
    if moves.sum() <= most:
        return moves
    return np.diff(np.minimum(moves.cumsum(), max(0, most)), prepend=0)


def _share(free: IntArray, pages: int) -> IntArray:
    """``pages`` in total, shared out as ``free``, ``[layers]``, is; never more than that."""
    moves: IntArray = free * pages // max(1, int(free.sum()))
    rest = np.flatnonzero(free > moves)[: pages - int(moves.sum())]
    moves[rest] += 1
    return moves
