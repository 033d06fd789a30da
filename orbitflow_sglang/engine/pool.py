"""SGLang's KV pool and allocator over the residency store.

SGLang goes on to speak of token slots. A slot names the same token in every layer
and is drawn from one logical space, as large as arena and host store together;
where a layer's bytes are is the store's business.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.engine import ranks
from orbitflow_sglang.engine.placement import Placer, PlanPlacer, PolicyPlacer
from orbitflow_sglang.engine.runtime import Runtime
from orbitflow_sglang.planner.policies import make_policy
from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.store import ResidencyStore

logger = logging.getLogger(__name__)


class OrbitFlowKVPool(MHATokenToKVPool):
    """Pool of SGLang whose ``size`` is logical and whose buffers are the arena and the host store.

    ``sized`` makes the class that SGLang instantiates; ``_create_buffers`` is where
    SGLang asks for memory.
    """

    config: ClassVar[OrbitFlowConfig]
    capacity: ClassVar[Capacity]
    runtime: Runtime

    @staticmethod
    def sized(config: OrbitFlowConfig, capacity: Capacity) -> type[OrbitFlowKVPool]:
        """A subclass that will allocate ``capacity``."""
        return type("OrbitFlowKVPool", (OrbitFlowKVPool,), {"config": config, "capacity": capacity})

    def _create_buffers(self) -> None:
        layout = KVLayout(
            layers=self.layer_num,
            page_size=self.page_size,
            kv_heads=self.head_num,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            dtype=self.store_dtype,
        )
        link = self.config.emulated_link_gb_per_s
        store = ResidencyStore(
            layout,
            self.capacity,
            self.device,
            None if link is None else link * 1e9,
            in_lockstep=ranks.in_lockstep(),
        )
        spec = self.config.policy_spec
        if spec.placing is None:
            placer: Placer = PlanPlacer(store, spec.name)
        else:
            placer = PolicyPlacer(store, make_policy(spec.placing))
        self.runtime = Runtime(store, placer)
        # No layer has a buffer of its own; whatever wants one must fail, not read the arena.
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []
        self.k_scale_buffer = self.v_scale_buffer = None
        self.native_k_scale_buffer = self.native_v_scale_buffer = None
        self.dq_k_buffer = self.dq_v_buffer = None
        self._kv_buffer_descs: list[object] = []

    def get_kv_size_bytes(self) -> tuple[int, int]:
        arena = self.runtime.store.arena
        return arena.k.nbytes, arena.v.nbytes

    def _store_kv_layer(
        self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
    ) -> None:
        # Where ``loc`` lies was looked up once for all layers when the step began.
        self.runtime.write(layer_idx, cache_k, cache_v)

    def _clear_buffers(self) -> None:
        self.runtime.store.close()

    def _no_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "with OrbitFlow a token slot has no address of its own: use OrbitFlow's attention "
            "backend, and no feature that copies KV by slot"
        )

    _get_key_buffer = _get_value_buffer = _no_buffer
    get_contiguous_buf_infos = get_cpu_copy = load_cpu_copy = _no_buffer
    move_kv_cache = set_kv_buffer_prefix_valid = get_device_pool_infos = _no_buffer


class OrbitFlowPrefillBudget(PrefillBudget):
    """SGLang's, for prompts between whose chunks others decode.

    SGLang computes a prompt's chunks one behind the other, so that the slots that were free when
    it was let in are there for all of them.
    """

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """Tokens of the next chunk; None while there are slots for none, and it waits."""
        free = int(self.remaining_current) // self.page_size * self.page_size
        tokens: int = min(super().available_chunk_tokens(chunk_limit), free)
        return tokens if tokens > 0 else None


class OrbitFlowAllocator(PagedTokenToKVPoolAllocator):
    """Hands out logical pages; gives back every copy of a page when SGLang frees it."""

    _kvcache: OrbitFlowKVPool

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> PrefillBudget:
        return OrbitFlowPrefillBudget(
            self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
        )

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        store = self._kvcache.runtime.store
        pages = np.concatenate([ids.cpu().numpy() for ids in page_ids])
        store.free(pages[store.table.in_use[pages]])  # a page never written has no place yet
        super()._release_page_ids(*page_ids)

    def clear(self) -> None:
        super().clear()
        store = self._kvcache.runtime.store
        try:
            store.clear()
        except ResidencyError as error:  # nobody is left who could miss what a copy lost
            logger.warning("OrbitFlow: memory is emptied behind a failed copy: %s", error)
            store.abandon()

    def verify_byte_accounting(self) -> list[str]:
        return self._kvcache.runtime.check_idle()
