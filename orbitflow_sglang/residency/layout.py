"""Shapes and sizes that every part of the residency package shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from orbitflow_sglang.residency.host_memory import pinned_tensor


@dataclass(frozen=True)
class KVLayout:
    """The KV cache of one rank, in the terms of one page of one layer.

    A *page* holds ``page_size`` consecutive tokens of one request in one layer:
    K of shape ``[page_size, kv_heads, head_dim]`` and V with ``v_head_dim``.
    """

    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """K and V of one page in one layer, in bytes."""
        values = self.page_size * self.kv_heads * (self.head_dim + self.v_head_dim)
        return values * self.dtype.itemsize

    def pages(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one request take in one layer."""
        return math.ceil(tokens / self.page_size)

    def empty(
        self, pages: int, device: str, pinned_for: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised K and V of ``pages`` pages, ``[pages, page_size, kv_heads, dim]``; host
        memory may be pinned for a GPU."""
        shapes = [
            (pages, self.page_size, self.kv_heads, dim) for dim in (self.head_dim, self.v_head_dim)
        ]
        if pinned_for is None:
            k, v = (torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes)
        else:
            gpu = torch.device(pinned_for)
            k, v = (pinned_tensor(shape, self.dtype, gpu) for shape in shapes)
        return k, v


def most_logical_pages(main_pages: int, host_pages: int, layers: int) -> int:
    """Page ids that there is room for in arena and host store together.

    One less where there are both: the tail of who comes back takes its places in the arena
    before it gives up those on the host.
    """
    return (main_pages + host_pages) // layers - bool(host_pages)


@dataclass(frozen=True)
class Capacity:
    """How many pages each place holds. ``arena_pages`` includes the ring."""

    arena_pages: int
    ring_pages: int
    host_pages: int
    logical_pages: int  # page ids that the engine may hand out, the same for every layer

    @property
    def main_pages(self) -> int:
        """Arena pages outside the ring: resident pages and tails share them."""
        return self.arena_pages - self.ring_pages
