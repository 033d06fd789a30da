"""Who is compared: a name, and the server flags that it stands for.

    stock                 SGLang as it is; on the CPU with OrbitFlow's attention backend
    stock-torch-native    SGLang as it is, on the CPU with its own attention backend, which
                          needs --real-compute
    stock-eager           SGLang on a GPU without CUDA graphs and overlap, as OrbitFlow runs there
    hicache               SGLang on a GPU with its hierarchical cache, in as much host memory
    POLICY[:no-RULE...]   OrbitFlow with that policy: retract, swap+order, static:2, orbitflow
    POLICY...@graphs      the same on a GPU, decoding from CUDA graphs in pieces
    POLICY...@overlapped  that, and with the overlap scheduler
    POLICY...@paced       any of these, its requests asking for paced delivery

All have the same device KV, page size, prefill chunk, bound on running requests and, but for
``stock-torch-native``, attention kernels. On the CPU, host and device are joined by an emulated
link, and layers take the time of an emulated device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.bench.measure import threads_env
from eval.server import GPU_ENV, GPU_START_S, Server, stock_args
from eval.tiny_model import TinyModel, build
from orbitflow_sglang.control.policies import find_policy

NATIVE = "stock-torch-native"
HICACHE = "hicache"
# Flags of those that are no policy, by device.
NO_GRAPHS = (
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
)
EAGER = (*NO_GRAPHS, "--disable-overlap-schedule")
STOCK: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "stock": ("--attention-backend", "orbitflow_torch"),
        NATIVE: ("--attention-backend", "torch_native"),
    },
    "cuda": {
        "stock": ("--attention-backend", "flashinfer"),
        "stock-eager": ("--attention-backend", "flashinfer", *EAGER),
        HICACHE: ("--attention-backend", "flashinfer", "--enable-hierarchical-cache"),
    },
}
# OrbitFlow's own, on a GPU.
WAYS = {"@graphs": ("--cuda-graph-backend-decode", "breakable")}
WAYS["@overlapped"] = (*WAYS["@graphs"], "--orbitflow-overlap-schedule")
OURS = {"cpu": "orbitflow_torch", "cuda": "orbitflow_flashinfer"}
PACED = "@paced"
DEFAULT = (
    *("stock", "retract", "retract+order", "swap+order", "paper"),
    *("static:1", "static:2", "static:3", "orbitflow"),
    # Among unpaced requests it takes no turns.
    *("time-sliced-swap@paced", "orbitflow@paced"),
)
KV_BYTES = {"cpu": 4, "cuda": 2}  # float32, bfloat16
# Of the shape of an 8B model, with a smaller MLP; its weights are made up by the server.
CPU_MODEL = TinyModel(layers=8, hidden_size=128, heads=2, kv_heads=1, head_dim=32)
GPU_MODEL = TinyModel("llama", 32, 4096, heads=32, kv_heads=8, head_dim=128, context=131_072)


@dataclass(frozen=True)
class Setup:
    """What all contestants share; ``eval.live.compare`` says why these values."""

    device: str = "cpu"
    arena_tokens: int = 4096
    link_gb_per_s: float | None = 0.047  # emulated, 10^9 bytes/s each direction; None: a real one
    # Emulated too, milliseconds of a layer: see ``engine.emulated_compute``. None: as it comes.
    compute_ms: tuple[float, float, float, float] | None = (2.4, 0.09, 0.3, 54.0)
    host_memory_gb: float = 0.0625
    page_size: int = 16
    prefill_chunk: int = 512
    max_running: int = 32
    layers: int = CPU_MODEL.layers
    threads: int | None = 1
    server_args: tuple[str, ...] = ()  # given last, to every contestant

    @property
    def model(self) -> TinyModel:
        return replace(CPU_MODEL if self.device == "cpu" else GPU_MODEL, layers=self.layers)

    @property
    def arena_bytes(self) -> int:
        model = self.model
        token = 2 * model.layers * model.kv_heads * model.head_dim * KV_BYTES[self.device]
        return self.arena_tokens * token

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "model": asdict(self.model),
            "server_args": list(self.server_args),
        }


# A capped KV budget: on a whole card little would be hidden behind compute (``docs/gpu.md``).
ON_GPU = Setup(
    device="cuda", arena_tokens=65_536, link_gb_per_s=None, host_memory_gb=64.0, page_size=64,
    prefill_chunk=2048, max_running=64, layers=GPU_MODEL.layers, threads=None, compute_ms=None,
)  # fmt: skip


def check(name: str, setup: Setup) -> None:
    """Raise ``ValueError`` when there is no such contestant in this setup."""
    stock = STOCK[setup.device]
    if name == NATIVE and setup.compute_ms is not None:
        raise ValueError(f"the compute of {name} cannot be emulated: give --real-compute")
    if name == HICACHE and name in stock and not _hicache_gb(setup):
        raise ValueError(f"{name} takes whole GB: give --host-memory-gb a whole number, at least 1")
    if name in stock:
        return
    if name.startswith(("stock", "hicache")):
        raise ValueError(f"unknown contestant {name!r}: there are {', '.join(stock)} and policies")
    policy, way = policy_of(name)
    if way and setup.device == "cpu":
        raise ValueError(f"{name}: there are no CUDA graphs on a CPU")
    find_policy(policy)


def policy_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The policy of a contestant with OrbitFlow, and further flags."""
    name = name.removesuffix(PACED)
    for suffix, way in WAYS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), way
    return name, ()


