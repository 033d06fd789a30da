"""FlashInfer's attention over the arena: one plan a step, page indices of each layer.

FlashInfer plans by lengths alone, and only a run looks at indices; so one plan serves all
layers of a step though their pages lie elsewhere in each. The indices that a run uses are an
attribute of its wrapper that is not public: ``_run`` alone sets it, and ``self_test`` finds out
before the first request whether it still means that.

A token is a page of its own to FlashInfer, as with SGLang's backend, whatever the size of our
pages: kernel, split and order of summation are then the same as without OrbitFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orbitflow_sglang.residency.device import to_device
from orbitflow_sglang.residency.step import LayerPass

BACKEND = "fa2"  # for all: the module of fa3 takes 20 minutes to compile
READ_AHEAD = 256  # indices behind the last one that a kernel may look at
STEPS_AHEAD, PARTS_AHEAD = 2, 3  # whose plans are made while the GPU is behind
TOLERANCE = 0.05  # of the self-test: what 16 bits lose; a wrong page is off by about 1


@dataclass(frozen=True)
class Heads:
    """The attention of one rank."""

    query: int
    kv: int
    dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype


class TokenSlots:
    """Where the tokens of a step lie in the arena, made on the device from pages' ids."""

    def __init__(
        self, counts: Sequence[int], tokens: Sequence[int], page_size: int, device: torch.device
    ) -> None:
        """``counts[i]`` pages of request i hold ``tokens[i]`` tokens."""
        self.total = sum(tokens)
        self._page_size = page_size
        self._slots = torch.zeros(self.total + READ_AHEAD, dtype=torch.int32, device=device)
        if page_size == 1:
            return
        firsts = np.zeros((2, len(tokens)), dtype=np.int64)
        firsts[:, 1:] = np.cumsum([counts, tokens], axis=1)[:, :-1]
        first_page, first_token = to_device(firsts, device)
        lengths = to_device(np.asarray(tokens, dtype=np.int64), device)
        owner = torch.repeat_interleave(
            torch.arange(len(tokens), device=device), lengths, output_size=self.total
        )
        place = torch.arange(self.total, device=device) - first_token[owner]
        self._page = first_page[owner] + place // page_size
        self._offset = (place % page_size).to(torch.int32)

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots of all tokens, int32, and some zeros behind them; ``ids``: of all pages.

        The next call overwrites them, behind what was launched to read them: a layer whose pages
        are its own costs two launches.
        """
        slots = self._slots[: self.total]
        if self._page_size == 1:
            slots.copy_(ids)
        else:
            torch.index_select(ids, 0, self._page, out=slots)
            torch.add(self._offset, slots, alpha=self._page_size, out=slots)
        return self._slots


class InTurn:
    """Wrappers of a kind, of which each plan takes the next.

    A plan is copied to the GPU from a buffer of its wrapper in host memory, which the wrapper's
    next plan may overwrite only when that copy is over. With several of them that is long ago:
    whoever plans is at most a step ahead of the GPU, or some parts of a layer.
    """

    def __init__(self, make: Callable[[], Any], device: torch.device, count: int) -> None:
        self._wrappers = [make() for _ in range(count)]
        self._copied: list[Any] = [None] * count
        self._on_gpu = device.type == "cuda"
        self._turn = 0

    def planned(self, plan: Callable[[Any], None]) -> Any:
        """The next wrapper, with ``plan`` applied to it."""
        self._turn = turn = (self._turn + 1) % len(self._wrappers)
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        plan(self._wrappers[turn])
        if self._on_gpu:
            event: Any = torch.cuda.Event
            self._copied[turn] = event()
            self._copied[turn].record()
        return self._wrappers[turn]


class PagedAttention:
    """Plans and runs the steps of one rank. ``merge`` joins attention to two parts of a context:
    ``(out, lse, out, lse) -> (out, lse)``, LSE to the base 2."""

    def __init__(
        self, heads: Heads, page_size: int, tensor_cores: bool, workspace: torch.Tensor, merge: Any
    ) -> None:
        import flashinfer

        self._heads = heads
        self._page_size = page_size
        self._device = workspace.device
        self._merge = merge

        def decode() -> Any:
            return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=tensor_cores, backend=BACKEND
            )

        def prefill() -> Any:
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=BACKEND)

        def new() -> Any:
            return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
                workspace, "NHD", backend=BACKEND
            )

        def in_turn(make: Callable[[], Any], count: int) -> InTurn:
            return InTurn(make, self._device, count)

        # For all that a layer attends to, planned once a step; and for one part of several.
        self._decode = in_turn(decode, STEPS_AHEAD)
        self._decode_parts = in_turn(decode, PARTS_AHEAD)
        self._prefill = in_turn(prefill, STEPS_AHEAD)
        self._prefill_parts = in_turn(prefill, PARTS_AHEAD)
        self._new = in_turn(new, STEPS_AHEAD)
        self._whole: Any = None  # of ``_decode`` or ``_prefill``: the one planned for this step
        self._ragged: Any = None  # of ``_new``, likewise
        self._new_tokens: list[int] | None = None  # None: a decode step
        self._slots: TokenSlots | None = None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # ids, and their slots
        self._no_indices = torch.empty(0, dtype=torch.int32, device=self._device)

    # --- a step -----------------------------------------------------------------

    def begin(
        self, counts: Sequence[int], tokens: Sequence[int], new_tokens: Sequence[int] | None
    ) -> None:
        """Plan a step that reads of request i ``tokens[i]`` tokens in ``counts[i]`` pages, and
        behind them has ``new_tokens[i]`` whose KV is given to ``extend``; None: a decode step,
        one query each, whose token is read back."""
        self._slots = TokenSlots(counts, tokens, self._page_size, self._device)
        self._last = None
        self._new_tokens = None if new_tokens is None else list(new_tokens)
        lengths = _indptr(tokens)
        if self._new_tokens is None:
            self._whole = self._decode.planned(lambda one: self._plan_decode(one, lengths))
            return
        queries = _indptr(self._new_tokens)
        self._ragged = self._new.planned(lambda one: self._plan_new(one, queries))
        if self._slots.total:
            self._whole = self._prefill.planned(
                lambda one: self._plan_prefill(one, queries, lengths)
            )

    def decode(self, q: torch.Tensor, parts: Iterable[LayerPass], scale: float) -> torch.Tensor:
        """``q`` and the result are ``[requests, heads, dim]``."""
        merged = None
        for part in parts:
            if part.whole:
                merged = self._run(self._whole, self._slots_of(part), q, part, scale), None
            elif sum(part.tokens):
                plan = functools.partial(self._plan_decode, lengths=_indptr(part.tokens))
                merged = self._add(
                    merged, self._part(self._decode_parts.planned(plan), q, part, scale)
                )
        assert merged is not None, "a token attends at least to itself"
        out: torch.Tensor = merged[0]
        return out

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: Iterable[LayerPass],
        scale: float,
    ) -> torch.Tensor:
        """``q`` and the result are ``[new tokens, heads, dim]``, ``k`` and ``v`` their KV."""
        assert self._slots is not None and self._new_tokens is not None
        if not self._slots.total:
            for _ in parts:  # nobody has a prefix, but the layer has its turn all the same
                pass
            out: torch.Tensor = self._ragged.forward(q, k, v, causal=True, sm_scale=scale)
            return out
        merged = self._ragged.forward_return_lse(q, k, v, causal=True, sm_scale=scale)
        for part in parts:
            if part.whole:
                slots = self._slots_of(part)
                found = self._run(self._whole, slots, q, part, scale, lse=True)
                merged = self._add(merged, found)
            elif sum(part.tokens):
                plan = functools.partial(
                    self._plan_prefill,
                    queries=_indptr(self._new_tokens),
                    lengths=_indptr(part.tokens),
                )
                merged = self._add(
                    merged, self._part(self._prefill_parts.planned(plan), q, part, scale)
                )
        out = merged[0]
        return out

    # --- inside -----------------------------------------------------------------

    def _plan_decode(self, wrapper: Any, lengths: torch.Tensor) -> None:
        """``lengths`` in host memory: FlashInfer then waits for nothing."""
        heads = self._heads
        wrapper.begin_forward(
            lengths, self._no_indices, torch.ones_like(lengths[1:]),
            heads.query, heads.kv, heads.dim, 1,
            data_type=heads.kv_dtype, q_data_type=heads.q_dtype, non_blocking=True,
        )  # fmt: skip

    def _plan_new(self, wrapper: Any, queries: torch.Tensor) -> None:
        heads = self._heads
        wrapper.begin_forward(
            queries, queries, heads.query, heads.kv, heads.dim, q_data_type=heads.q_dtype
        )

    def _plan_prefill(self, wrapper: Any, queries: torch.Tensor, lengths: torch.Tensor) -> None:
        heads = self._heads
        wrapper.begin_forward(
            queries, lengths, self._no_indices, torch.ones_like(lengths[1:]),
            heads.query, heads.kv, heads.dim, 1,
            q_data_type=heads.q_dtype, kv_data_type=heads.kv_dtype, non_blocking=True,
        )  # fmt: skip

    def _slots_of(self, part: LayerPass) -> torch.Tensor:
        """Of a part that is the whole; looked up once where all layers have the same ids."""
        assert self._slots is not None
        if self._last is None or self._last[0] is not part.ids:
            self._last = part.ids, self._slots.of(part.ids)
        return self._last[1]

    def _part(self, wrapper: Any, q: torch.Tensor, part: LayerPass, scale: float) -> Any:
        slots = TokenSlots(part.counts, part.tokens, self._page_size, self._device)
        return self._run(wrapper, slots.of(part.ids), q, part, scale, lse=True)

    def _run(
        self,
        wrapper: Any,
        slots: torch.Tensor,
        q: torch.Tensor,
        part: LayerPass,
        scale: float,
        lse: bool = False,
    ) -> Any:
        """Attention of ``q`` to what lies at ``slots``; with ``lse`` also its LSE."""
        wrapper._paged_kv_indices_buf = slots
        run = wrapper.forward_return_lse if lse else wrapper.forward
        # As a pool of tokens, [slots, kv_heads, dim]; the arena has bytes where KV has 8 bits.
        kv = tuple(x.flatten(0, 1).view(self._heads.kv_dtype) for x in (part.k, part.v))
        return run(q, kv, sm_scale=scale)

    def _add(self, merged: Any, found: Any) -> Any:
        return found if merged is None else self._merge(*merged, *found)


def merge_in_torch(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashInfer's ``merge_state`` gives, for any number of heads; two that attended to
    nothing give zeros."""
    most = torch.maximum(lse_a, lse_b)
    most = torch.where(torch.isinf(most), 0.0, most)
    a, b = torch.exp2(lse_a - most), torch.exp2(lse_b - most)
    total = (a + b).clamp_min(torch.finfo(torch.float32).tiny)
    merged = out_a.float() * (a / total)[..., None] + out_b.float() * (b / total)[..., None]
    return merged.to(out_a.dtype), torch.log2(a + b) + most


