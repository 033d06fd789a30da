"""Forward passes of made-up requests on the real engine, before it serves any."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from orbitflow_sglang.engine.placement import LiveRequest
from orbitflow_sglang.engine.runtime import Runtime, StepInput
from orbitflow_sglang.planner.measuring import DecodePoint
from orbitflow_sglang.planner.policies import Resident

TOKEN_IDS = 1000  # made-up prompts draw from so many; no model has fewer


class _Streamable(Resident):
    """Nothing leaves the device, by the path of a policy under which something might.

    That path prepares tables for every step, which is part of what a step costs.
    """

    spills = True


class Probe:
    """Times steps through the scheduler's worker, pools and allocator; a context manager.

    While it is open the engine must be idle. Closing it gives everything back and sets the
    runtime's counters to zero.
    """

    def __init__(self, scheduler: Scheduler, runtime: Runtime) -> None:
        self._scheduler = scheduler
        self._runtime = runtime
        self._worker = scheduler.tp_worker
        self._device = self._worker.model_runner.device
        self._placer = runtime.placer
        self._random = np.random.default_rng(0)  # the same prompts on every rank

    def __enter__(self) -> Self:
        self._runtime.set_policy(_Streamable())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
        self._runtime.live = list
        self._runtime.placer = self._placer
        self._runtime.start_over()

    def release(self) -> None:
        """Give up every request."""
        self._scheduler.req_to_token_pool.clear()
        self._scheduler.token_to_kv_pool_allocator.clear()

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        """Seconds of the forward pass of one prompt of so many tokens."""
        batch = self._new_batch(1, tokens)
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
        seconds = self._forward(batch)
        self.release()
        return seconds

    @torch.no_grad()
    def decode(self, point: DecodePoint, steps: int) -> list[float]:
        """Seconds of decode steps at ``point``, everything resident.

        The context is made up too, not prefilled: a step costs the same, and a prefill of
        long contexts would take far longer than all that is measured.
        """
        batch = self._new_batch(point.batch, point.context)
        batch.prefill_input_ids_cpu = None
        self._fill(batch)
        seconds = []
        for _ in range(steps):
            batch.input_ids = torch.from_numpy(self._tokens(point.batch)).to(batch.device)
            batch.prepare_for_decode()
            seconds.append(self._forward(batch))
        self.release()
        return seconds

    def _new_batch(self, requests: int, tokens: int) -> ScheduleBatch:
        """A batch about to be prefilled, with rows and slots."""
        scheduler = self._scheduler
        reqs = [self._request(number, tokens) for number in range(requests)]
        batch = ScheduleBatch.init_new(
            reqs=reqs,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            model_config=scheduler.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        return batch

    def _request(self, number: int, tokens: int) -> Req:
        req = Req(
            rid=f"orbitflow-probe-{number}",
            origin_input_text="",
            origin_input_ids=array("q", self._tokens(tokens).tobytes()),
            sampling_params=SamplingParams(temperature=0),
        )
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        req.extend_end = tokens
        return req

    def _tokens(self, count: int) -> np.ndarray:
        size = min(TOKEN_IDS, self._scheduler.model_config.vocab_size)
        return self._random.integers(0, size, count, dtype=np.int64)

    def _fill(self, batch: ScheduleBatch) -> None:
        """Open the pages of ``batch`` and write some KV to them."""
        store = self._runtime.store
        live = _live(batch)
        self._runtime.rows.written([one.row for one in live], [one.tokens for one in live])
        pages = np.concatenate([self._runtime.pages_of(one) for one in live])
        starts = store.begin_uniform(pages, pages, pages)
        if starts is None:
            raise RuntimeError(f"{len(pages)} whole extents were expected to be free")
        ids = torch.from_numpy(starts.astype(np.int64))
        noise = np.random.default_rng(0)
        dtype = self._scheduler.token_to_kv_pool_allocator.get_kvcache().dtype
        for layer in range(store.layout.layers):
            for part in store.arena.layer_view(layer):
                # One page for all: random numbers for a long context would take seconds.
                page = _kv_noise(noise, part.shape[1:], dtype).view(part.dtype)
                part[ids.to(part.device)] = page.to(part.device)

    def _forward(self, batch: ScheduleBatch) -> float:
        self._synchronize()
        self._runtime.live = lambda: _live(batch)
        began = time.perf_counter()
        try:
            self._runtime.announce(StepInput.of(batch))
            self._worker.forward_batch_generation(batch)
            self._synchronize()
        finally:
            self._runtime.end()
            # Or the first prompt that is served would take it for its own.
            self._worker.model_runner.shared_read_done_event = None
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        device: Any = torch.get_device_module(self._device)
        device.synchronize()


def _kv_noise(
    random: np.random.Generator, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Random KV of ``dtype``. What stores 8 bits as bytes has to view it: numbers cast to bytes
    would be NaN among others."""
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32)).to(dtype)


def _live(batch: ScheduleBatch) -> list[LiveRequest]:
    return [
        LiveRequest(req.rid, req.kv.req_pool_idx, req.kv.kv_allocated_len) for req in batch.reqs
    ]
