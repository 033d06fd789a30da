"""Attention in plain PyTorch over KV pages, wherever they lie: backend ``orbitflow_torch``.

With OrbitFlow it reads through the page table, waits for a layer's transfers, and
attends a layer in pieces where its pages do not fit the ring at once; without, it
serves SGLang's own pool. New queries attend to the cached prefix and to each other
apart and the two are merged, so an extend step computes no more than its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from orbitflow_sglang.config import TORCH
from orbitflow_sglang.engine.attention_base import OrbitFlowBackend
from orbitflow_sglang.engine.emulated_compute import EmulatedCompute, LayerCosts
from orbitflow_sglang.engine.page_rows import HostRows
from orbitflow_sglang.engine.pool import OrbitFlowKVPool
from orbitflow_sglang.engine.runtime import Runtime, StepInput, spans
from orbitflow_sglang.residency.store import LayerPass


class OrbitFlowTorchBackend(OrbitFlowBackend):
    name = TORCH

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        rows = HostRows(model_runner.req_to_token_pool, self.token_to_kv_pool.page_size)
        self.reader: Runtime | StockReader
        if isinstance(self.token_to_kv_pool, OrbitFlowKVPool):
            self.reader = self.token_to_kv_pool.runtime
            self.reader.rows = rows
        elif type(self.token_to_kv_pool) is MHATokenToKVPool:
            self.reader = StockReader(self.token_to_kv_pool, rows)
        else:
            raise ValueError(
                f"--attention-backend {TORCH} serves plain multi-head or grouped-query "
                f"attention; this model's KV pool is {type(self.token_to_kv_pool).__name__}: "
                "use another attention backend"
            )
        self._new_tokens: list[int] = []
        costs = LayerCosts.from_env()
        self._emulated = None if costs is None else EmulatedCompute(costs)
        if isinstance(self.reader, Runtime):
            self.reader.emulated = self._emulated

    def begin(self, step: StepInput) -> None:
        self._new_tokens = [n - b for n, b in zip(step.seq_lens, step.before, strict=True)]
        self.reader.begin(step)
        if self._emulated is not None:
            self._emulated.begin(step, self.reader.stall_s)

    def decode(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        merged = _Merge(q)
        for part in self.reader.passes(layer.layer_id):
            for i, (pages, tokens) in enumerate(zip(part.pages, part.tokens, strict=True)):
                if tokens:
                    merged.add(i, i + 1, *self._gather(part, pages, tokens), layer.scaling)
        return self._ended(merged.result())

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> torch.Tensor:
        ends = np.cumsum(self._new_tokens).tolist()
        starts = [0, *ends[:-1]]
        merged = _Merge(q)
        for start, end in zip(starts, ends, strict=True):
            merged.add(start, end, k[start:end], v[start:end], layer.scaling, causal=True)
        for part in self.reader.passes(layer.layer_id):
            rows = zip(starts, ends, part.pages, part.tokens, strict=True)
            for start, end, pages, tokens in rows:
                if tokens:
                    merged.add(start, end, *self._gather(part, pages, tokens), layer.scaling)
        return self._ended(merged.result())

    def _gather(
        self, part: LayerPass, pages: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one request's pages, ``[tokens, kv_heads, head_dim]``."""
        dtype = self.token_to_kv_pool.dtype
        k, v = (x.index_select(0, pages).flatten(0, 1)[:tokens] for x in (part.k, part.v))
        return k.view(dtype), v.view(dtype)

    def _ended(self, out: torch.Tensor) -> torch.Tensor:
        if self._emulated is not None:
            self._emulated.end_layer(self.reader.stall_s)
        return out

    def support_triton(self) -> bool:
        return False


class StockReader:
    """Pages of SGLang's own pool: each layer has its buffer, and one id names a page in all."""

    stall_s = 0.0  # nothing is ever waited for

    def __init__(self, pool: MHATokenToKVPool, rows: HostRows) -> None:
        self._pool = pool
        self._rows = rows
        self._ids = torch.empty(0, dtype=torch.int32)
        self._counts: list[int] = []
        self._tokens: list[int] = []

    def begin(self, step: StepInput) -> None:
        _, self._counts, self._tokens = spans(step, self._pool.page_size)
        pages = map(self._rows.pages, step.rows, self._tokens)
        self._ids = torch.from_numpy(np.concatenate(list(pages)))

    def passes(self, layer: int) -> Iterator[LayerPass]:
        size = self._pool.page_size
        k, v = (
            buffer.view(-1, size, *buffer.shape[1:])
            for buffer in (self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer))
        )
        yield LayerPass(k, v, self._ids, self._counts, self._tokens, whole=True)


class _Merge:
    """Attention of query rows to several parts of their context, merged by log-sum-exp."""

    def __init__(self, q: torch.Tensor) -> None:
        self._q = q  # [rows, heads, head_dim]
        self._parts: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def add(
        self,
        start: int,
        end: int,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        causal: bool = False,
    ) -> None:
        """Rows ``start:end`` attend to ``k`` and ``v``, ``[tokens, kv_heads, head_dim]``."""
        if start == end:
            return
        q = self._q[start:end].transpose(0, 1).unsqueeze(0)
        k, v = (x.to(q.dtype).transpose(0, 1).unsqueeze(0) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
        before = self._parts.get((start, end))
        if before is not None:
            out, lse = _merge(*before, out, lse)
        self._parts[start, end] = (out, lse)

    def result(self) -> torch.Tensor:
        """``[rows, heads, head_dim]``, rows that attended to nothing being zero."""
        merged = torch.zeros_like(self._q)
        for (start, end), (out, _) in self._parts.items():
            merged[start:end] = out[0].transpose(0, 1)
        return merged


def _merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint parts of the context from attention to each.

    In double precision: a small ring makes many parts of a long context, and a rounded logarithm
    of a sum is off by its own size, not by that of the share that is computed from it.
    """
    lse_a, lse_b = lse_a.double(), lse_b.double()
    lse = torch.logaddexp(lse_a, lse_b)
    share = torch.exp(lse_a - lse).unsqueeze(-1)
    return out_a * share + out_b * (1 - share), lse
