"""How large the arena, the ring, the host store and the logical capacity are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from orbitflow_sglang.config import ConfigError, OrbitFlowConfig, flag
from orbitflow_sglang.residency.layout import Capacity, most_logical_pages

logger = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)

MAX_DEFAULT_ARENAS_ON_HOST = 8
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


@dataclass(frozen=True)
class Budget:
    """What SGLang found: tokens are counted as resident in every layer."""

    profiled_tokens: int  # device memory allows that many
    max_total_tokens: int | None  # --max-total-tokens
    layers: int
    page_size: int
    token_bytes: int  # K and V of one token in all layers
    ranks: int = 1  # that share this host's memory


def resolve_capacity(config: OrbitFlowConfig, budget: Budget, free_host_bytes: int) -> Capacity:
    """Page counts for this rank; raises ``ConfigError`` when they cannot work.

    Every size that the operator left open is logged with the flag that sets it.
    """
    layers, size = budget.layers, budget.page_size
    page_bytes = budget.token_bytes * size // layers
    spills = config.policy_spec.spills
    arena = _arena_tokens(config, budget) // size * layers
    ring = _ring_pages(config, arena, layers)
    if spills and config.ring_pages is None:
        _chosen("ring_pages", ring, "pages of one layer")
    main = _main_pages(arena, ring, layers)
    host = 0
    if spills:
        free = free_host_bytes
        host = _host_bytes(config, arena * page_bytes, free, budget.ranks) // page_bytes
    logical = most_logical_pages(main, host, layers)
    if budget.max_total_tokens is not None:
        logical = min(logical, budget.max_total_tokens // size)
    return Capacity(arena_pages=arena, ring_pages=ring, host_pages=host, logical_pages=logical)


def check_sizes(config: OrbitFlowConfig, layers: int, page_size: int, free_host_bytes: int) -> None:
    """Raise what ``resolve_capacity`` would, as far as that is known before a model is loaded."""
    spills = config.policy_spec.spills
    if config.arena_tokens is not None:
        arena = config.arena_tokens // page_size * layers
        _main_pages(arena, _ring_pages(config, arena, layers), layers)
    if spills and config.host_memory_gb is not None:
        _host_bytes(config, 0, free_host_bytes, ranks=1)  # of all ranks together


def free_host_bytes() -> int:
    """Memory that this process may still take: the machine's, bounded by the cgroup's."""
    free = int(psutil.virtual_memory().available)
    for limit, usage in zip(CGROUP_LIMITS, CGROUP_USAGE, strict=True):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):  # no such cgroup version, or "max"
            continue
    return max(0, free)


def _arena_tokens(config: OrbitFlowConfig, budget: Budget) -> int:
    if config.arena_tokens is not None:
        if config.arena_tokens > budget.profiled_tokens:
            raise ConfigError(
                f"{flag('arena_tokens')} {config.arena_tokens}: device memory has room for "
                f"{budget.profiled_tokens} tokens. Lower it, or raise --mem-fraction-static"
            )
        return config.arena_tokens
    if config.arena_fraction is not None:
        return int(config.arena_fraction * budget.profiled_tokens)
    tokens = budget.profiled_tokens
    if budget.max_total_tokens is not None:
        tokens = min(tokens, budget.max_total_tokens)
    return _chosen("arena_tokens", tokens, "tokens")


def _ring_pages(config: OrbitFlowConfig, arena_pages: int, layers: int) -> int:
    spec = config.policy_spec
    if config.ring_pages and spec.spills:
        return config.ring_pages
    return spec.ring_pages(arena_pages, layers)


def _main_pages(arena: int, ring: int, layers: int) -> int:
    main = arena - ring
    if main < 2 * layers:
        raise ConfigError(
            f"an arena of {arena} pages leaves {max(main, 0)} outside the ring of {ring}; even one "
            f"request needs {2 * layers} (two pages in each of {layers} layers): raise "
            f"{flag('arena_tokens')}, or lower {flag('ring_pages')} or --page-size"
        )
    return main


def _host_bytes(config: OrbitFlowConfig, arena_bytes: int, free_bytes: int, ranks: int) -> int:
    """The share of one of ``ranks`` with an arena of ``arena_bytes`` each.

    What others of them have taken already is not free any more, so only the share must be.
    """
    if config.host_memory_gb is None:
        chosen = min(free_bytes // 2 // ranks, MAX_DEFAULT_ARENAS_ON_HOST * arena_bytes)
        _chosen("host_memory_gb", round(ranks * chosen / 1e9, 3), "10^9 bytes")
        return chosen
    wanted = int(config.host_memory_gb * 1e9) // ranks
    if wanted > free_bytes:
        raise ConfigError(
            f"{flag('host_memory_gb')} {config.host_memory_gb} is more than the "
            f"{free_bytes / 1e9:.2f} free on this host (within its cgroup): lower it"
        )
    return wanted


def _chosen(field: str, value: Number, unit: str) -> Number:
    logger.info("OrbitFlow chose %s = %s (%s)", flag(field), value, unit)
    return value
