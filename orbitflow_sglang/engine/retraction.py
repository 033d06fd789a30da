"""Hooks around SGLang's retraction: what happens when every logical token is in use."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler

from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.engine.scheduler import control_of

logger = logging.getLogger(__name__)


def make_room(scheduler: Scheduler, batch: ScheduleBatch) -> None:
    """Before ``update_running_batch``, which retracts when the next step finds no slots, unless
    somebody who is about to finish leaves some."""
    control = control_of(scheduler)
    if control is not None and control.paused and not scheduler._reqs_finishing_inflight(batch):
        control.make_room(batch)


def retract_decode(found: Any, batch: ScheduleBatch) -> Any:
    """After ``retract_decode``: counted, and explained."""
    runtime = Runtime.current
    retracted, _, ended = found
    if runtime is not None and runtime.control is not None:
        runtime.control.retracted([req.rid for req in (*retracted, *ended)])
    return found
