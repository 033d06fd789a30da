"""Remote control for tests, through SGLang's ``/set_internal_state``.

Only there when the environment variable ``ORBITFLOW_TEST_CONTROL`` holds a
comma-separated list of policies. ``{"orbitflow_policy": i}`` places by the i-th of
them from the next step on; ``{"orbitflow_corrupt": n}`` overwrites the host copies of
the next n steps' first offloaded page, which must turn an identity test red.
``{"orbitflow_pause": n}`` has every request paused n times, at places drawn from its id.
``{"orbitflow_hold": 1}`` pauses whoever decodes, ids that begin with ``NOT_HELD`` left
out, until it is 0. ``{"orbitflow_starve": 1}`` has prompts go on only when there are slots for less
than a chunk, of 64 tokens, until it is 0. ``{"orbitflow_fault": i}``: see ``engine.test_faults``.
``{"orbitflow_tables": 1}`` is refused unless all ranks of a group have their pages in the
same places, and have had so at every step since the first such command. ``{"orbitflow_slow": n}``
holds the copies of a group's ranks but the first to n MB/s.
"""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from sglang.srt.managers.scheduler_components.internal_state import (
    UpdateRejected,
    _UpdateHandler,
)

from orbitflow_sglang.control.view import Observation, StepDecision
from orbitflow_sglang.engine import ranks
from orbitflow_sglang.engine.hooks import TEST_CONTROL_ENV
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.engine.scheduler import runtime_of
from orbitflow_sglang.engine.test_faults import FAULTS
from orbitflow_sglang.planner.policies import make_policy
from orbitflow_sglang.residency.page_table import PageState
from orbitflow_sglang.residency.transfer import direction

NOT_HELD = "free"  # as an id begins


def update_handlers(handlers: dict[str, Any], controller: Any) -> dict[str, Any]:
    """After ``_update_handlers``: adds our commands."""
    runtime = runtime_of(controller.scheduler)
    names = os.environ[TEST_CONTROL_ENV].split(",")

    def validate(key: str, value: Any) -> None:
        known = {"orbitflow_policy": names, "orbitflow_fault": list(FAULTS)}.get(key)
        if known is not None and not 0 <= int(value) < len(known):
            raise UpdateRejected(f"{key} must index {known}")
        if key == "orbitflow_tables":
            compare_tables()

    def set_policy(key: str, value: Any) -> None:
        runtime.set_policy(make_policy(names[int(value)]))

    def corrupt(key: str, value: Any) -> None:
        runtime.before_step = _Corruption(int(value))

    def pause(key: str, value: Any) -> None:
        runtime.control.force = _ForcedPauses(runtime, int(value)) if int(value) else None

    def hold(key: str, value: Any) -> None:
        runtime.control.force = _hold if int(value) else None

    def starve(key: str, value: Any) -> None:
        runtime.control.force = _Starving(controller.scheduler) if int(value) else None

    def fault(key: str, value: Any) -> None:
        FAULTS[list(FAULTS)[int(value)]](runtime)

    def compare_tables() -> None:
        if not isinstance(runtime.before_step, _History):
            runtime.before_step = _History()
        store = runtime.store
        found = ranks.of_all(
            {
                "tables": fingerprint(runtime),
                "history": runtime.before_step.fingerprint,
                "steps": runtime.counters.steps,
                "free": [store.arena.num_free, store.ring.num_free, store.host.num_free],
                "idle": [runtime.counters.idle_checks, runtime.counters.failed_idle_checks],
            }
        )
        if any(other != found[0] for other in found):
            raise UpdateRejected(f"the pages of the ranks are in different places: {found}")

    def slow(key: str, value: Any) -> None:
        if not ranks.leads():
            engine: Any = runtime.store.engine
            engine.drain()
            engine.close()
            engine._h2d, engine._d2h = (
                direction(name, int(value) * 1e6 or None) for name in ("h2d", "d2h")
            )

    return {
        **handlers,
        "orbitflow_slow": _UpdateHandler(validate, slow),
        "orbitflow_tables": _UpdateHandler(validate, lambda key, value: None),
        "orbitflow_pause": _UpdateHandler(validate, pause),
        "orbitflow_hold": _UpdateHandler(validate, hold),
        "orbitflow_starve": _UpdateHandler(validate, starve),
        "orbitflow_fault": _UpdateHandler(validate, fault),
        "orbitflow_policy": _UpdateHandler(validate, set_policy),
        "orbitflow_corrupt": _UpdateHandler(validate, corrupt),
    }


def fingerprint(runtime: Runtime) -> int:
    """Of where every page is and should be."""
    table, found = runtime.store.table, 0
    for array in (table.state, table.device_page, table.host_page, table.want_host, table.extent):
        found = zlib.crc32(array.tobytes(), found)
    return found


class _History:
    """One number for the tables as they were before every step."""

    def __init__(self) -> None:
        self.fingerprint = 0

    def __call__(self, runtime: Runtime) -> None:
        self.fingerprint = hash((self.fingerprint, fingerprint(runtime)))


class _Corruption:
    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self, runtime: Runtime) -> None:
        store = runtime.store
        layers, pages = np.nonzero(store.table.state == PageState.HOST)
        if self._left and len(layers):
            self._left -= 1
            page = int(store.table.host_page[layers[0], pages[0]])
            store.host.k[page].add_(1)
            store.host.v[page].add_(1)


def _hold(observation: Observation, decision: StepDecision) -> StepDecision:
    """Whoever decodes is paused, and nobody comes back; SGLang admits whom it has slots for."""
    pause = tuple(
        view.rid
        for view in observation.requests
        if view.phase == "decode"
        and view.pausable
        and view.generated > 0
        and not view.rid.startswith(NOT_HELD)
    )
    return replace(
        decision, pause=pause, resume=(), fetch=(), admit=None, prefill=True, chunk_tokens=None
    )


class _Starving:
    """Whoever SGLang has slots for begins; the next small chunk is due when there are too few."""

    CHUNK_TOKENS = 64

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __call__(self, observation: Observation, decision: StepDecision) -> StepDecision:
        pool, tree = self._scheduler.token_to_kv_pool_allocator, self._scheduler.tree_cache
        free = pool.available_size() + tree.evictable_size()
        due = self._scheduler.chunked_req is None or free < self.CHUNK_TOKENS
        return replace(decision, admit=None, prefill=due, chunk_tokens=self.CHUNK_TOKENS)


class _ForcedPauses:
    """Adds pauses to the controller's decisions until each request has had its share.

    Who shares pages, which is remembered between decode steps, is looked at anew every time.
    """

    def __init__(self, runtime: Runtime, times: int) -> None:
        self._control = runtime.control
        self._times = times

    def __call__(self, observation: Observation, decision: StepDecision) -> StepDecision:
        remembered = observation.units()
        self._control._grouped = None
        found = observation.units()
        if {unit.id: unit for unit in remembered} != {unit.id: unit for unit in found}:
            raise RuntimeError(f"units are remembered as {remembered}, but are {found}")
        due = [
            view.rid
            for view in observation.requests
            if view.phase == "decode"
            and view.pausable
            and view.pauses < self._times
            and view.generated > self._place(view.rid, view.pauses)
            and view.rid not in decision.resume
        ]
        if not due:
            return decision
        pause = tuple(dict.fromkeys([*decision.pause, *due]))
        return replace(decision, pause=pause)

    @staticmethod
    def _place(rid: str, pauses: int) -> int:
        return 6 * pauses + random.Random(f"{rid}-{pauses}").randint(1, 5)
