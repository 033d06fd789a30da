"""What the controller sees and what it says. One page is a page of one layer throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orbitflow_sglang.control.deposit import TokenTimes
from orbitflow_sglang.planner.problem import IntArray
from orbitflow_sglang.slo import SLO

Phase = Literal["waiting", "prefill", "decode", "paused"]


@dataclass(slots=True, eq=False)
class RequestView:
    """One request, kept up to date by the engine. Times are of one monotonic clock, seconds."""

    rid: str
    arrival_s: float
    slo: SLO
    prompt_tokens: int  # to prefill before the next token; after a retraction outputs too
    max_new_tokens: int
    pausable: bool = True
    phase: Phase = "waiting"
    tokens: int = 0  # with KV
    cached_tokens: int = 0  # of the prompt, that were or will be found in the radix cache
    shared_tokens: int = 0  # waiting: those of them that requests in memory use
    times: TokenTimes = field(init=False)  # of tokens as they left the scheduler
    paused_s: float | None = None  # since when
    settled: bool = True  # paused: its last step is over, so that it may come back
    missing_pages: int = 0  # paused: to fetch before it decodes; all it has until it comes back
    pauses: int = 0

    def __post_init__(self) -> None:
        self.times = TokenTimes(self.arrival_s, self.slo)

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return self.times.tokens

    @property
    def first_token_s(self) -> float | None:
        """When token 1 left the scheduler."""
        return self.times.first_s

    @property
    def last_token_s(self) -> float | None:
        """When the last token left the scheduler."""
        return None if self.times.first_s is None else self.times.last_s

    def deposit_s(self, now: float) -> float:
        """How long the client can be served from what was generated; negative: behind."""
        pace, first = self.slo.pace_s, self.times.first_s
        if pace is None or first is None:
            return 0.0
        return self.slo.deposit_tokens(self.times.tokens, now - first) * pace


@dataclass(frozen=True)
class UnitView:
    """Closed pages that are placed together: a request's own (``id`` is its rid), or a prefix
    that several use."""

    id: str
    pages: int  # in one layer
    users: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What the engine is made of; the same for the life of the server."""

    layers: int
    page_size: int
    main_pages: int  # of the arena, without the ring
    ring_pages: int
    host_pages: int
    max_running: int  # requests that decode together
    max_paused: int
    max_chunk_tokens: int


@dataclass(slots=True)
class Observation:
    """The engine as a step is about to be chosen."""

    now: float
    requests: Sequence[RequestView]
    units: Callable[[], Sequence[UnitView]]  # of all live requests; asked when memory is short


@dataclass(frozen=True)
class StepDecision:
    """What the engine does before and in its next step. The default: what it would anyway."""

    pause: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    order: tuple[str, ...] | None = None  # of the waiting queue; None: as it is
    admit: frozenset[str] | None = None  # who of them may start; None: whoever SGLang lets
    prefill: bool = True  # False: a decode step, although prompts wait
    chunk_tokens: int | None = None  # most prompt tokens of the step; None: SGLang's
    # Pages on the host per layer, counted from the unit's front; units not named are wholly
    # on the device. None: as before.
    placement: Mapping[str, IntArray] | None = None
    move_pages: int = 0  # that the placement may move to the host in a step
    fetch: tuple[str, ...] = ()  # coming back: their pages are fetched while they wait
    fetch_pages: int = 0
    mirror: tuple[str, ...] = ()  # to be copied to the host ahead of a pause
    mirror_pages: int = 0
    reasons: tuple[str, ...] = field(default=(), compare=False)


NOTHING = StepDecision()
