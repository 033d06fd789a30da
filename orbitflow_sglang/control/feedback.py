"""The cost profile, refined by what steps turn out to take.

Each estimate follows its samples by a moving average of logarithms, and a sample counts as
at most ``CLIP`` times off: a hiccup of a second moves an estimate no further than a step of
twice the time would, while a lasting change is followed within some tens of samples.
"""

from __future__ import annotations

import math

from orbitflow_sglang.planner.cost_model import Profile

CLIP = 2.0
STEP_WEIGHT = 0.1  # of a new sample in the moving average
LINK_WEIGHT = 0.2
PREFILL_WEIGHT = 0.25
PREFILL_FLOORS = 2.0  # a chunk that takes less than so many smallest steps is no sample
PREFILL_TOKENS = 64  # nor is one of fewer tokens, however long it took: a health check has one
ENOUGH_LINK_S = 2e-3  # busy time that makes a sample: shorter ones are mostly timer noise
DRIFT_THRESHOLD = 0.2  # share that a step is off by
DRIFT_STEPS = 8  # in a row and in one direction
BUCKET_TOKENS = 1024  # contexts below are alike to a prefill; above, within powers of two


class Feedback:
    """Costs as of now. One per rank; called once a step, so it only does sums.

    With ``enabled`` False everything stays as the profile has it.
    """

    def __init__(self, profile: Profile, enabled: bool = True) -> None:
        self.profile = profile
        self.enabled = enabled
        self.drifts = 0  # detected so far
        self._scale = _Estimate(1.0, STEP_WEIGHT)
        self._step_scale = _Estimate(1.0, STEP_WEIGHT)  # with what copies and stalls add
        # With setup where the fit found nothing else: a page never comes for free.
        self._page = _Estimate(profile.h2d.per_page_s or profile.h2d.seconds(1), LINK_WEIGHT)
        self._pages, self._busy_s = 0, 0.0  # moved since the last sample of the link
        self._prefill: dict[int, _Estimate] = {}  # seconds a token, by bucket of context
        self._assumed_scale = 1.0
        self._off = 0  # steps in a row that were off: above 0 too slow, below too fast
        self._drifted = False

    # --- what was measured ----------------------------------------------------

    def decode_step(
        self,
        batch: int,
        context_tokens: int,
        seconds: float,
        stall_s: float = 0.0,
        beside_copies: bool = False,
    ) -> None:
        """A decode step took ``seconds``, of which compute waited ``stall_s`` for pages.

        What ran beside copies shares memory with them, so it can only show that compute takes
        less. Were it taken for compute, streaming would seem to hide ever more streaming.
        """
        profiled, measured = self.profile.compute.step_s(batch, context_tokens), seconds - stall_s
        if not (self.enabled and _positive(measured) and profiled > 0):
            return
        ratio = measured / profiled
        self._step_scale.follow(seconds / profiled)
        if beside_copies and ratio >= self._scale.value:
            return
        self._scale.follow(ratio)
        self._watch(ratio / self._assumed_scale)

    def transfers(self, pages: int, busy_s: float) -> None:
        """``pages`` came from the host, which kept the link busy for ``busy_s``.

        Small amounts are added up until they make a sample.
        """
        if not (self.enabled and pages > 0 and _positive(busy_s)):
            return
        self._pages += pages
        self._busy_s += busy_s
        if self._busy_s >= ENOUGH_LINK_S:
            self._page.follow(self._busy_s / self._pages)
            self._pages, self._busy_s = 0, 0.0

    def prefill_chunk(self, tokens: int, seconds: float, context_tokens: int = 0) -> None:
        """A chunk of ``tokens`` behind ``context_tokens`` took ``seconds``, without stall.

        One that took little more than any forward pass does says nothing about its tokens.
        """
        if not (self.enabled and tokens >= PREFILL_TOKENS and _positive(seconds)):
            return
        if seconds < PREFILL_FLOORS * self.compute_s(1, 0):
            return
        bucket = _bucket(context_tokens + tokens // 2)
        if bucket in self._prefill:
            self._prefill[bucket].follow(seconds / tokens)
        else:  # what other contexts take only says what is plausible
            known = _Estimate(self._prefill_token_s(bucket) or 0.0, weight=1.0)
            known.follow(seconds / tokens)
            self._prefill[bucket] = _Estimate(known.value, PREFILL_WEIGHT)

    # --- what is expected -----------------------------------------------------

    @property
    def compute_scale(self) -> float:
        """What a decode step takes as a multiple of the profile's."""
        return self._scale.value

    def compute_s(self, batch: int, context_tokens: int) -> float:
        """Compute time of a decode step, seconds."""
        return self._scale.value * self.profile.compute.step_s(batch, context_tokens)

    def step_s(self, batch: int, context_tokens: int) -> float:
        """What a decode step takes as steps go at present, seconds."""
        return self._step_scale.value * self.profile.compute.step_s(batch, context_tokens)

    @property
    def page_transfer_s(self) -> float:
        """Time on the link of one page of one layer, its share of what transfers cost to start
        included; seconds."""
        return self._page.value

    @property
    def h2d_bytes_per_s(self) -> float | None:
        """Rate of the link from the host; None where the profile knows none."""
        page_s = self._page.value
        return self.profile.page_bytes / page_s if page_s > 0 else None

    def prefill_s(self, tokens: int, context_tokens: int = 0) -> float:
        """Time to prefill ``tokens`` behind ``context_tokens`` in one chunk, seconds.

        By what chunks at the most similar context took. Where nothing is known, what decoding
        the tokens one by one would take, which is more.
        """
        token_s = self._prefill_token_s(_bucket(context_tokens + tokens // 2))
        if token_s is None:
            token_s = self.compute_s(1, context_tokens + tokens // 2)
        return tokens * token_s

    # --- drift ----------------------------------------------------------------

    def planned(self) -> None:
        """A plan was made with the present estimates: drift is what is off from these."""
        self._assumed_scale = self._scale.value
        self._off = 0
        self._drifted = False

    def take_drift(self) -> bool:
        """Whether steps have come to differ from what the last plan assumed; True once.

        They do where ``DRIFT_STEPS`` in a row were off by more than ``DRIFT_THRESHOLD`` in the
        same direction. From then on, drift is what is off from the estimates of that moment.
        """
        drifted, self._drifted = self._drifted, False
        return drifted

    def _watch(self, off: float) -> None:
        """Note one step that took ``off`` times what was assumed."""
        direction = (off > 1 + DRIFT_THRESHOLD) - (off < 1 - DRIFT_THRESHOLD)
        self._off = self._off + direction if self._off * direction > 0 else direction
        if abs(self._off) == DRIFT_STEPS:
            self.planned()
            self._drifted = True
            self.drifts += 1

    def _prefill_token_s(self, bucket: int) -> float | None:
        if self._prefill:
            known = self._prefill.get(bucket)
            if known is None:
                nearest = min(self._prefill, key=lambda other: (abs(other - bucket), -other))
                known = self._prefill[nearest]
            return known.value
        rate = self.profile.prefill_tokens_per_s
        return 1 / rate if rate else None


class _Estimate:
    """A positive number that follows samples; 0 until the first one where nothing is known."""

    def __init__(self, value: float, weight: float) -> None:
        self.value = value
        self._weight = weight

    def follow(self, sample: float) -> None:
        if self.value <= 0:
            self.value = sample
            return
        off = min(CLIP, max(1 / CLIP, sample / self.value))
        self.value *= off**self._weight


def _bucket(context_tokens: int) -> int:
    return (context_tokens // BUCKET_TOKENS).bit_length()


def _positive(seconds: float) -> bool:
    return seconds > 0 and math.isfinite(seconds)
