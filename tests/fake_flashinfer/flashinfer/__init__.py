"""What OrbitFlow asks of FlashInfer 0.7.2, in plain PyTorch, for machines without a GPU.

Like the real one it plans by lengths, keeps the indices given to a plan in an attribute, and looks
at that attribute in a run alone. ``tests/gpu`` asks the same of the real one.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import torch

__version__ = "0.7.2"


def _write_rows_as_a_kernel_does() -> None:
    """On a GPU a kernel writes the rows of a prefill, and no method of the pool tells of it."""
    from sglang.srt.mem_cache import allocation

    def write_cache_indices(
        out_cache_loc: Any, rows: Any, rows_cpu: Any, prefix_lens: Any, prefix_lens_cpu: Any,
        seq_lens: Any, seq_lens_cpu: Any, extend_lens: Any, extend_lens_cpu: Any,
        prefix_tensors: Any, req_to_token_pool: Any,
    ) -> None:  # fmt: skip
        first = 0
        for i, row in enumerate(rows_cpu.tolist()):
            prefix, end = int(prefix_lens_cpu[i]), int(seq_lens_cpu[i])
            table = req_to_token_pool.req_to_token
            table[row, :prefix] = prefix_tensors[i]
            table[row, prefix:end] = out_cache_loc[first : first + end - prefix]
            first += end - prefix

    allocation.write_cache_indices = write_cache_indices


if "sglang.srt.managers.scheduler" in sys.modules:
    _write_rows_as_a_kernel_does()
    if os.environ.get("FAKE_CUDA_GRAPHS") == "1":
        import cpu_graphs

        cpu_graphs.install()


class _Wrapper:
    def __init__(self, workspace: torch.Tensor, kv_layout: str, *, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD" and backend == "fa2"
        self._qo_indptr = self._kv_indptr = torch.empty(0)
        self.plans = 0

    def _plan(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, heads: tuple[int, ...],
              q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:  # fmt: skip
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(kv_indptr) > 1
        self.plans += 1
        self._qo_indptr, self._kv_indptr = qo_indptr.clone(), kv_indptr.clone()
        self._heads, self._q_dtype, self._kv_dtype = heads, q_dtype, kv_dtype

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``k`` and ``v``: of all requests, one after another. Out, and LSE to the base 2."""
        query_heads, kv_heads, dim = self._heads
        assert q.shape == (int(self._qo_indptr[-1]), query_heads, dim), q.shape
        assert q.dtype == self._q_dtype and k.dtype == v.dtype == self._kv_dtype
        assert k.shape[1:] == v.shape[1:] == (kv_heads, dim)
        out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf)
        rows, tokens = self._qo_indptr.tolist(), self._kv_indptr.tolist()
        for number in range(len(rows) - 1):
            begin, end = rows[number : number + 2]
            first, last = tokens[number : number + 2]
            if begin == end or first == last:
                continue  # nothing to attend to: zeros, and an LSE of -inf
            own_k, own_v = (
                x[first:last].float().repeat_interleave(query_heads // kv_heads, dim=1)
                for x in (k, v)
            )
            logits = torch.einsum("qhd,khd->hqk", q[begin:end].float(), own_k) * scale
            if causal:
                seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril(
                    logits.shape[2] - logits.shape[1]
                )
                logits = logits.masked_fill(~seen, -math.inf)
            weights = torch.softmax(logits, dim=-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, own_v).to(q.dtype)
            lse[begin:end] = torch.logsumexp(logits, dim=-1).T / math.log(2)
        return out, lse


class _Paged(_Wrapper):
    def _plan_pages(
        self, indices: torch.Tensor, last_page_len: torch.Tensor, page_size: int
    ) -> None:
        assert indices.dtype == torch.int32 and page_size == 1 and (last_page_len == 1).all()
        self._paged_kv_indices_buf = indices

    def _read(self, kv_cache: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        indices, total = self._paged_kv_indices_buf, int(self._kv_indptr[-1])
        assert indices.dtype == torch.int32 and len(indices) >= total
        for cache in kv_cache:
            assert cache.ndim == 3 and cache.is_contiguous()
        return [cache[indices[:total].long()] for cache in kv_cache]


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self, workspace: torch.Tensor, kv_layout: str, *, use_tensor_cores: bool, backend: str
    ) -> None:
        super().__init__(workspace, kv_layout, backend=backend)

    def begin_forward(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *,
        data_type: torch.dtype, q_data_type: torch.dtype, non_blocking: bool,
    ) -> None:  # fmt: skip
        each = torch.arange(len(indptr), dtype=torch.int32)
        heads = num_qo_heads, num_kv_heads, head_dim
        self._plan(each, indptr, heads, q_data_type, data_type)
        self._plan_pages(indices, last_page_len, page_size)

    def forward(self, q: torch.Tensor, kv_cache: Any, *, sm_scale: float) -> torch.Tensor:
        return self.forward_return_lse(q, kv_cache, sm_scale=sm_scale)[0]

    def forward_return_lse(
        self, q: torch.Tensor, kv_cache: Any, *, sm_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._attend(q, *self._read(kv_cache), causal=False, scale=sm_scale)


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def begin_forward(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, indices: torch.Tensor,
        last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int,
        page_size: int, *, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        non_blocking: bool,
    ) -> None:  # fmt: skip
        heads = num_qo_heads, num_kv_heads, head_dim
        self._plan(qo_indptr, paged_kv_indptr, heads, q_data_type, kv_data_type)
        self._plan_pages(indices, last_page_len, page_size)

    def forward_return_lse(
        self, q: torch.Tensor, kv_cache: Any, *, causal: bool = False, sm_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._attend(q, *self._read(kv_cache), causal=causal, scale=sm_scale)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def begin_forward(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, *, q_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        heads = num_qo_heads, num_kv_heads, head_dim
        self._plan(qo_indptr, kv_indptr, heads, q_data_type, q_data_type)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, sm_scale: float
    ) -> torch.Tensor:
        return self.forward_return_lse(q, k, v, causal=causal, sm_scale=sm_scale)[0]

    def forward_return_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, sm_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._attend(q, k, v, causal, sm_scale)
