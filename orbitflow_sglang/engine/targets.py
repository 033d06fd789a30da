"""Targets of requests that bring none: as the flags say, or derived from what the server takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from orbitflow_sglang.slo import SLO

DEFAULT_SLO_SCALE = 2.0
LEAST_TTFT_S = 1.0


@dataclass(frozen=True)
class DefaultTargets:
    """``prefill_s``: of so many tokens on an unloaded server, seconds; None: nothing is derived."""

    given: SLO  # as the flags say; with a pace where that is derived
    scale: float = DEFAULT_SLO_SCALE
    prefill_s: Callable[[int], float] | None = None
    assumed: bool = False  # nobody asked for them

    def of(self, prompt_tokens: int) -> SLO:
        """A request's: its first token may take ``scale`` times its prefill, 1 s at least."""
        if self.prefill_s is None:
            return self.given
        ttft = max(LEAST_TTFT_S, self.scale * self.prefill_s(prompt_tokens))
        return replace(self.given, ttft_s=ttft)
