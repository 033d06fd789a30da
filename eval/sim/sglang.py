"""What SGLang decides by itself: who may start, and who is thrown out when slots run out.

After its source, version 0.5.23 (``PrefillAdder``, ``NewTokenRatioTracker``,
``retract_decode``): a newcomer needs slots for its prompt and all that it may say, beside a
share of what those that decode may still say. The share shrinks step by step, and is set
anew when somebody had to be thrown out.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.sim.job import Job

FIRST_SHARE = 0.7
LEAST_SHARE = 0.7 * 0.14
DECAY_STEPS = 600
RETRACT_STEPS = 20  # that those who stay are given room for
MOST_NEW_TOKENS = 4096  # that a single request counts with


class Admission:
    """SGLang's estimate of what running requests will still need."""

    def __init__(self, exact: bool) -> None:
        self.exact = exact  # output lengths are known (``ignore_eos``)
        self.share = FIRST_SHARE

    def decoded(self) -> None:
        """A decode step without a retraction."""
        self.share = max(LEAST_SHARE, self.share - (FIRST_SHARE - LEAST_SHARE) / DECAY_STEPS)

    def retracted(self, running: Sequence[Job]) -> None:
        """Somebody was thrown out; ``running`` stay."""
        said = sum(job.view.generated for job in running)
        may = sum(job.view.max_new_tokens for job in running)
        self.share = min(1.0, (said + RETRACT_STEPS * len(running)) / (may + 1))

    def idle(self) -> None:
        """Nothing runs: SGLang starts afresh."""
        self.share = FIRST_SHARE

    def reserved(self, running: Sequence[Job]) -> float:
        """Slots kept for what ``running`` may still say."""
        share = 1.0 if self.exact else self.share
        return share * sum(min(_left(job), MOST_NEW_TOKENS) for job in running)

    def wanted(self, job: Job) -> int:
        """Slots that a newcomer has to find."""
        return job.view.prompt_tokens + self.to_come(job) + job.page_size

    def to_come(self, job: Job) -> int:
        """Slots that a prompt is counted with for its answer."""
        return min(_left(job), MOST_NEW_TOKENS)


def retraction_order(running: Sequence[Job]) -> list[Job]:
    """Who is thrown out first: the least output, of these the longest prompt, of these the last."""
    kept = sorted(running, key=lambda job: (-job.view.generated, job.asked_tokens))
    return kept[::-1]


def _left(job: Job) -> int:
    return max(0, job.view.max_new_tokens - job.view.generated)
