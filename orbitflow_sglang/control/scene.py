"""One step as the controller looks at it, and what its requests take of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from orbitflow_sglang.control.rules import GROWTH_STEPS, RECOVERY_TOKENS
from orbitflow_sglang.control.view import Machine, Observation, RequestView, UnitView


@dataclass
class Scene:
    """One step's requests by what they do, and what memory is worth. Times in seconds."""

    now: float
    decoding: list[RequestView] = field(default_factory=list)
    prefilling: list[RequestView] = field(default_factory=list)
    paused: list[RequestView] = field(default_factory=list)
    waiting: list[RequestView] = field(default_factory=list)
    compute_s: float = 0.0  # of a decode step with everything resident
    step_s: float = 0.0  # of one as they go at present
    hidden_pages: float = 0.0
    budget_pages: int = 0
    room: float = 0.0  # pages that may be in use together, tails included
    used: int = 0  # by those decoding, prefilling or coming back
    read: int = 0  # by a step of these: what several share once for each
    pace_s: float = math.inf  # the strictest that can be kept
    mu: float = math.inf
    output: float = math.inf  # tokens of an answer, by those that ended and those that decode
    most: float = math.inf  # requests decoding, beyond which prompts cost them their pace
    sustained: float = math.inf  # the same in pages, by the mean of those that ended
    shared: Sequence[UnitView] = ()  # what several use, as last looked at
    reasons: list[str] = field(default_factory=list)

    @staticmethod
    def of(obs: Observation) -> Scene:
        """The requests of ``obs`` sorted by phase."""
        scene = Scene(obs.now)
        lists = {
            "decode": scene.decoding,
            "prefill": scene.prefilling,
            "paused": scene.paused,
            "waiting": scene.waiting,
        }
        for view in obs.requests:
            lists[view.phase].append(view)
        return scene


def lost(view: RequestView, scene: Scene) -> bool:
    """Whether the request misses its SLO whatever is done: its first token is too late, or the
    TPOT target is missed even if every token to come is computed at once."""
    ttft_s, first_s = view.slo.ttft_s, view.first_token_s
    waited_s = (scene.now if first_s is None else first_s) - view.arrival_s
    if ttft_s is not None and waited_s > ttft_s:
        return True
    if first_s is None or (deposit := view.deposit_s(scene.now)) >= 0:
        return False
    # Who sets no limit has one as long as the context: what others say is then the better guess.
    left = min(view.max_new_tokens, max(scene.output, view.generated + RECOVERY_TOKENS))
    left = max(0.0, left - view.generated)
    return deposit + left * max(0.0, (view.slo.pace_s or 0.0) - scene.step_s) < 0


def pages_ahead(view: RequestView, machine: Machine) -> int:
    """Pages of a request a few steps ahead, tails included."""
    tokens = view.tokens
    if view.phase in ("prefill", "waiting") and view.prompt_tokens > tokens:
        tokens = view.prompt_tokens
    return ((tokens + GROWTH_STEPS) // machine.page_size + 1) * machine.layers


def pages_used(scene: Scene, views: Sequence[RequestView], machine: Machine) -> int:
    """The same of several, what they share counted once as far as that was looked at."""
    total = sum(pages_ahead(view, machine) for view in views)
    if scene.shared:
        rids = {view.rid for view in views}
        for unit in scene.shared:
            users = sum(user in rids for user in unit.users)
            total -= max(0, users - 1) * unit.pages * machine.layers
    return total
