"""What happens when every logical token is in use: who gives up KV, counted and explained.

Paused requests do before any that decodes has to. Then SGLang retracts all but one of those that
decode; before it would end that one, the prompt that is computed chunk by chunk gives way.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler

from orbitflow_sglang.config import flag
from orbitflow_sglang.engine import pausing
from orbitflow_sglang.engine.control import SchedulerControl
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.residency.layout import most_logical_pages

logger = logging.getLogger(__name__)


def make_room(scheduler: Scheduler, batch: ScheduleBatch) -> None:
    """Before ``update_running_batch``, which retracts when the next step finds no slots, unless
    somebody who is about to finish leaves some."""
    control = _control()
    if control is None or not (control.paused or scheduler.chunked_req):
        return
    if scheduler._reqs_finishing_inflight(batch):
        return
    while not batch.check_decode_mem():
        if control.paused:
            retracted([control.retract_paused()])
        elif len(batch.reqs) == 1 and (prompt := scheduler.chunked_req) is not None:
            pausing.retract_prompt(scheduler)
            retracted([prompt.rid])
        else:
            return


def make_room_for_prompt(scheduler: Scheduler, control: SchedulerControl) -> None:
    """Before a prefill while nobody decodes, so that no slot comes free by itself: the next chunk
    has to find some."""
    if scheduler.chunked_req is None:
        return
    pool, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    while control.paused and not pool.available_size() + tree.evictable_size():
        retracted([control.retract_paused()])


def retract_decode(found: Any, batch: ScheduleBatch) -> Any:
    """After ``retract_decode``: counted, and explained."""
    if _control() is not None:
        retracted_reqs, _, ended = found
        retracted([req.rid for req in (*retracted_reqs, *ended)])
    return found


def retracted(rids: list[str]) -> None:
    """Requests had to give up their KV."""
    runtime, control = Runtime.current, _control()
    assert runtime is not None and control is not None
    control.counts["retractions"] += len(rids)
    capacity, layout = runtime.store.capacity, runtime.store.layout
    most = most_logical_pages(capacity.main_pages, capacity.host_pages, layout.layers)
    if capacity.logical_pages < most:
        cure = "--max-total-tokens"
    else:
        cure = flag("host_memory_gb" if capacity.host_pages else "arena_tokens")
    logger.warning(
        "OrbitFlow: all %d tokens of arena and host store are in use, so %s must be computed "
        "again; a larger %s avoids that",
        capacity.logical_pages * layout.page_size, ", ".join(rids), cure,
    )  # fmt: skip


def _control() -> SchedulerControl | None:
    runtime = Runtime.current
    control: SchedulerControl | None = None if runtime is None else runtime.control
    return control