def self_test(attention: PagedAttention, heads: Heads, page_size: int) -> None:
    """Raise ``RuntimeError`` unless attention reads where ``LayerPass`` says.

    The same tokens in two arenas, at other places in each and behind one plan, must give the same
    bits, and what attention in float32 gives but for rounding; in one part and in two; by a decode
    step, and with the last token of each request as the new one of a prefill.
    """
    device = attention._device
    random = torch.Generator().manual_seed(0)
    tokens, pages = [3 * page_size + 1, 1, page_size], [4, 1, 1]
    arena = torch.randn(2, 16, page_size, heads.kv, heads.dim, generator=random)
    arena = arena.to(heads.kv_dtype).float()
    q = torch.randn(3, heads.query, heads.dim, generator=random)
    expected = _reference(q, arena, pages, tokens)
    q = q.to(device, heads.q_dtype)
    places = torch.randperm(16, generator=random)
    moved = torch.empty_like(arena)
    moved[:, places] = arena
    ids = torch.arange(6, dtype=torch.int32)
    # Of a prefill: what lies behind the new tokens, and these.
    behind = [length - 1 for length in tokens]
    held = [-(-length // page_size) for length in behind]
    firsts = (torch.tensor([0, *pages[:-1]]).cumsum(0) * page_size).tolist()
    last = torch.tensor([first + length for first, length in zip(firsts, behind, strict=True)])
    k, v = arena.flatten(1, 2)[:, last].to(device, heads.q_dtype)

    def runs(
        counts: Sequence[int],
        lengths: Sequence[int],
        attend: Callable[[list[LayerPass]], torch.Tensor],
    ) -> list[torch.Tensor]:
        def part(
            where: torch.Tensor, at: torch.Tensor, rows: Sequence[int], whole: bool = False
        ) -> LayerPass:
            own = [x[: counts[i] * (i in rows)] for i, x in enumerate(at.split(pages))]
            k, v = where.to(device, heads.kv_dtype)
            return LayerPass(
                k, v, torch.cat(own).to(device, torch.int32),
                [len(x) for x in own], [n * (i in rows) for i, n in enumerate(lengths)], whole,
            )  # fmt: skip

        here, there = (arena, ids), (moved, places[:6])
        return [
            attend([part(*here, range(3), whole=True)]),
            attend([part(*there, range(3), whole=True)]),
            attend([part(*here, [0]), part(*there, [1, 2])]),
        ]

    scale = heads.dim**-0.5
    attention.begin(pages, tokens, None)
    found = runs(pages, tokens, lambda parts: attention.decode(q, parts, scale))
    attention.begin(held, behind, [1] * 3)
    found += runs(held, behind, lambda parts: attention.extend(q, k, v, parts, scale))
    if not (torch.equal(found[0], found[1]) and torch.equal(found[3], found[4])):
        raise RuntimeError(
            "FlashInfer does not read KV at the indices it is given for a layer: this version is "
            "not supported"
        )
    for out in found:
        worst = float((out.float().cpu() - expected).abs().max())
        if not worst < TOLERANCE:
            raise RuntimeError(f"FlashInfer's attention is off by {worst:.3g} in the self-test")


def _reference(
    q: torch.Tensor, arena: torch.Tensor, pages: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    """Attention of one query to each request's tokens, whose pages come one after another."""
    out, first = [], 0
    for row, (count, length) in enumerate(zip(pages, tokens, strict=True)):
        k, v = arena[:, first : first + count].flatten(1, 2)[:, :length]
        first += count
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q[row][:, None], k, v)
        out.append(found[:, 0])
    return torch.stack(out)


def _indptr(lengths: Sequence[int]) -> torch.Tensor:
    """Where each one begins, and the last ends; int32, in host memory."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
