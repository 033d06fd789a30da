"""Which transfer engine an arena gets."""

from __future__ import annotations

from orbitflow_sglang.caching import cache_folder
from orbitflow_sglang.residency import ResidencyError
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.transfer import CPUTransferEngine, TransferEngine


def engine_for(arena: Arena, host: HostStore, link_bytes_per_s: float | None) -> TransferEngine:
    """The engine for the device on which ``arena`` lies.

    Raises ``ResidencyError`` where a link is to be emulated beside a real one.
    """
    device = arena.k.device
    if device.type == "cpu":
        return CPUTransferEngine(arena, host, link_bytes_per_s)
    if link_bytes_per_s is not None:
        raise ResidencyError("a link can only be emulated on the CPU")
    from orbitflow_sglang.residency import kernels, streams

    copier = streams.CUDACopier(kernels.load(cache_folder() / "kernels"), device, float("inf"))
    if host.num_pages:
        copier.least_run = streams.measured_least_run(copier, arena, host)
    return streams.StreamTransferEngine(arena, host, streams.CUDAStreams(device), copier)
