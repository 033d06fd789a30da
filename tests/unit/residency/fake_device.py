"""A device that is as late as it may be, and does what is ready in any order that events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

Work = Callable[[], None]
COMPUTE = 2  # behind the two directions


@dataclass(eq=False)
class Event:
    come: bool = False


@dataclass
class Job:
    work: Work
    after: list[Event] = field(default_factory=list)
    end: Event = field(default_factory=Event)


class FakeStreams:
    """Three queues. ``most_at_once`` jobs may run whenever somebody looks; else none does until
    it has to."""

    def __init__(self, seed: int, most_at_once: int = 0, ordered: bool = True) -> None:
        self._queues: list[deque[Job]] = [deque(), deque(), deque()]
        self._awaited: list[Event] = []  # by whatever compute is asked for next
        self._random = random.Random(seed)
        self._most_at_once = most_at_once
        self._ordered = ordered  # False: copies do not wait for compute, which is wrong

    # --- as a device is asked ---------------------------------------------------

    def compute(self, work: Work) -> None:
        self._queues[COMPUTE].append(Job(work, self._awaited))
        self._awaited = []
        self._go_on()

    def copy(self, direction: int, work: Work) -> Event:
        # An event on the compute queue, behind what it was asked for so far.
        mark = Job(lambda: None, self._awaited)
        self._awaited = []
        self._queues[COMPUTE].append(mark)
        job = Job(work, [mark.end] if self._ordered else [])
        self._queues[direction].append(job)
        self._go_on()
        return job.end

    def compute_waits(self, event: Event) -> Event:
        self._awaited.append(event)
        mark = Job(lambda: None, self._awaited)
        self._awaited = []
        self._queues[COMPUTE].append(mark)
        return mark.end

    def query(self, event: Event) -> bool:
        self._go_on()
        return event.come

    def seconds(self, event: Event) -> float:
        assert event.come
        return 0.0

    def synchronize(self) -> None:
        self.finish(0, 1)

    # --- as time goes on ----------------------------------------------------------

    def finish(self, *queues: int) -> None:
        """Run until these queues, or all, are empty."""
        wanted = [self._queues[number] for number in queues or range(3)]
        while any(wanted):
            assert self._step(), "everybody waits for somebody else"

    def _go_on(self) -> None:
        for _ in range(self._random.randint(0, self._most_at_once)):
            if not self._step():
                return

    def _step(self) -> bool:
        """Run the head of a random queue that waits for nothing; False when there is none."""
        ready = [queue for queue in self._queues
                 if queue and all(event.come for event in queue[0].after)]  # fmt: skip
        if not ready:
            return False
        job = self._random.choice(ready).popleft()
        job.work()
        job.end.come = True
        return True


class FakeCopier:
    """Copies of pages, done when their turn has come."""

    def pages(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, of: np.ndarray
    ) -> None:
        target[torch.from_numpy(to.astype(np.int64))] = source[
            torch.from_numpy(of.astype(np.int64))
        ]

    def rows(
        self, target: torch.Tensor, source: torch.Tensor, to: np.ndarray, first: np.ndarray
    ) -> None:
        rows = first[:, None] + np.arange(target.shape[1])
        target[torch.from_numpy(to.astype(np.int64))] = source[torch.from_numpy(rows)]
