"""Compute of a device that is not there: each layer takes the time that it is said to take.

For comparing policies on a machine whose speed varies, and where Python is not hidden behind the
compute of a GPU: as with the emulated link, what is to be compared then decides, and not the
machine. ``$ORBITFLOW_EMULATED_COMPUTE`` holds four numbers, milliseconds of one layer: of any
step, for each request that decodes, for each thousand tokens of their context, for each thousand
tokens of a prompt. Where real compute takes longer, the step's other layers make up for it; what
is left is counted, for a machine that is too slow for the device decides after all.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from orbitflow_sglang.engine.runtime import StepInput

VARIABLE = "ORBITFLOW_EMULATED_COMPUTE"
SPIN_S = 2e-4  # the end of a wait, which a sleep would overshoot


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of one layer."""

    constant_s: float
    per_request_s: float
    per_token_s: float
    per_prompt_token_s: float

    @staticmethod
    def from_env() -> LayerCosts | None:
        """Raises ``ValueError`` for anything but four numbers of at least 0."""
        text = os.environ.get(VARIABLE)
        if not text:
            return None
        numbers = [float(part) for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 0:
            raise ValueError(f"{VARIABLE}={text}: give four numbers of at least 0")
        constant, request, thousand, prompt = (number * 1e-3 for number in numbers)
        return LayerCosts(constant, request, thousand * 1e-3, prompt * 1e-3)

    def of(self, step: StepInput) -> float:
        """Seconds of a layer of ``step``."""
        if step.prefix_lens is not None:
            context = sum(step.prefix_lens)
            new = sum(step.seq_lens) - context
            return self.constant_s + new * self.per_prompt_token_s + context * self.per_token_s
        decode = len(step.seq_lens) * self.per_request_s + sum(step.seq_lens) * self.per_token_s
        return self.constant_s + decode


class EmulatedCompute:
    """Holds each layer of a step until its time is over, what it waited for pages not counted."""

    def __init__(self, costs: LayerCosts) -> None:
        self._costs = costs
        self.compute_s = 0.0  # of all layers so far, as they are said to take
        self._overrun_s = 0.0
        self._layer_s = 0.0
        self._end_s = 0.0  # of the layer before, on the device
        self._late_s = 0.0  # by which real compute ended behind it
        self._stall_s = 0.0  # until then

    @property
    def overrun_s(self) -> float:
        """By which steps so far took longer than their layers are said to."""
        return self._overrun_s + self._late_s

    def forget(self) -> None:
        """What was counted so far was not for any request."""
        self.compute_s = self._overrun_s = self._late_s = 0.0

    def begin(self, step: StepInput, stall_s: float) -> None:
        """``stall_s``: what compute has waited for pages since start, here as below."""
        self._overrun_s += self._late_s
        self._layer_s, self._late_s = self._costs.of(step), 0.0
        self._end_s = time.perf_counter()
        self._stall_s = stall_s

    def end_layer(self, stall_s: float) -> None:
        """Return when the layer that has been computed would have been by the device."""
        if stall_s > self._stall_s:  # until the pages came, which no device would have made up
            self._end_s += self._late_s
        self._end_s += self._layer_s + stall_s - self._stall_s
        self._stall_s = stall_s
        self.compute_s += self._layer_s
        if (left := self._end_s - time.perf_counter() - SPIN_S) > 0:
            time.sleep(left)
        while (now := time.perf_counter()) < self._end_s:
            pass
        self._late_s = now - self._end_s
