"""Cached prefixes: what of a prompt that waits is there already, and which give way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from orbitflow_sglang.residency.store import ResidencyStore


def cached_prefix(tree: Any, req: Req, live: Iterable[Req]) -> tuple[int, int]:
    """Tokens of its prompt, in whole pages, that are cached; and how many of them ``live``
    requests have too, so that they are in memory anyway. 0, 0 without a radix tree.

    SGLang's own look-up splits nodes and renews their age. Only the first rank of a group looks
    at those that wait, so that would make the ranks' trees, and with them their KV, differ.
    """
    core = getattr(tree, "tree_core", None)
    if core is None or tree.disable:
        return 0, 0
    tokens = req.origin_input_ids + req.output_ids
    # The last one is always computed: somebody has to say what comes next.
    key = RadixKey(
        tokens, req.extra_key, limit=max(0, len(tokens) - 1), cache_salt=req.cache_salt
    ).page_aligned(tree.page_size)
    found, _, _ = core.match_full_device_prefix(key)
    wanted = np.asarray(tokens)[:found]
    name = req.extra_key, req.cache_salt
    of_same_name = (other for other in live if (other.extra_key, other.cache_salt) == name)
    shared = max((_in_common(wanted, other) for other in of_same_name), default=0)
    return found, shared // tree.page_size * tree.page_size


def _in_common(tokens: np.ndarray, other: Req) -> int:
    theirs = np.asarray(other.origin_input_ids)[: len(tokens)]
    differ = np.flatnonzero(tokens[: len(theirs)] != theirs)
    return int(differ[0]) if len(differ) else len(theirs)


def make_host_room(tree: Any, store: ResidencyStore) -> None:
    """Evict cached prefixes that are on the host, as SGLang orders them, until the host store can
    take in as much as the arena holds, or half of its own size if that is less.

    SGLang evicts only when arena and host store are both full, and then just what the next
    prompt needs. Without room on the host nothing leaves the arena: neither who is paused nor
    what is cached, so that who comes back finds no room there.
    """
    capacity, layout, host = store.capacity, store.layout, store.host
    wanted = min(capacity.main_pages, capacity.host_pages // 2)
    while host.num_free < wanted and tree.evictable_size():
        before = host.num_free
        pages = -(-min(wanted - before, store.cached_on_host()) // layout.layers)
        if pages:
            tree.evict(EvictParams(num_tokens=pages * layout.page_size))
        if host.num_free == before:  # the rest belongs to requests, or what went was in the arena
            return
