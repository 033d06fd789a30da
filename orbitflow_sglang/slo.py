"""What a request was promised, and when each of its tokens is due.

Targets come from the server's flags or from a request's ``custom_params``:

    {"orbitflow": {"ttft_slo_ms": 800, "tpot_slo_ms": 50, "tbt_slo_ms": 200, "deposit": true}}

Token k (from 1) of a request is due at t1 + (k - 1) p, where t1 is the time of token 1 and
p the smaller of the TPOT and TBT targets. The deposit is what it is ahead of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

REQUEST_KEY = "orbitflow"  # in custom_params
LEAST_MS, MOST_MS = 1e-3, 1e9  # of a target: beyond, sums overflow
TARGETS = ("ttft_slo_ms", "tpot_slo_ms", "tbt_slo_ms")
PACE = 0.95  # share of p at which paced tokens leave: a little early, so that none is late
STRICT_GAP_S = 1.0  # a longer gap between two tokens is a stall to whoever reads along


class SLOError(ValueError):
    """A request's OrbitFlow parameters cannot be honoured; the message names the field."""


@dataclass(frozen=True)
class SLO:
    """Targets in seconds; None: none. ``deposit``: tokens are delivered paced."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    tbt_s: float | None = None
    deposit: bool = False

    @cached_property  # asked for several times a step
    def pace_s(self) -> float | None:
        """Seconds between two due tokens: the smaller of the TPOT and TBT targets."""
        given = [target for target in (self.tpot_s, self.tbt_s) if target is not None]
        return min(given, default=None)

    def due_tokens(self, since_first_s: float) -> float:
        """Tokens due that long after token 1, which is one of them; 0 without a pace."""
        pace = self.pace_s
        return 0.0 if pace is None else 1 + max(0.0, since_first_s) / pace

    def deposit_tokens(self, generated: int, since_first_s: float) -> float:
        """Generated minus due; negative: behind. 0 without a pace or before token 1."""
        if self.pace_s is None or not generated:
            return 0.0
        return generated - self.due_tokens(since_first_s)

    def release_s(self, token: int) -> float:
        """When paced token ``token`` (from 1) may leave, in seconds after token 1."""
        pace = self.pace_s
        return 0.0 if pace is None else (token - 1) * PACE * pace


def request_slo(custom_params: object, default: SLO) -> SLO:
    """The targets of one request: its own where it gives them, else ``default``'s.

    Raises ``SLOError`` for anything but a flat object of known keys and sound values.
    """
    if not isinstance(custom_params, Mapping) or REQUEST_KEY not in custom_params:
        return default
    given = custom_params[REQUEST_KEY]
    if not isinstance(given, Mapping):
        raise SLOError(f"custom_params.{REQUEST_KEY} must be an object, got {given!r}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        where = f"custom_params.{REQUEST_KEY}.{key}"
        if key == "deposit":
            if not isinstance(value, bool):
                raise SLOError(f"{where} must be true or false, got {value!r}")
            values[key] = value
        elif key in TARGETS:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not LEAST_MS <= value <= MOST_MS:
                raise SLOError(
                    f"{where} must be a number of milliseconds from {LEAST_MS:g} to {MOST_MS:g}, "
                    f"got {value!r}"
                )
            values[key.removesuffix("slo_ms") + "s"] = value / 1e3
        else:
            raise SLOError(f"{where}: no such key; there are {', '.join(TARGETS)} and deposit")
    return replace(default, **values)
