"""Who is compared: a name, and the server flags that it stands for.

    stock                 SGLang as it is, with OrbitFlow's attention backend
    stock-torch-native    SGLang as it is, with its own attention backend
    POLICY[:no-RULE...]   OrbitFlow with that policy: retract, swap+order, static:2, orbitflow
    POLICY...@paced       the same, its requests asking for paced delivery

All have the same device KV, page size, prefill chunk, bound on running requests and, but for
``stock-torch-native``, attention backend. What lies on the host crosses an emulated link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.bench.measure import threads_env
from eval.server import Server, stock_args
from eval.tiny_model import TinyModel, build
from orbitflow_sglang.control.policies import find_policy

STOCK = {"stock": "orbitflow_torch", "stock-torch-native": "torch_native"}
PACED = "@paced"
DEFAULT = (
    *("stock", "retract", "retract+order", "swap+order", "time-sliced-swap", "paper"),
    *("static:1", "static:2", "static:3", "orbitflow"),
)
KV_BYTES = 4  # float32


@dataclass(frozen=True)
class Setup:
    """What all contestants share; ``eval.live.compare`` says why these values."""

    arena_tokens: int = 4096
    link_gb_per_s: float = 0.4  # 10^9 bytes/s in each direction
    host_memory_gb: float = 0.25
    page_size: int = 16
    prefill_chunk: int = 512
    max_running: int = 32
    layers: int = 8
    threads: int = 1
    server_args: tuple[str, ...] = ()  # given last, to every contestant

    @property
    def model(self) -> TinyModel:
        return TinyModel(layers=self.layers)

    @property
    def arena_bytes(self) -> int:
        model = self.model
        token = 2 * model.layers * model.kv_heads * model.head_dim * KV_BYTES
        return self.arena_tokens * token

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"server_args": list(self.server_args)}


def check(name: str) -> None:
    """Raise ``ValueError`` when there is no such contestant."""
    if name in STOCK:
        return
    if name.startswith("stock"):
        raise ValueError(f"unknown contestant {name!r}: there are {', '.join(STOCK)} and policies")
    find_policy(name.removesuffix(PACED))


def is_paced(name: str) -> bool:
    return name.endswith(PACED)


def flags(name: str, setup: Setup) -> list[str]:
    """Server flags of a contestant, without those of every server on CPU."""
    check(name)
    arena = str(setup.arena_tokens)
    common = [
        *("--attention-backend", STOCK.get(name, "orbitflow_torch")),
        *("--page-size", str(setup.page_size)),
        *("--chunked-prefill-size", str(setup.prefill_chunk)),
        *("--max-running-requests", str(setup.max_running)),
    ]
    if name in STOCK:
        own = ["--max-total-tokens", arena]
    else:
        own = [
            *("--enable-orbitflow", "--orbitflow-policy", name.removesuffix(PACED)),
            *("--orbitflow-arena-tokens", arena),
            *("--orbitflow-host-memory-gb", str(setup.host_memory_gb)),
            *("--orbitflow-emulated-link-gb-per-s", str(setup.link_gb_per_s)),
        ]
    return [*common, *own, *setup.server_args]


def server(name: str, setup: Setup, log: Path | None = None) -> Server:
    """The contestant's server, not yet started."""
    args: Sequence[str] = stock_args(build(setup.model), *flags(name, setup))
    return Server(args, env=threads_env(setup.threads), log=log)
