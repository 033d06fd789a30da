"""Taking a request out of SGLang's running batch and putting it back as it was.

A paused request keeps its row, its KV slots and its lock on the radix tree. What a batch
knows of it and nothing could rebuild (penalties seen so far, its seed's place, which
logprobs it wants) is kept as a batch of its own, cut out of the running one.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch, release_req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator


@dataclass(eq=False)
class Paused:
    """One request set aside, with its share of the batch."""

    req: Req
    batch: ScheduleBatch


def can_pause(req: Req, scheduler: Any) -> bool:
    """Whether ``req`` comes back to ``scheduler``'s running batch with all its state.

    Under overlap SGLang counts a token for penalties one step late, in the batch that
    runs then; a request that leaves in between would miss it. Of adapters (LoRA), and of the
    model without one, a batch may have so many: SGLang counts those that run when it lets
    others in, so nobody leaves.
    """
    params = req.sampling_params
    penalised = (
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or params.min_new_tokens > 0
    )
    if penalised and scheduler.enable_overlap:
        return False
    return (
        req.beam_group is None
        and not scheduler.enable_lora
        and req.multimodal_inputs is None
        and req.session is None
        and req.input_embeds is None
        and not req.finished()
        and req.to_finish is None
    )


def cut_out(batch: ScheduleBatch, req: Req) -> Paused:
    """Remove ``req`` from the running ``batch``, which keeps the others."""
    index = next(i for i, other in enumerate(batch.reqs) if other is req)
    part = copy.copy(batch)
    part.sampling_info = _copied(batch.sampling_info, part)
    part.filter_batch(keep_indices=[index])
    part.batch_is_full = False
    batch.filter_batch(reqs_to_exclude=[req])
    batch.batch_is_full = False
    return Paused(req, part)


def put_back(running: ScheduleBatch, paused: Paused) -> ScheduleBatch:
    """The running batch with the paused request in it."""
    if running.is_empty():
        return paused.batch
    running.merge_batch(paused.batch)
    return running


def end(scheduler: Any, paused: Paused) -> None:
    """Finish a paused request that was aborted: give back all it holds and tell its client."""
    req = paused.req
    if req.to_finish is None and not req.finished():
        req.to_finish = FINISH_ABORT()
    req.update_finish_state()
    release_kv_cache(req, scheduler.tree_cache, checkpoint=True)
    req.time_stats.set_completion_time()
    scheduler.output_streamer.stream_output([req], req.return_logprob)


def retract(scheduler: Any, paused: Paused) -> None:
    """Give up the KV of a paused request, which waits again and is computed anew: what SGLang
    does with running ones when every logical token is in use."""
    paused.batch.release_req(0, 0)
    scheduler._add_request_to_queue(paused.req, is_retracted=True)


def retract_prompt(scheduler: Any) -> None:
    """The same for the prompt that is computed chunk by chunk."""
    req, scheduler.chunked_req = scheduler.chunked_req, None
    release_req(
        req=req,
        remaing_req_count=0,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
    )
    scheduler._add_request_to_queue(req, is_retracted=True)


def _copied(info: Any, batch: ScheduleBatch) -> Any:
    """Sampling state of its own for ``batch``, equal to ``info``.

    Tensors are shared until one side is filtered, which makes new ones.
    """
    twin = copy.copy(info)
    orchestrator: BatchedPenalizerOrchestrator = copy.copy(info.penalizer_orchestrator)
    orchestrator.batch = batch
    orchestrator.penalizers = {}
    for kind, penalizer in info.penalizer_orchestrator.penalizers.items():
        own = copy.copy(penalizer)
        own._orchestrator_ref = weakref.ref(orchestrator)
        orchestrator.penalizers[kind] = own
    twin.penalizer_orchestrator = orchestrator
    return twin
