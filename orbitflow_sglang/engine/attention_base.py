"""What OrbitFlow's attention backends have in common: shapes, refusals and saving new KV."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVCache, KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from orbitflow_sglang.engine import compat
from orbitflow_sglang.engine.pool import OrbitFlowKVPool
from orbitflow_sglang.engine.runtime import StepInput


class OrbitFlowBackend(AttentionBackend):
    """One object per model runner."""

    name: ClassVar[str]  # as ``--attention-backend`` has it
    token_to_kv_pool: KVCache

    @abstractmethod
    def begin(self, step: StepInput) -> None:
        """A step begins: make its pages ready, and plan."""

    @abstractmethod
    def decode(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """``q`` is ``[requests, heads, head_dim]``; so is the result."""

    @abstractmethod
    def extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> torch.Tensor:
        """All are ``[new tokens of all requests, heads, head_dim]``; so is the result."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.begin(self.coming() or StepInput.of_forward(forward_batch))

    def coming(self) -> StepInput | None:
        """The step that the scheduler has announced; None without OrbitFlow."""
        pool = self.token_to_kv_pool
        return pool.runtime.coming if isinstance(pool, OrbitFlowKVPool) else None

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``q`` is ``[requests, heads * head_dim]``; so is the result."""
        compat.refuse_parts(kwargs)
        if save_kv_cache and k is not None:
            self._save(*self._stored(k, v, layer), layer, forward_batch)
        return self.decode(_queries(q, layer), layer).flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``q`` is ``[new tokens of all requests, heads * head_dim]``; so is the result."""
        if layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY:
            raise NotImplementedError(f"{self.name} serves decoder self-attention only")
        compat.refuse_parts(kwargs)
        k, v = self._stored(k, v, layer)
        if save_kv_cache:
            self._save(k, v, layer, forward_batch)
        # As it will be read back: chunks of a prompt must not decide who sees KV unrounded.
        return self.extend(_queries(q, layer), k.to(q.dtype), v.to(q.dtype), layer).flatten(1)

    def scales(self, layer: RadixAttention) -> tuple[float, float]:
        """What K and V are divided by before they are rounded; SGLang's PyTorch attention too
        leaves them as they are."""
        return 1.0, 1.0

    def _stored(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[tokens, heads * head_dim]`` as ``[tokens, heads, head_dim]`` in the pool's dtype."""
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        dtype = self.token_to_kv_pool.dtype
        if k.dtype == dtype:
            return k, v
        k_scale, v_scale = self.scales(layer)
        if not k_scale == v_scale == 1.0:
            k, v = k / k_scale, v / v_scale
        return k.to(dtype), v.to(dtype)

    def _save(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> None:
        loc = KVWriteLoc(forward_batch.out_cache_loc, None)
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)


def _queries(q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    return q.contiguous().view(-1, layer.tp_q_head_num, layer.qk_head_dim)
