"""A machine small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Sequence

from eval.sim.engine import Setup, Simulation
from eval.sim.hardware import Hardware, Linear
from eval.sim.result import check
from eval.workload.requests import TraceRequest
from orbitflow_sglang.slo import SLO

LAYERS, PAGE = 4, 4
TOKEN_BYTES = 4 * 1000  # of all layers: a page of one layer has 4,000 bytes


def machine(
    arena_tokens: int = 64, page_ms: float = 1.0, host_tokens: int = 4096, **changes: object
) -> Hardware:
    """4 layers, pages of 4 tokens. A decode step takes 10 ms, a prompt token 1 ms, a page of
    one layer ``page_ms`` on the link."""
    rate = TOKEN_BYTES * PAGE / LAYERS / (page_ms * 1e-3) / 1e9
    values = {
        "name": "by hand",
        "about": "",
        "source": "",
        "measured": False,
        "layers": LAYERS,
        "page_size": PAGE,
        "kv_bytes_per_token": TOKEN_BYTES,
        "arena_gb": arena_tokens * TOKEN_BYTES / 1e9,
        "host_gb": host_tokens * TOKEN_BYTES / 1e9,
        "h2d_gb_per_s": rate,
        "d2h_gb_per_s": rate,
        "chunk_tokens": 64,
        "max_running": 8,
        "ttft_slo_s": 1.0,
        "costs": Linear(constant_s=0.010, per_token_s=0.0, prefill_per_token_s=0.001),
    }
    return Hardware(**(values | changes))  # type: ignore[arg-type]


def requests(*lengths: tuple[float, int, int], slo: SLO | None = None) -> list[TraceRequest]:
    """Requests by (arrival in seconds, input tokens, output tokens)."""
    return [
        TraceRequest(arrival, inputs, outputs, f"r{number}", slo or SLO(1.0, 0.02))
        for number, (arrival, inputs, outputs) in enumerate(lengths)
    ]


def serve(
    policy: str, trace: Sequence[TraceRequest], hardware: Hardware, **setup: object
) -> Simulation:
    """A finished run whose books balance. Output lengths are known."""
    options = {"known_lengths": True, "planner_latency_s": 0.0} | setup
    simulation = Simulation(Setup(hardware, **options), policy, trace)  # type: ignore[arg-type]
    simulation.run()
    check(simulation)
    return simulation