def _hicache_gb(setup: Setup) -> int:
    """As much host memory as ours gets, 10^9 bytes in both; 0: not to be had."""
    return int(setup.host_memory_gb) if setup.host_memory_gb.is_integer() else 0


def is_paced(name: str) -> bool:
    return name.endswith(PACED)


def flags(name: str, setup: Setup) -> list[str]:
    """Server flags of a contestant, without those of every server on that device."""
    check(name, setup)
    arena = str(setup.arena_tokens)
    common = [
        *STOCK[setup.device].get(name, ("--attention-backend", OURS[setup.device])),
        *("--page-size", str(setup.page_size)),
        *("--chunked-prefill-size", str(setup.prefill_chunk)),
        *("--max-running-requests", str(setup.max_running)),
    ]
    if name in STOCK[setup.device]:
        own = ["--max-total-tokens", arena]
        if name == HICACHE:  # by itself it would take twice the arena
            own += ["--hicache-size", str(_hicache_gb(setup))]
    else:
        policy, way = policy_of(name)
        own = [
            *("--enable-orbitflow", "--orbitflow-policy", policy, *way),
            *("--orbitflow-arena-tokens", arena),
            *("--orbitflow-host-memory-gb", str(setup.host_memory_gb)),
        ]
        if setup.link_gb_per_s is not None:
            own += ["--orbitflow-emulated-link-gb-per-s", str(setup.link_gb_per_s)]
    return [*common, *own, *setup.server_args]


def server(name: str, setup: Setup, log: Path | None = None) -> Server:
    """The contestant's server, not yet started."""
    if setup.device == "cpu":
        args: Sequence[str] = stock_args(build(setup.model), *flags(name, setup))
        return Server(args, env=threads_env(setup.threads) | _compute_env(setup), log=log)
    args = [*dummy_args(setup.model), *flags(name, setup)]
    return Server(args, base_env=GPU_ENV, log=log, start_timeout_s=GPU_START_S)


def dummy_args(model: TinyModel) -> list[str]:
    """For a server on a GPU that makes up the weights."""
    path = str(build(model, weights=False))
    return [*("--model-path", path, "--load-format", "dummy", "--dtype", "bfloat16"),
            "--enable-metrics"]  # fmt: skip


def _compute_env(setup: Setup) -> dict[str, str]:
    if setup.compute_ms is None:
        return {}
    return {"ORBITFLOW_EMULATED_COMPUTE": ",".join(map(str, setup.compute_ms))}
