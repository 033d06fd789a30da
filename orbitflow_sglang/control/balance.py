"""Decoding against prefill, by the requests that have ended, and how many keep their pace."""

from __future__ import annotations

import math
from collections.abc import Iterable

from orbitflow_sglang.control import rules
from orbitflow_sglang.control.prompts import PrefillCosts
from orbitflow_sglang.control.scene import Scene, lost
from orbitflow_sglang.control.view import Machine, RequestView

AVERAGE_SHARE = 0.1  # of a finished request in the averages


class Balance:
    """Averages over the requests that have ended; nothing is known before the first."""

    def __init__(self, machine: Machine, costs: PrefillCosts) -> None:
        self._machine = machine
        self._costs = costs
        self._ended = 0
        self._prompt, self._cached, self._output = 0.0, 0.0, 0.0  # tokens

    def ended(self, view: RequestView) -> None:
        """Count a request, unless it was given up before its first token or wanted none, as
        those do that only fill a cache (SGLang's for n > 1)."""
        if not view.generated or not view.max_new_tokens:
            return
        self._ended += 1
        share = max(AVERAGE_SHARE, 1 / self._ended)
        self._prompt += share * (view.prompt_tokens - self._prompt)
        self._cached += share * (view.cached_tokens - self._cached)
        self._output += share * (view.generated - self._output)

    def weigh(self, scene: Scene, admission: bool) -> None:
        """The strictest pace to keep; mu = decode seconds / prefill seconds at the memory limit;
        and with ``admission`` how many, in requests and in pages, keep that pace beside the
        prompts of those that take their places."""
        if self._ended:
            # Who ended may have said less than those that decode have said by now.
            said = sum(view.generated for view in scene.decoding) / max(1, len(scene.decoding))
            scene.output = max(1.0, self._output, said)
        held = self._prompt + self._output / 2
        alone = self._costs.compute_s(1, round(held))
        served = [*scene.decoding, *scene.prefilling, *scene.waiting]
        scene.pace_s = _strictest((view for view in served if not lost(view, scene)), alone)
        if not self._ended:
            return
        size, layers = self._machine.page_size, self._machine.layers
        together = max(1.0, self._machine.main_pages / layers * size / held)
        step = self._costs.compute_s(round(together), round(together * held))
        prefill = self._costs.prefill_s(round(self._prompt - self._cached), round(self._cached))
        scene.mu = scene.output * step / max(1e-9, prefill * together)
        if not admission:
            return
        another = (step - alone) / max(1.0, together - 1)
        waiting = len(scene.waiting) + len(scene.prefilling)
        a_token = prefill / scene.output
        scene.most = rules.sustained(scene.pace_s, alone, another, a_token, waiting)
        scene.sustained = scene.most * held / size * layers

    def pages_in_pace(self, scene: Scene) -> float:
        """Pages that a step may stream and leave the strictest pace time for prompts."""
        batch, pages = max(1, len(scene.decoding)), self._machine.main_pages
        full = pages // self._machine.layers * self._machine.page_size
        full_s = self._costs.compute_s(batch, full)
        page_s = (full_s - self._costs.compute_s(batch, 0)) / pages
        return rules.pages_in_pace(scene.pace_s, scene.mu, full_s, page_s)


def _strictest(views: Iterable[RequestView], alone_s: float) -> float:
    """The smallest pace that one decoding alone could keep: for another nobody has to wait."""
    paces = (view.slo.pace_s for view in views)
    return min((pace for pace in paces if pace is not None and pace > alone_s), default=math.inf)
