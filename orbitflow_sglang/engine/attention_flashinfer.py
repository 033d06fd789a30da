"""FlashInfer over KV pages, wherever they lie: backend ``orbitflow_flashinfer``, for NVIDIA GPUs.

Kernels and plans are those of SGLang's own FlashInfer backend, so where KV lies decides which
indices a layer is given and nothing else. Only a layer whose staged pages do not fit the ring at
once is attended in parts and merged, which rounds differently in the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_buffer, get_parallel

from orbitflow_sglang.config import FLASHINFER
from orbitflow_sglang.engine import compat
from orbitflow_sglang.engine.flashinfer_wrappers import (
    Heads,
    PagedAttention,
    merge_in_torch,
    self_test,
)
from orbitflow_sglang.engine.graphs import BetweenGraphs
from orbitflow_sglang.engine.page_rows import MirroredRows
from orbitflow_sglang.engine.pool import OrbitFlowKVPool
from orbitflow_sglang.engine.runtime import StepInput, spans

KV_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
MOST_THREADS = 1024  # of a block
WORKSPACE_BYTES = 512 << 20  # what SGLang takes for the models that need most


class OrbitFlowFlashInferBackend(BetweenGraphs):
    name = FLASHINFER

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, OrbitFlowKVPool):
            raise ValueError(
                f"--attention-backend {FLASHINFER} reads OrbitFlow's pool, this is a "
                f"{type(pool).__name__}: without --enable-orbitflow use flashinfer"
            )
        compat.write_kv_apart(model_runner.model)
        self.token_to_kv_pool = pool
        self._runtime = pool.runtime
        self._runtime.rows = MirroredRows(model_runner.req_to_token_pool, pool.page_size)
        heads = _heads(model_runner)
        if heads.kv_dtype not in KV_DTYPES and model_runner.device != "cpu":
            raise ValueError(
                f"{FLASHINFER} serves KV in 16 or 8 bits, this is {heads.kv_dtype}: give --dtype "
                "bfloat16 and --kv-cache-dtype bfloat16, or leave --enable-orbitflow out"
            )
        workspace = get_buffer(
            "orbitflow_flashinfer_workspace",
            lambda: torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=model_runner.device),
        )
        tensor_cores = should_use_tensor_core(heads.kv_dtype, heads.query, heads.kv)
        self._attention = PagedAttention(
            heads, pool.page_size, tensor_cores, workspace, _merge(heads)
        )
        self_test(self._attention, heads, pool.page_size)

    def begin(self, step: StepInput) -> None:
        _, counts, tokens = spans(step, self.token_to_kv_pool.page_size)
        new_tokens = None
        if step.prefix_lens is not None:
            new_tokens = [n - b for n, b in zip(step.seq_lens, step.prefix_lens, strict=True)]
        self._attention.begin(counts, tokens, new_tokens)
        self._runtime.begin(step)

    def decode(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        k_scale, v_scale = self.scales(layer)
        parts = self._runtime.passes(layer.layer_id)
        return _times(v_scale, self._attention.decode(q, parts, layer.scaling * k_scale))

    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> torch.Tensor:
        k_scale, v_scale = self.scales(layer)
        parts = self._runtime.passes(layer.layer_id)
        return _times(v_scale, self._attention.extend(q, k, v, parts, layer.scaling * k_scale))

    def scales(self, layer: RadixAttention) -> tuple[float, float]:
        """A checkpoint's, or those of ``--quantization-param-path``, for KV of 8 bits."""
        if self.token_to_kv_pool.dtype.itemsize > 1:
            return 1.0, 1.0
        k_scale = layer.k_scale_float or layer.k_scale or 1.0
        v_scale = layer.v_scale_float or layer.v_scale or 1.0
        return k_scale, v_scale


def _times(scale: float, out: torch.Tensor) -> torch.Tensor:
    return out if scale == 1.0 else out * scale  # mostly 1: a launch less for each layer


def _heads(model_runner: Any) -> Heads:
    """As SGLang's backend plans for them."""
    model, parallel = model_runner.model_config, get_parallel()
    return Heads(
        query=model.get_max_num_attention_heads() // parallel.attn_tp_size,
        kv=model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size),
        dim=model.head_dim,
        q_dtype=model_runner.dtype,
        kv_dtype=model_runner.kv_cache_dtype,
    )


def _merge(heads: Heads) -> Any:
    """FlashInfer's, but where there are more heads than its kernel has threads for."""
    from flashinfer.cascade import merge_state

    lanes = heads.dim // max(16 // heads.q_dtype.itemsize, heads.dim // 32)
    return merge_state if heads.query * lanes <= MOST_THREADS else merge_in_torch
