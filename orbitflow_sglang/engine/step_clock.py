"""What a step takes, where the next may be launched before it has ended."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Launched:
    """A step as it was launched."""

    prefill: bool
    batch: int
    context_tokens: int
    new_tokens: int
    predicted_s: float


@dataclass(frozen=True)
class Totals:
    """What has been counted since start, at one moment."""

    at_s: float
    stall_s: float
    h2d_bytes: int
    h2d_busy_s: float

    def since(self, before: Totals) -> Totals:
        """What came between; ``at_s``: how long that was."""
        return Totals(
            self.at_s - before.at_s,
            self.stall_s - before.stall_s,
            self.h2d_bytes - before.h2d_bytes,
            self.h2d_busy_s - before.h2d_busy_s,
        )


class StepClock:
    """From one launch to the next passes a step: the last one, or, where launches run ahead of
    the device, the one before it."""

    def __init__(self) -> None:
        self._steps: deque[Launched] = deque()
        self._since: Totals | None = None  # when the oldest of them began

    def ended(self, now: Totals, under_way: int) -> tuple[Launched, Totals] | None:
        """Before a launch, with ``under_way`` steps that have not ended: the one that has since
        the last launch, and what it took. None where none has, or more than one: nobody can tell
        their times apart."""
        count = max(0, len(self._steps) - under_way)
        found = None
        if count == 1 and self._since is not None:
            found = self._steps[0], now.since(self._since)
        for _ in range(count):
            self._steps.popleft()
        if count or self._since is None:
            self._since = now
        return found

    def launched(self, step: Launched) -> None:
        """``step`` runs, or will behind those before it."""
        self._steps.append(step)

    def forget(self) -> None:
        """Nothing runs: the time until the next launch belongs to no step."""
        self._steps.clear()
        self._since = None
