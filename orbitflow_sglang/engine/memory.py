"""Hooks of SGLang's memory configuration: our sizes, our pool, our allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator
from sglang.srt.runtime_context import get_schedule

from orbitflow_sglang.config import OrbitFlowConfig
from orbitflow_sglang.engine import ranks
from orbitflow_sglang.engine.pool import OrbitFlowAllocator, OrbitFlowKVPool
from orbitflow_sglang.engine.sizing import Budget, free_host_bytes, resolve_capacity
from orbitflow_sglang.residency.layout import Capacity

_capacity: Capacity | None = None  # of this scheduler; a configurator takes no attributes


def config_from_budget(
    original: Callable[..., Any],
    configurator: KVCacheConfigurator,
    budget_bytes: int,
    **kwargs: Any,
) -> Any:
    """Around ``KVCacheConfigurator.config_from_budget``: the logical capacity as token count."""
    config = OrbitFlowConfig.from_env()
    assert config is not None
    sizer = create_memory_pool_configurator(configurator)
    schedule = get_schedule()
    profiled = sizer.calculate_pool_sizes(budget_bytes, schedule.page_size)
    # Pages have the same numbers on every rank of a group, so there are as many of each kind.
    profiled_tokens, free_bytes = ranks.smallest([profiled.max_total_num_tokens, free_host_bytes()])
    budget = Budget(
        profiled_tokens=profiled_tokens,
        max_total_tokens=schedule.max_total_tokens,
        layers=configurator.layer_info.num_effective_layers,
        page_size=schedule.page_size,
        token_bytes=sizer._cell_size,
        ranks=ranks.on_this_host(),
    )
    capacity = resolve_capacity(config, budget, free_bytes)
    global _capacity
    _capacity = capacity
    return sizer.calculate_pool_sizes_from_max_tokens(
        capacity.logical_pages * schedule.page_size, schedule.page_size
    )


def resolve_max_num_reqs(
    result: int, configurator: KVCacheConfigurator, token_capacity: int
) -> int:
    """After ``resolve_max_num_reqs``: who runs has a tail page in each layer."""
    layers = configurator.layer_info.num_effective_layers
    assert _capacity is not None
    return max(1, min(result, _capacity.main_pages // layers - 1))


def add_rows_for_paused(
    configurator: KVCacheConfigurator, *, max_num_reqs: int
) -> tuple[tuple[KVCacheConfigurator], dict[str, int]]:
    """Before ``_build_req_to_token_pool``: paused requests have rows of their own."""
    config = OrbitFlowConfig.from_env()
    assert config is not None
    return (configurator,), {"max_num_reqs": max_num_reqs + max_paused(config, max_num_reqs)}


def max_paused(config: OrbitFlowConfig, max_running: int) -> int:
    """Requests that may be paused beside ``max_running`` that decode together."""
    if config.policy_spec.overflow != "pause" or config.policy_spec.placing is not None:
        return 0
    return max_running if config.max_paused is None else config.max_paused


def resolve_pool_class(
    original: Callable[..., type], configurator: KVCacheConfigurator, *, kind: str, default: type
) -> type:
    """Around ``_resolve_kv_pool_class``: our pool for plain attention."""
    if kind != "mha":
        return original(configurator, kind=kind, default=default)
    config = OrbitFlowConfig.from_env()
    assert config is not None and _capacity is not None
    return OrbitFlowKVPool.sized(config, _capacity)


def build_allocator(
    original: Callable[..., Any],
    configurator: KVCacheConfigurator,
    *,
    token_to_kv_pool: Any,
    **kwargs: Any,
) -> OrbitFlowAllocator:
    """Around ``_build_token_to_kv_pool_allocator``: ours, for page size 1 too."""
    assert isinstance(token_to_kv_pool, OrbitFlowKVPool), type(token_to_kv_pool)
    return OrbitFlowAllocator(
        token_to_kv_pool.size,
        page_size=token_to_kv_pool.page_size,
        dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        kvcache=token_to_kv_pool,
        need_sort=False,
    )
