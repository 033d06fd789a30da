"""Pages between arena and pinned host memory: kernels, copy engine, and the store above them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orbitflow_sglang.residency import kernels
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.step import NO_PAGES, Step
from orbitflow_sglang.residency.store import ResidencyStore
from orbitflow_sglang.residency.streams import CUDACopier, CUDAStreams, StreamTransferEngine

HEADS = 5  # so that a page is no multiple of what a block of threads has on its way
LAYOUT = KVLayout(4, 16, HEADS, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
PAGES = 200
DEVICE = torch.device("cuda")


@pytest.fixture(scope="module", params=["cuda", "triton"])
def page_kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> object:
    if request.param == "triton":
        return kernels.TritonKernels()
    cache: Path = tmp_path_factory.mktemp("kernels")
    return kernels.CUDAKernels(kernels._library(cache))


@pytest.fixture
def memory() -> Iterator[tuple[Arena, HostStore]]:
    arena = Arena(LAYOUT, Capacity(PAGES, 2, PAGES, PAGES), "cuda")
    host = HostStore(LAYOUT, PAGES, "cuda")
    for tensor in (arena.k, arena.v, host.k, host.v):
        tensor.copy_(torch.randn(tensor.shape))
    yield arena, host


@pytest.mark.parametrize("least_run", [1.0, float("inf")], ids=["copy-engine", "kernel"])
def test_bytes_arrive_in_both_directions(
    memory: tuple[Arena, HostStore], page_kernels: object, least_run: float
) -> None:
    arena, host = memory
    engine = StreamTransferEngine(
        arena, host, CUDAStreams(DEVICE), CUDACopier(page_kernels, DEVICE, least_run)
    )
    order = _in_runs(np.random.default_rng(0))
    source, target, back = order[:60], order[60:120], order[120:180]
    assert {1, 4} < {len(run) for run in _runs(target, source)}
    engine.fetch(source, target).wait()
    engine.write_back(target, back).wait()
    k, v = torch.randn(2, 5 * 16 + 3, HEADS, 128, device="cuda").to(torch.bfloat16)
    engine.write_through(k, v, np.array([3, 35]), order[180:182]).wait()
    engine.drain()
    for on_device, on_host, new in ((arena.k, host.k, k), (arena.v, host.v, v)):
        assert torch.equal(on_device[target].cpu(), on_host[source])
        assert torch.equal(on_host[back], on_host[source])
        assert torch.equal(on_host[order[180]], new[3:19].cpu())
        assert torch.equal(on_host[order[181]], new[35:51].cpu())
    assert engine.h2d.bytes == 60 * LAYOUT.page_bytes and engine.h2d.busy_s > 0
    engine.close()


def _in_runs(chance: np.random.Generator) -> np.ndarray:
    """All pages, in runs of 1, 4 and 15 that lie anywhere."""
    lengths = [1, 4, 15] * (PAGES // 20)
    runs = np.split(np.arange(PAGES), np.cumsum(lengths)[:-1])
    return np.concatenate([runs[i] for i in chance.permutation(len(runs))])


def _runs(to: np.ndarray, of: np.ndarray) -> list[np.ndarray]:
    return np.split(to, kernels.run_begins(to, of)[1:])


def test_layer_indices(page_kernels: kernels.PageKernels) -> None:
    chance = torch.Generator().manual_seed(1)
    table = torch.randint(0, 1000, (3, 50), generator=chance, dtype=torch.int32)
    req_to_token = torch.randint(0, 50, (6, 1200), generator=chance, dtype=torch.int32) * 4
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    indptr = torch.tensor([0, 260, 260, 277], dtype=torch.int32)
    wanted = torch.zeros((3, 300), dtype=torch.int32)
    kernels.TorchKernels().layer_indices(wanted, table, req_to_token, rows, indptr, 4)
    found = torch.zeros((3, 300), dtype=torch.int32, device="cuda")
    page_kernels.layer_indices(
        found, table.cuda(), req_to_token.cuda(), rows.cuda(), indptr.cuda(), 4
    )
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("ring", [2, 12])
def test_what_a_step_reads_is_what_was_written(ring: int) -> None:
    """Requests that go to the host, pass through the ring in parts, and come back."""
    store = ResidencyStore(LAYOUT, Capacity(40 + ring, ring, 200, 60), "cuda")
    chance = np.random.default_rng(ring)
    size, layers = LAYOUT.page_size, LAYOUT.layers
    held = {number: np.arange(5 * number + 1, 5 * number + 6) for number in range(4)}
    content: dict[int, torch.Tensor] = {}  # by layer and request, on the device
    for number, pages in held.items():
        _run(
            store, _prefill(pages, size), lambda layer, n=number: _new(content, layer, n, 5 * size)
        )
    for _ in range(6):
        for pages in held.values():
            store.place(pages, chance.random(layers) < 0.5)
        step = Step(reads=list(held.values()), read_tokens=[5 * size] * len(held), slots=NO_PAGES)
        store.begin(step)
        for layer in range(layers):
            store.write(layer, *torch.empty(2, 0, HEADS, 128, dtype=LAYOUT.dtype, device="cuda"))
            keys: dict[int, list[torch.Tensor]] = {number: [] for number in held}
            values: dict[int, list[torch.Tensor]] = {number: [] for number in held}
            for part in store.passes(layer):
                for number, ids in zip(held, part.pages, strict=True):
                    keys[number].append(part.k[ids.long()].flatten(1))
                    values[number].append(part.v[ids.long()].flatten(1))
            for number in held:
                wanted = content[layer * 10 + number].view(5, -1)
                assert _sorted(torch.cat(keys[number])) == _sorted(wanted)
                assert _sorted(torch.cat(values[number])) == _sorted(-wanted)
        store.end()
    store.quiesce()
    assert store.check() == []
    assert store.engine.h2d.bytes and store.engine.d2h.bytes
    store.close()


def test_a_long_prompt_holds_two_layers_of_what_goes_to_the_host() -> None:
    """However far ahead of the device this process is: memory that a copy still reads is given to
    nobody else, and no layer's is held for longer than the copy of the next but one."""
    layout = replace(LAYOUT, layers=16)
    pages = np.arange(1, 257)
    store = ResidencyStore(layout, Capacity(66, 2, 16 * 256, 260), "cuda")
    store.place(pages, np.ones(16, dtype=bool))
    new_tokens = len(pages) * layout.page_size
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def number(layer: int) -> torch.Tensor:
        full = (new_tokens, HEADS, 128)
        return torch.full(full, layer + 1, dtype=layout.dtype, device="cuda")

    _run(store, _prefill(pages, layout.page_size), number)
    store.quiesce()
    of_a_layer = len(pages) * layout.page_bytes
    assert torch.cuda.max_memory_allocated() - before < 4 * of_a_layer
    for layer in range(16):
        there = torch.from_numpy(store.table.host_page[layer, pages].astype(np.int64))
        assert (store.host.k[there] == layer + 1).all()
        assert (store.host.v[there] == -layer - 1).all()
    store.close()


def _sorted(pages: torch.Tensor) -> list[list[float]]:
    """Parts of a layer come in an order of their own."""
    return sorted(pages.float().cpu().tolist())


def _new(content: dict[int, torch.Tensor], layer: int, number: int, rows: int) -> torch.Tensor:
    new = torch.randn(rows, HEADS, 128, device="cuda").to(LAYOUT.dtype)
    content[layer * 10 + number] = new
    return new


def _prefill(pages: np.ndarray, size: int) -> Step:
    return Step(
        reads=[NO_PAGES],
        read_tokens=[0],
        slots=(pages[:, None] * size + np.arange(size)).reshape(-1),
        new_full=pages,
        new_full_rows=size * np.arange(len(pages)),
    )


def _run(store: ResidencyStore, step: Step, new: object) -> None:
    store.begin(step)
    for layer in range(store.layout.layers):
        k = new(layer)  # type: ignore[operator]
        store.write(layer, k, -k)
        for _ in store.passes(layer):
            pass
    store.end()
