"""Host memory for a GPU, whose part is played by a function."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from orbitflow_sglang.residency import ResidencyError, host_memory
from orbitflow_sglang.residency.host_memory import local_cores, pinned

pytestmark = pytest.mark.unit


def must_not_be(address: int) -> None:
    raise AssertionError("it was never pinned")


def test_all_of_it_is_pinned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 1 << 20)
    calls: list[tuple[int, int]] = []

    def register(address: int, nbytes: int) -> int:
        calls.append((address, nbytes))
        return 0

    unpinned: list[int] = []
    tensor = pinned((3, 1000, 257), torch.float32, register, unpinned.append, set())
    assert tensor.shape == (3, 1000, 257) and tensor.is_contiguous()
    nbytes = tensor.numel() * 4
    assert calls == [(tensor.data_ptr(), nbytes)] and tensor.data_ptr() % mmap.PAGESIZE == 0
    assert float(tensor.abs().sum()) == 0.0, "every page was touched"
    tensor.fill_(2.0)
    assert float(tensor.sum()) == 2.0 * tensor.numel()
    view, address = tensor[1], tensor.data_ptr()
    del tensor
    assert unpinned == [] and float(view[0, 0]) == 2.0
    del view
    assert unpinned == [address], "CUDA refuses what gets the address next, if it is pinned"


def test_a_limit_of_the_system_is_named_with_the_way_out() -> None:
    with pytest.raises(ResidencyError, match=r"CUDA error 2 .*--orbitflow-host-memory-gb.*memlock"):
        pinned((8, 8), torch.bfloat16, lambda address, nbytes: 2, must_not_be, set())


def test_nothing_needs_no_memory() -> None:
    assert pinned((0, 16, 2), torch.float32, lambda *_: 1, must_not_be, set()).numel() == 0


def test_large_stores_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory, "SAID_FROM_BYTES", 1)
    with caplog.at_level(logging.INFO):
        pinned((1024,), torch.float32, lambda *_: 0, lambda _: 0, set())
    assert "takes host memory: 0 of 0 GB" in caplog.text


def test_the_threads_that_touch_it_run_on_the_cores_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = {min(os.sched_getaffinity(0))}
    seen: list[set[int]] = []

    def touch(chunk: np.ndarray) -> int:
        seen.append(os.sched_getaffinity(0))
        return chunk.nbytes

    monkeypatch.setattr(host_memory, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(host_memory, "_touch_chunk", touch)
    before = os.sched_getaffinity(0)
    pinned((2048,), torch.float32, lambda *_: 0, lambda _: 0, cores)
    assert seen == [cores, cores] and os.sched_getaffinity(0) == before


def test_cores_are_read_from_the_bus(tmp_path: Path) -> None:
    (tmp_path / "0000:17:00.0").mkdir()
    (tmp_path / "0000:17:00.0" / "local_cpulist").write_text("0-1,900-910,1\n")
    wanted = {0, 1} & os.sched_getaffinity(0)
    assert local_cores("0000:17:00.0", tmp_path) == wanted
    assert local_cores("0000:99:00.0", tmp_path) == set()
    assert local_cores(None, tmp_path) == set()
