"""One request in the simulator: what it is to say, and where its pages are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from orbitflow_sglang.control.view import RequestView
from orbitflow_sglang.planner.problem import IntArray


@dataclass(slots=True, eq=False)
class Job:
    """``view`` is what the controller sees; the rest is the machine's.

    Closed pages of layer l are on the host up to ``host[l]``, counted from the front; with
    ``host`` None all are on the device. A paused request is on the host as a whole, but for
    what has been fetched already.
    """

    view: RequestView
    output_tokens: int
    order: int  # of arrival
    asked_tokens: int  # of the prompt; the view's grow by what is computed again
    layers: int
    page_size: int
    host: IntArray | None = None
    goal: IntArray | None = None  # ``host`` as it is to be, if the request lives to see it
    on_host: int = 0  # sum of ``host``; paused: pages still to fetch
    copied: int = 0  # pages on the device of which the host has a valid copy
    token_s: list[float] = field(default_factory=list)  # when each left the scheduler
    step_s: list[float] = field(default_factory=list)  # of the steps that made them, waits left out
    recomputed: int = 0  # tokens to compute again because their KV was thrown away
    computed: int = 0  # prompt tokens computed, those again included

    @property
    def rid(self) -> str:
        return self.view.rid

    @property
    def closed(self) -> int:
        """Full pages in one layer."""
        return self.view.tokens // self.page_size

    @property
    def closed_pages(self) -> int:
        """Full pages of all layers."""
        return self.closed * self.layers

    @property
    def resident(self) -> int:
        """Full pages of all layers on the device."""
        return self.closed_pages - self.on_host

    def put(self, host: IntArray | None) -> None:
        """Where its pages are from now on."""
        self.on_host = 0 if host is None else int(host.sum())
        self.host = host if self.on_host else None
        self.copied = min(self.copied, self.resident)

    def spread(self, pages: int) -> IntArray:
        """So many pages on the host, spread over its layers."""
        base, more = divmod(min(pages, self.closed_pages), self.layers)
        host = np.full(self.layers, base, dtype=np.int64)
        if more:  # the later ones: the link has longer to bring them
            host[-more:] += 1
        return host

    def drop(self) -> None:
        """It waits again, its output so far part of the prompt; its KV has been given up."""
        view = self.view
        view.prompt_tokens = self.asked_tokens + view.generated
        self.recomputed += view.prompt_tokens
        view.phase, view.tokens, view.paused_s = "waiting", 0, None
        view.settled, view.missing_pages = True, 0
