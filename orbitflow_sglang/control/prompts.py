"""Prefill: how large the next chunk may be and when it comes, and which prompts will be late."""

from __future__ import annotations

import math
from collections.abc import Collection
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
        if scene.mu < rules.PROMPTS_MU and not self._some_on_time(scene, granted):
            chunk = self._for_the_late(scene)
        else:
            chunk = self._for_the_punctual(scene)
        return chunk.tokens, self._since_chunk >= chunk.every

    def _some_on_time(self, scene: Scene, granted: Collection[str]) -> bool:
        """Whether a prompt that is computed, or may be, can still be in time."""
        started = [view for view in scene.waiting if view.rid in granted]
        return any(self.slack_s(view, scene) >= 0 for view in [*scene.prefilling, *started])

    def _for_the_punctual(self, scene: Scene) -> Chunk:
        machine = self._machine
        gaps = [self._gap_s(view, scene) for view in scene.decoding]
        token_s = self._token_s
        least_s = max(machine.page_size, rules.MIN_CHUNK_TOKENS) * token_s
        late = sum(gap < least_s + scene.step_s for gap in gaps)
        return rules.chunk(
            min(gaps), scene.step_s, token_s, machine.page_size, machine.max_chunk_tokens, late,
            len(scene.waiting) + len(scene.prefilling),
        )  # fmt: skip

    def _for_the_late(self, scene: Scene) -> Chunk:
        machine = self._machine
        spare, gap = math.inf, math.inf
        for view in scene.decoding:
            pace = view.slo.pace_s
            if pace is None or view.last_token_s is None or lost(view, scene):
                continue
            ahead = view.deposit_s(scene.now)
            spare = min(spare, pace - scene.step_s + ahead / rules.RECOVERY_TOKENS)
            gap = min(gap, self._longest_s(view, scene) - scene.step_s)
        floor = self._costs.compute_s(1, 0)
        return rules.sustained_chunk(
            spare, gap, floor, self._token_s, machine.page_size, machine.max_chunk_tokens
        )

    @property
    def _token_s(self) -> float:
        tokens = self._machine.max_chunk_tokens
        return self._costs.prefill_s(tokens, 0) / tokens

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
