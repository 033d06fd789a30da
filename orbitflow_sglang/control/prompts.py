"""Prefill: how large the next chunk may be and when it comes, and which prompts will be late."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.policies import PolicySpec
from orbitflow_sglang.control.rules import Chunk, Prompt
from orbitflow_sglang.control.scene import Scene, lost
from orbitflow_sglang.control.view import Machine, RequestView
from orbitflow_sglang.slo import STRICT_GAP_S


class PrefillCosts(Protocol):
    """What prompts take; part of ``controller.Costs``."""

    def compute_s(self, batch: int, context_tokens: int) -> float:
        """A decode step with everything resident, seconds."""

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        """Prefill of so many tokens behind so many others, seconds."""


class Prompts:
    """What the controller decides about prompts, step by step."""

    def __init__(self, spec: PolicySpec, machine: Machine, costs: PrefillCosts) -> None:
        self._spec = spec
        self._machine = machine
        self._costs = costs
        self._since_chunk = rules.MAX_STEPS_BETWEEN_CHUNKS

    def stepped(self, prefill: bool) -> None:
        """A step begins: with prompt tokens, or only decoding."""
        self._since_chunk = 0 if prefill else self._since_chunk + 1

    def slack_s(self, view: RequestView, scene: Scene) -> float:
        """Until its first token can no longer be in time; infinite without a deadline."""
        if view.slo.ttft_s is None or view.first_token_s is not None:
            return math.inf
        return view.arrival_s + view.slo.ttft_s - scene.now - self.left_s(view)

    def left_s(self, view: RequestView) -> float:
        """What is left of its prefill, seconds."""
        there = max(view.tokens, view.cached_tokens)
        return self._costs.prefill_s(max(0, view.prompt_tokens - there), there)

    def late_in_line(self, scene: Scene) -> set[str]:
        """Who waits, is not late yet, and will be behind others' prompts.

        Only where prompts hold each other up more than memory does: else the line moves as
        memory comes free, and nobody's place in it says when.
        """
        if not self._spec.has("ordering") or scene.mu >= rules.PROMPTS_MU:
            return set()
        line = []
        for view in scene.waiting:
            if view.slo.ttft_s is None or view.first_token_s is not None:
                continue
            takes, due = self.left_s(view), view.arrival_s + view.slo.ttft_s - scene.now
            if takes <= due:
                line.append(Prompt(view.rid, due, takes))
        busy = sum(map(self.left_s, scene.prefilling))
        return rules.late_in_line(line, rules.PREFILL_SLOWDOWN * busy)

    def chunk(self, scene: Scene, granted: Collection[str]) -> tuple[int | None, bool]:
        """Most tokens of the next prefill step, and whether it may come now."""
        if not self._spec.has("chunking") or not (scene.waiting or scene.prefilling):
            return None, True
        if not scene.decoding:
            return None, True
        started = [*scene.prefilling, *(v for v in scene.waiting if v.rid in granted)]
        token_s = self._token_s(started)
        if scene.mu < rules.PROMPTS_MU and all(self.slack_s(v, scene) < 0 for v in started):
            chunk = self._for_the_late(scene, token_s)
        else:
            chunk = self._for_the_punctual(scene, token_s)
        return chunk.tokens, self._since_chunk >= chunk.every

    def _token_s(self, started: Sequence[RequestView]) -> float:
        """Of a prompt token, behind the longest context that one is computed behind."""
        tokens = self._machine.max_chunk_tokens
        there = max((max(view.tokens, view.cached_tokens) for view in started), default=0)
        return self._costs.prefill_s(tokens, there) / tokens

    def _for_the_punctual(self, scene: Scene, token_s: float) -> Chunk:
        machine = self._machine
        gaps = [self._gap_s(view, scene) for view in scene.decoding]
        # What a small chunk wastes costs a mean more than its time, but a gap (TBT) only its time.
        strict_gaps = any(view.slo.tbt_s is not None for view in scene.decoding)
        least = self._least_chunk(token_s, 0.0 if strict_gaps else self._floor_s)
        late = sum(gap < least * token_s + scene.step_s for gap in gaps)
        return rules.chunk(
            min(gaps), scene.step_s, token_s, machine.page_size, least, machine.max_chunk_tokens,
            late, len(scene.waiting) + len(scene.prefilling),
        )  # fmt: skip

    def _for_the_late(self, scene: Scene, token_s: float) -> Chunk:
        machine = self._machine
        spare, gap = math.inf, math.inf
        for view in scene.decoding:
            pace = view.slo.pace_s
            if pace is None or view.last_token_s is None or lost(view, scene):
                continue
            ahead = view.deposit_s(scene.now)
            spare = min(spare, pace - scene.step_s + ahead / rules.RECOVERY_TOKENS)
            gap = min(gap, self._longest_s(view, scene) - scene.step_s)
        return rules.sustained_chunk(
            spare, gap, self._floor_s, token_s, machine.page_size,
            self._least_chunk(token_s, self._floor_s), machine.max_chunk_tokens,
        )  # fmt: skip

    @property
    def _floor_s(self) -> float:
        return self._costs.compute_s(1, 0)

    def _least_chunk(self, token_s: float, floor_s: float) -> int:
        machine = self._machine
        return rules.least_chunk(floor_s, token_s, machine.page_size, machine.max_chunk_tokens)

    def _gap_s(self, view: RequestView, scene: Scene) -> float:
        """Time that a chunk may take from ``view``; infinite where it has no target to lose.

        A mean (TPOT) can be made up for by the tokens to come, a gap (TBT) cannot.
        """
        pace = view.slo.pace_s
        if pace is None or view.last_token_s is None or lost(view, scene):
            return math.inf
        left = min(rules.RECOVERY_TOKENS, max(0, view.max_new_tokens - view.generated))
        due = view.deposit_s(scene.now) + pace + left * max(0.0, pace - scene.step_s)
        return min(due, self._longest_s(view, scene))

    def _longest_s(self, view: RequestView, scene: Scene) -> float:
        """Until the client of ``view`` would meet a gap that is too long."""
        assert view.last_token_s is not None
        if view.slo.deposit and self._spec.has("deposit"):
            if view.slo.tbt_s is None:
                return math.inf
            return view.deposit_s(scene.now) + (view.slo.pace_s or 0.0)
        longest = STRICT_GAP_S if view.slo.tbt_s is None else view.slo.tbt_s
        return view.last_token_s + longest - scene.now
