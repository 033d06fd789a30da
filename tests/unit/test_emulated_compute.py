"""Layers take the time that they are said to take: by a clock of our own."""

from __future__ import annotations

import numpy as np
import pytest

from orbitflow_sglang.engine import emulated_compute
from orbitflow_sglang.engine.emulated_compute import VARIABLE, EmulatedCompute, LayerCosts
from orbitflow_sglang.engine.runtime import StepInput

pytestmark = pytest.mark.unit

COSTS = LayerCosts(0.001, 0.0001, 1e-6, 1e-5)
DECODE = StepInput([1, 2], [100, 200], None, np.empty(0, np.int64))
CHUNK = StepInput([1], [150], [100], np.empty(0, np.int64))


class Clock:
    """Time that passes by sleeping, and a little whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 5.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_costs_are_of_one_layer() -> None:
    assert COSTS.of(DECODE) == pytest.approx(0.001 + 2 * 0.0001 + 300e-6)
    assert COSTS.of(CHUNK) == pytest.approx(0.001 + 50 * 1e-5 + 100e-6)


def test_they_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert LayerCosts.from_env() is None
    monkeypatch.setenv(VARIABLE, "1,0.1,1,10")
    found = LayerCosts.from_env()
    assert found is not None and found.of(DECODE) == pytest.approx(COSTS.of(DECODE))
    for wrong in ("1,2,3", "1,2,3,-4", "a,b,c,d"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(ValueError):
            LayerCosts.from_env()


def test_a_layer_ends_when_the_device_would_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(emulated_compute, "time", clock)
    emulated, layer = EmulatedCompute(COSTS), COSTS.of(DECODE)
    emulated.begin(DECODE, stall_s=2.0)
    begun = clock.now
    clock.now += 0.0003  # what real compute takes
    emulated.end_layer(stall_s=2.0)
    assert clock.now - begun == pytest.approx(layer, abs=1e-5)
    clock.now += 0.004  # waiting for pages, and computing
    emulated.end_layer(stall_s=2.0035)
    assert clock.now - begun == pytest.approx(2 * layer + 0.0035, abs=2e-5)


def test_a_slow_layer_is_made_up_for_within_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(emulated_compute, "time", clock)
    emulated, layer = EmulatedCompute(COSTS), COSTS.of(DECODE)
    for overrun in (0.0, 0.003):
        emulated.begin(DECODE, stall_s=0.0)
        begun = clock.now
        clock.now += 1.5 * layer
        emulated.end_layer(stall_s=0.0)
        assert clock.now - begun == pytest.approx(1.5 * layer, abs=1e-5)
        clock.now += 0.1 * layer + (0.4 * layer + overrun if overrun else 0.0)
        emulated.end_layer(stall_s=0.0)
        assert clock.now - begun == pytest.approx(2 * layer + overrun, abs=2e-5)
    emulated.begin(DECODE, stall_s=0.0)
    assert emulated.compute_s == pytest.approx(4 * layer)
    assert emulated.overrun_s == pytest.approx(0.003, abs=2e-5)


def test_what_was_late_is_not_made_up_for_behind_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(emulated_compute, "time", clock)
    emulated, layer = EmulatedCompute(COSTS), COSTS.of(DECODE)
    emulated.begin(DECODE, stall_s=0.0)
    clock.now += 1.5 * layer
    emulated.end_layer(stall_s=0.0)
    clock.now += 3 * layer  # the pages come
    came = clock.now
    emulated.end_layer(stall_s=3 * layer)
    assert clock.now - came == pytest.approx(layer, abs=2e-5)
    emulated.forget()
    assert (emulated.compute_s, emulated.overrun_s) == (0.0, 0.0)
