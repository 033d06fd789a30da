"""Plans and indices of the FlashInfer backend, with PyTorch in FlashInfer's place.

``tests/gpu/test_attention.py`` has the same cases for the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import DECODE, EXTEND, Layer, check_decode, check_extend

from orbitflow_sglang.engine.flashinfer_wrappers import (
    PARTS_AHEAD,
    READ_AHEAD,
    Heads,
    InTurn,
    PagedAttention,
    TokenSlots,
    merge_in_torch,
    self_test,
)
from orbitflow_sglang.residency.step import LayerPass

pytestmark = pytest.mark.unit

FAKE = Path(__file__).parents[1] / "fake_flashinfer"
HEADS = Heads(query=4, kv=2, dim=8, q_dtype=torch.float32, kv_dtype=torch.float32)
OF_8_BITS = replace(HEADS, kv_dtype=torch.float8_e4m3fn)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FAKE))


def attention(page_size: int, merge: Any = merge_in_torch, heads: Heads = HEADS) -> PagedAttention:
    return PagedAttention(heads, page_size, True, torch.zeros(16, dtype=torch.uint8), merge)


def plans(wrappers: InTurn) -> int:
    return sum(wrapper.plans for wrapper in wrappers._wrappers)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("tokens", DECODE)
def test_decode_reads_each_layers_own_pages_behind_one_plan(
    tokens: list[int], page_size: int
) -> None:
    tokens = tokens if page_size > 1 else [min(t, 7) for t in tokens]
    from flashinfer.cascade import merge_state

    for merge in (merge_state, merge_in_torch):
        paged = attention(page_size, merge)
        check_decode(paged, HEADS, tokens, page_size, device="cpu", tolerance=1e-5)
        assert plans(paged._decode) == 1


@pytest.mark.parametrize("prefix", EXTEND)
def test_extend_attends_to_the_prefix_and_causally_to_itself(prefix: list[int]) -> None:
    paged = attention(4)
    check_extend(paged, HEADS, prefix, 4, device="cpu", tolerance=1e-5)
    assert plans(paged._new) == 1 and plans(paged._prefill) == any(prefix)


def test_kv_of_8_bits_is_read_as_it_is_stored() -> None:
    paged = attention(4, heads=OF_8_BITS)
    self_test(paged, OF_8_BITS, 4)
    check_decode(paged, OF_8_BITS, DECODE[2], 4, device="cpu", tolerance=1e-5)
    check_extend(paged, OF_8_BITS, EXTEND[2], 4, device="cpu", tolerance=1e-5)


def test_every_part_is_asked_for_also_where_nobody_has_a_prefix() -> None:
    paged, asked = attention(4), []
    layer = Layer(HEADS, [0], 4, 0, "cpu")

    def parts() -> Iterator[LayerPass]:
        yield from layer.whole()
        asked.append("to the end")

    paged.begin([0], [0], [2])
    q = layer.random(2, HEADS.query, HEADS.dim)
    paged.extend(q, *layer.random(2, 2, HEADS.kv, HEADS.dim), parts(), 1.0)
    assert asked, "or what the layer staged would never be given back"


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_slots_are_those_of_the_tokens_in_order(page_size: int) -> None:
    tokens = [7, 0, 16, 1]
    counts = [-(-t // page_size) for t in tokens]
    ends = [0, *accumulate(counts)]
    step = TokenSlots(counts, tokens, page_size, torch.device("cpu"))
    for _ in range(2):  # layers
        ids = torch.randperm(99)[: sum(counts)].to(torch.int32)
        found, wanted = step.of(ids), []
        for (begin, end), length in zip(pairwise(ends), tokens, strict=True):
            slots = [int(i) * page_size + j for i in ids[begin:end] for j in range(page_size)]
            wanted += slots[:length]
        assert found.tolist() == wanted + [0] * READ_AHEAD
        assert found.dtype == torch.int32


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_self_test_passes(page_size: int) -> None:
    self_test(attention(page_size), HEADS, page_size)


@pytest.mark.parametrize("wrapper", ["_decode", "_prefill"])
def test_the_self_test_notices_when_runs_no_longer_look_at_the_attribute(
    monkeypatch: pytest.MonkeyPatch, wrapper: str
) -> None:
    paged = attention(4)
    first: list[torch.Tensor] = []
    kind = type(getattr(paged, wrapper)._wrappers[0])
    read = kind._read

    def keeps_the_first(wrapper: object, kv_cache: object) -> object:
        first.append(wrapper._paged_kv_indices_buf.clone())  # type: ignore[attr-defined]
        wrapper._paged_kv_indices_buf = first[0]  # type: ignore[attr-defined]
        return read(wrapper, kv_cache)

    monkeypatch.setattr(kind, "_read", keeps_the_first)
    with pytest.raises(RuntimeError, match="does not read KV at the indices"):
        self_test(paged, HEADS, 4)


def test_the_self_test_notices_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = attention(4)
    kind = type(paged._decode._wrappers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *a, **k: forward(*a, **k) * 1.5)
    with pytest.raises(RuntimeError, match="off by"):
        self_test(paged, HEADS, 4)


def test_a_wrapper_is_planned_again_only_when_its_last_plan_was_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    class Copied:
        def record(self) -> None:
            self.of = said[-1]

        def synchronize(self) -> None:
            said.append(f"waited for {self.of}")

    monkeypatch.setattr(torch.cuda, "Event", Copied)
    made = iter("abcdef")
    in_turn = InTurn(lambda: next(made), torch.device("cuda"), PARTS_AHEAD)
    used = [
        in_turn.planned(lambda one, part=part: said.append(f"{part} by {one}"))
        for part in range(PARTS_AHEAD + 2)
    ]
    assert len(set(used)) == PARTS_AHEAD and used[:2] == used[PARTS_AHEAD:]
    assert said[PARTS_AHEAD:] == [
        f"waited for 0 by {used[0]}", f"{PARTS_AHEAD} by {used[0]}",
        f"waited for 1 by {used[1]}", f"{PARTS_AHEAD + 1} by {used[1]}",
    ]  # fmt: skip
