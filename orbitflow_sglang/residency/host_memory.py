"""Host memory that a GPU's copy engines can reach: touched chunk by chunk, near that GPU.

Getting the memory is what takes time in a large store, a second for a gigabyte and core, so it
goes on in chunks and says how far it is. Memory belongs to the NUMA node of the core that touches
it first: it is touched by threads that run where the GPU is attached. It is pinned as a whole, for
a copy must not reach from one pinned range into another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbitflow_sglang.residency import ResidencyError

logger = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 30
THREADS = 8  # that touch it
SAID_FROM_BYTES = 8 << 30  # smaller stores are pinned without a word
PCI = Path("/sys/bus/pci/devices")
Register = Callable[[int, int], int]  # address, bytes -> CUDA error
Unregister = Callable[[int], object]  # address


class _PinnedMemory(mmap.mmap):
    """Is unpinned before it is unmapped: CUDA would else refuse whatever gets the address next."""

    unpin: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.unpin is not None:
            self.unpin()


def pinned_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised host memory that ``device`` can copy from and to.

    Raises ``ResidencyError`` where the system does not let so much be pinned. It is given back
    with the last tensor that is a view of it.
    """
    if device.index is None:  # of this thread; it may be another one that unpins
        device = torch.device("cuda", torch.cuda.current_device())
    register = functools.partial(_register, device)
    unregister = functools.partial(_unregister, device)
    return pinned(shape, dtype, register, unregister, local_cores(_bus_of(device)))


def pinned(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    register: Register,
    unregister: Unregister,
    cores: set[int],
) -> torch.Tensor:
    """The same with what pins and unpins, each called once, and whose cores touch it; ``cores``
    empty: any."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    # Shared, as it is by default: behind a fork private pages would be copied on write, and the
    # pinned ones be left to the child. Huge pages where the system gives them to such memory.
    memory = _PinnedMemory(-1, nbytes)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = np.frombuffer(memory, dtype=np.uint8)
    _touch(flat, cores)
    _pin(flat, register)
    memory.unpin = functools.partial(unregister, flat.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def local_cores(bus: str | None, devices: Path = PCI) -> set[int]:
    """The cores that a PCI device is attached to, of those this process may use; empty: unknown."""
    if bus is None:
        return set()
    try:
        text = (devices / bus / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found & os.sched_getaffinity(0)


def _touch(flat: np.ndarray, cores: set[int]) -> None:
    chunks = [flat[begin : begin + CHUNK_BYTES] for begin in range(0, flat.nbytes, CHUNK_BYTES)]
    done = 0
    with ThreadPoolExecutor(
        min(THREADS, len(chunks)), "orbitflow-touch", initializer=_stay_on, initargs=(cores,)
    ) as pool:
        for nbytes in pool.map(_touch_chunk, chunks):
            done += nbytes
            if flat.nbytes >= SAID_FROM_BYTES:
                logger.info(
                    "OrbitFlow takes host memory: %.0f of %.0f GB", done / 1e9, flat.nbytes / 1e9
                )


def _stay_on(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread


def _touch_chunk(chunk: np.ndarray) -> int:
    chunk[:: mmap.PAGESIZE] = 0
    return chunk.nbytes


def _pin(flat: np.ndarray, register: Register) -> None:
    if (error := register(flat.ctypes.data, flat.nbytes)) != 0:
        raise ResidencyError(
            f"CUDA error {error} when pinning {flat.nbytes / 1e9:.0f} GB of host memory: give less "
            "with --orbitflow-host-memory-gb, or raise the limit on locked memory (ulimit -l, "
            "docker run --ulimit memlock=-1)"
        )


def _register(device: torch.device, address: int, nbytes: int) -> int:
    portable, mapped = 1, 2  # for every GPU of the process, and for kernels too
    cuda: Any = torch.cuda
    with cuda.device(device):  # of this thread, which would else begin to use the first one
        return int(cuda.cudart().cudaHostRegister(address, nbytes, portable | mapped))


def _unregister(device: torch.device, address: int) -> None:
    cuda: Any = torch.cuda
    with cuda.device(device):
        cuda.synchronize()  # nothing copies from or to it any more
        if (error := int(cuda.cudart().cudaHostUnregister(address))) != 0:
            logger.warning("CUDA error %d when unpinning host memory", error)


def _bus_of(device: torch.device) -> str | None:
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        return (
            f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
            f"{properties.pci_device_id:02x}.0"
        )
    except AttributeError:  # an older PyTorch
        return None
