"""Attention over pages in an arena, against attention in float32: wherever FlashInfer runs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch

from orbitflow_sglang.engine.flashinfer_wrappers import Heads, PagedAttention
from orbitflow_sglang.residency.step import LayerPass

PAGES = 40
DECODE = ([1], [4, 5, 13], [16, 1, 3, 8, 30])  # tokens of each request
EXTEND = ([0, 0], [4, 0, 9], [30, 5, 1])  # those before this step
NEW = (5, 1, 3)


class Layer:
    """A layer's KV in an arena of its own."""

    def __init__(
        self, heads: Heads, tokens: Sequence[int], page_size: int, seed: int, device: str
    ) -> None:
        self._rng = random.Random(seed)
        self._noise = torch.Generator().manual_seed(seed)
        self._size = page_size
        self._tokens = tokens
        self._device = device
        self._arena = self.random(2, PAGES, page_size, heads.kv, heads.dim).to(heads.kv_dtype)
        places = self._rng.sample(range(PAGES), sum(-(-t // page_size) for t in tokens))
        self._pages: list[list[int]] = []
        for count in tokens:
            own = -(-count // page_size)
            self._pages.append(places[:own])
            places = places[own:]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._noise).to(self._device)

    def kv(self, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._arena[:, self._pages[request]].flatten(1, 2)[:, : self._tokens[request]]
        return k, v

    def whole(self) -> list[LayerPass]:
        return [self._pass([list(range(len(own))) for own in self._pages], whole=True)]

    def parts(self, count: int) -> Iterator[LayerPass]:
        """Each page in one of so many parts."""
        where = [[self._rng.randrange(count) for _ in own] for own in self._pages]
        for part in range(count):
            yield self._pass(
                [[i for i, p in enumerate(own) if p == part] for own in where], whole=False
            )

    def _pass(self, chosen: list[list[int]], whole: bool) -> LayerPass:
        tokens = [
            sum(min(self._size, total - i * self._size) for i in numbers)
            for numbers, total in zip(chosen, self._tokens, strict=True)
        ]
        ids = [own[i] for own, numbers in zip(self._pages, chosen, strict=True) for i in numbers]
        arena = self._arena.view(torch.uint8) if self._arena.itemsize == 1 else self._arena
        return LayerPass(
            *arena, torch.tensor(ids, dtype=torch.int32, device=self._device),
            [len(numbers) for numbers in chosen], tokens, whole,
        )  # fmt: skip


def check_decode(
    paged: PagedAttention, heads: Heads, tokens: list[int], page_size: int, *,
    device: str, tolerance: float,
) -> None:  # fmt: skip
    """One plan, three layers whose pages lie elsewhere, in one part and in several."""
    scale = 1 / math.sqrt(heads.dim)
    paged.begin([-(-t // page_size) for t in tokens], tokens, None)
    for seed in range(3):
        layer = Layer(heads, tokens, page_size, seed, device)
        q = layer.random(len(tokens), heads.query, heads.dim).to(heads.q_dtype)
        wanted = [_expected(q[i : i + 1], *layer.kv(i), tokens[i]) for i in range(len(tokens))]
        for parts in (layer.whole(), layer.parts(1), layer.parts(2), layer.parts(5)):
            found = paged.decode(q, parts, scale)
            _assert_close(found, torch.cat(wanted), tolerance)


def check_extend(
    paged: PagedAttention, heads: Heads, prefix: list[int], page_size: int, *,
    device: str, tolerance: float,
) -> None:  # fmt: skip
    """New tokens attend to what was before them, and causally to each other."""
    scale = 1 / math.sqrt(heads.dim)
    new = NEW[: len(prefix)]
    paged.begin([-(-t // page_size) for t in prefix], prefix, new)
    for seed in range(3):
        layer = Layer(heads, prefix, page_size, seed, device)
        q = layer.random(sum(new), heads.query, heads.dim).to(heads.q_dtype)
        k, v = layer.random(2, sum(new), heads.kv, heads.dim).to(heads.q_dtype)
        wanted, first = [], 0
        for i, count in enumerate(new):
            rows = slice(first, first + count)
            first += count
            kept = (x.to(heads.q_dtype) for x in layer.kv(i))
            both = [torch.cat(x) for x in zip(kept, (k[rows], v[rows]), strict=True)]
            wanted.append(_expected(q[rows], both[0], both[1], prefix[i]))
        for parts in (layer.whole(), layer.parts(3)):
            found = paged.extend(q, k, v, parts, scale)
            _assert_close(found, torch.cat(wanted), tolerance)


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int) -> torch.Tensor:
    """Rows that see ``before`` tokens and those up to themselves; in float32."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.float().cpu().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(before)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(0, 1)


def _assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=tolerance, atol=tolerance)
