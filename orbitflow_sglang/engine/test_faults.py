"""Faults for tests, injected into a running server by ``engine.test_control``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.planner.worker import COMMAND, PlannerWorker

# Planners that are no good: one line for each that they are asked.
_GARBAGE = """
import sys
for line in sys.stdin:
    print('{"number": [', flush=True)
"""
# Everything on the device, which never fits where a plan is asked for.
_INFEASIBLE = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    problem = asked["problem"]
    units = len(problem["units"])
    print(json.dumps({
        "number": asked["number"], "outcome": "solved", "status": "optimal",
        "offloaded": bytes(4 * units * problem["layers"]).hex(), "paused": [False] * units,
        "step_time_s": 1e-3, "lower_bound_s": 0.0, "never_fits": [], "solve_s": 0.0,
    }), flush=True)
"""


def _planner(runtime: Runtime) -> PlannerWorker:
    worker = runtime.control.controller.planning.worker
    assert isinstance(worker, PlannerWorker)
    return worker


def _signalled(number: signal.Signals) -> Callable[[Runtime], None]:
    def send(runtime: Runtime) -> None:
        worker = _planner(runtime)
        worker._timeout_s = 0.5
        if worker._process is not None:
            os.kill(worker._process.pid, number)

    return send


def _replaced(*command: str) -> Callable[[Runtime], None]:
    def replace(runtime: Runtime) -> None:
        worker = _planner(runtime)
        worker._command = list(command)
        worker._stop()
        worker._asked = None
        worker._start()

    return replace


def _fails() -> None:
    raise OSError("injected by a test")


def _failing_fetch(runtime: Runtime) -> None:
    engine: Any = runtime.store.engine

    def fetch(host_pages: np.ndarray, device_pages: np.ndarray) -> Any:
        del engine.fetch  # the next one works
        return engine._h2d.submit(_fails, 0)

    engine.fetch = fetch


def _failing_write(runtime: Runtime) -> None:
    engine: Any = runtime.store.engine

    def write(*args: Any) -> Any:
        del engine.write_back, engine.write_through
        return engine._d2h.submit(_fails, 0)

    engine.write_back = engine.write_through = write


def _full_host(runtime: Runtime) -> None:
    host: Any = runtime.store.host
    host.take = lambda count, hint=-1: np.empty(0, np.int32)


def _whole_host(runtime: Runtime) -> None:
    vars(runtime.store.host).pop("take", None)


FAULTS: dict[str, Callable[[Runtime], None]] = {
    "planner killed": _signalled(signal.SIGKILL),
    "planner hung": _signalled(signal.SIGSTOP),
    "planner talks garbage": _replaced(sys.executable, "-c", _GARBAGE),
    "planner plans the impossible": _replaced(sys.executable, "-c", _INFEASIBLE),
    "planner": _replaced(*COMMAND),  # as it was
    "fetch": _failing_fetch,
    "write": _failing_write,
    "host full": _full_host,
    "host": _whole_host,
}
