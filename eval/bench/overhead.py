"""``make bench-overhead``: what OrbitFlow costs while memory is not under pressure.

Decode throughput of a server with OrbitFlow and its controller, which has nothing to decide,
against stock SGLang with the same attention backend, page size and capacity. A pair is one server
of each kind, started in random order. They decode the same batches by turns, the other one's
processes stopped, so that a machine that slows down slows both; its ratio is the median over these
batches. The result is the median ratio of the pairs with the least and the most: a process may be
10 % faster than another of the same program for as long as both live.

With --gpu a model of 8B shape on an NVIDIA GPU, where stock SGLang has full CUDA graphs and the
overlap scheduler (``stock``) or neither (``stock-eager``), and OrbitFlow graphs in pieces with the
overlap scheduler (``orbitflow-overlapped``) or without (``orbitflow-graphs``), or neither. There
one server is alive at a time, as each takes the memory.

With --waiting N, what it costs that N requests wait for a place meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

from eval.bench.link import gpu, needs_gpu
from eval.bench.measure import (
    Batch,
    Spread,
    random_prompts,
    results_folder,
    threads_env,
    write_result,
)
from eval.client import Client, RequestFailed
from eval.live import contestants
from eval.server import Server, ServerFailed, stock_args
from eval.tiny_model import TinyModel, build

AIM = 0.98
COMMON = (
    *("--attention-backend", "orbitflow_torch", "--page-size", "16"),
    *("--max-total-tokens", "8192"),
)
KINDS = {
    "stock": COMMON,
    "orbitflow": (*COMMON, "--enable-orbitflow", "--orbitflow-policy", "orbitflow"),
}
# On a GPU: who of ``eval.live.contestants``, and further flags.
GPU_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "stock": ("stock", ("--cuda-graph-backend-prefill", "disabled")),  # steps that decode count
    "stock-eager": ("stock-eager", ()),
    "orbitflow": ("orbitflow", ()),
    "orbitflow-graphs": ("orbitflow@graphs", ()),
    "orbitflow-overlapped": ("orbitflow@overlapped", ()),
}
Starts = dict[str, Callable[[], Server]]


@dataclass(frozen=True)
class Run:
    """One server: decode throughput of each repetition, in tokens per second."""

    pair: int
    kind: str
    tokens_per_s: tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    places = ("--max-running-requests", str(options.batch)) if options.waiting else ()
    starts = gpu_servers(places) if options.gpu else cpu_servers(options, places)
    kinds = sorted({"stock", *options.kinds} if options.kinds else starts)
    about = _about(options, kinds)
    batch = Batch(options.batch, options.context, options.tokens)
    runs: list[Run] = []
    failed = []
    for pair, order in enumerate(orders(kinds, options.pairs, options.seed), start=1):
        for together in [[kind] for kind in order] if options.gpu else [order]:
            servers = {kind: starts[kind] for kind in together}
            try:
                runs += measure(servers, pair, batch, options.repetitions, options.waiting)
            except ServerFailed as error:
                failed.append(f"pair {pair} {' and '.join(together)}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            for run in runs[-len(together) :]:
                rates = " ".join(f"{rate:7.1f}" for rate in run.tokens_per_s)
                print(f"pair {pair}  {run.kind:<16}  {rates}  tokens/s", flush=True)
            # Each time: on a machine that is lent, what is not written yet may be lost.
            write_result(options.output, argv, about | _result(runs, kinds) | {"failed": failed})
    print()
    for kind in kinds:
        if per_pair := ratios(runs, kind) if kind != "stock" else []:
            each = " ".join(f"{ratio:.3f}" for ratio in per_pair)
            print(f"{kind} / stock, per pair: {each}; median {Spread.of(per_pair)}")
    print(f"aim at least {AIM}")
    return 1 if failed else 0


def _about(options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, Any]:
    """What is measured, and on what."""
    model: dict[str, Any] = {"layers": options.layers}
    if options.gpu:
        model = {"model": asdict(contestants.GPU_MODEL)}
    found = {
        "aim": AIM,
        "workload": asdict(Batch(options.batch, options.context, options.tokens))
        | model
        | {"repetitions": options.repetitions, "waiting": options.waiting},
        "threads": None if options.gpu else options.threads or "all cores",
        "server_args": {
            kind: gpu_flags(kind) if options.gpu else list(KINDS[kind]) for kind in kinds
        },
    }
    return found | ({"gpu": gpu()} if options.gpu else {})


def _result(runs: Sequence[Run], kinds: Sequence[str]) -> dict[str, Any]:
    found = {kind: ratios(runs, kind) for kind in kinds if kind != "stock"}
    return {
        "ratio": {kind: asdict(Spread.of(pairs)) for kind, pairs in found.items() if pairs},
        "ratios": {kind: [round(one, 4) for one in pairs] for kind, pairs in found.items()},
        "runs": [_rounded(run) for run in runs],
    }


def cpu_servers(options: argparse.Namespace, more: tuple[str, ...]) -> Starts:
    model, env = build(TinyModel(layers=options.layers)), threads_env(options.threads)
    return {
        kind: partial(Server, stock_args(model, *args, *more), env=env)
        for kind, args in KINDS.items()
    }


def gpu_servers(more: tuple[str, ...]) -> Starts:
    return {
        kind: partial(contestants.server, name, _setup((*flags, *more)))
        for kind, (name, flags) in GPU_KINDS.items()
    }


def gpu_flags(kind: str) -> list[str]:
    name, flags = GPU_KINDS[kind]
    return contestants.flags(name, _setup(flags))


def _setup(flags: tuple[str, ...]) -> contestants.Setup:
    return replace(contestants.ON_GPU, host_memory_gb=16.0, server_args=flags)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.overhead", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 pair, 2 repetitions")
    parser.add_argument("--gpu", action="store_true", help="8B shape on an NVIDIA GPU, no --layers")
    parser.add_argument("--pairs", type=int, help="(5; on a GPU 3)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="beside stock (all there are)")
    parser.add_argument("--repetitions", type=int, help="measured, for each server (5)")
    parser.add_argument("--layers", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="to generate (%(default)s)")
    parser.add_argument("--waiting", type=int, default=0, help="requests (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch (one for each core)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (%(default)s)")
    parser.add_argument("--output", type=Path, help="(eval/results/{cpu,GPU}/overhead.json)")
    options = parser.parse_args(argv)
    if options.gpu:
        needs_gpu(parser)
    options.pairs = options.pairs or (1 if options.quick else 3 if options.gpu else 5)
    options.repetitions = options.repetitions or (2 if options.quick else 5)
    known = GPU_KINDS if options.gpu else KINDS
    if unknown := set(options.kinds or ()) - known.keys():
        parser.error(f"--kinds: no {', '.join(sorted(unknown))} among {', '.join(known)}")
    folder = results_folder(gpu=options.gpu, quick=options.quick)
    name = f"overhead-{options.waiting}-waiting.json" if options.waiting else "overhead.json"
    options.output = options.output or folder / name
    return options


def orders(kinds: Sequence[str], pairs: int, seed: int) -> list[list[str]]:
    """For each pair, in which order the kinds of server are measured."""
    chance = random.Random(seed)
    return [chance.sample(kinds, len(kinds)) for _ in range(pairs)]


class Crowd:
    """Requests that wait while a batch decodes, and are given up when it has ended."""

    def __init__(self, client: Client, count: int, batch: Batch) -> None:
        self._client, self._count, self._batch = client, count, batch
        self._waits: threading.Thread | None = None
        self._since_s = -math.inf

    def since_s(self) -> float:
        """From when on all of them waited; raises ``ValueError`` if they never did."""
        if self._count and math.isinf(self._since_s):
            raise ValueError("the batch ended before all others waited: ask for more --tokens")
        return self._since_s

    def __call__(self, tokens: int) -> None:
        """Every request of the batch has so many tokens."""
        if self._count and self._waits is None:
            self._waits = threading.Thread(target=self._wait)
            self._waits.start()
            threading.Thread(target=self._watch).start()
        elif self._waits is not None and tokens == self._batch.output_tokens:
            self._client.abort_all()
            self._waits.join()
            self._waits = None

    def _watch(self) -> None:
        while (waits := self._waits) is not None and waits.is_alive():
            if sum(load["num_waiting_reqs"] for load in self._client.loads()) == self._count:
                self._since_s = time.perf_counter()
                return
            time.sleep(0.2)

    def _wait(self) -> None:
        prompts = random_prompts(self._count, self._batch.prompt_tokens, seed=0)
        sampling = {"max_new_tokens": self._batch.output_tokens, "ignore_eos": True}
        body = {"input_ids": prompts, "sampling_params": sampling}
        with contextlib.suppress(RequestFailed):  # as they are given up
            self._client.post("/generate", body)


def measure(
    starts: Starts, pair: int, batch: Batch, repetitions: int, waiting: int = 0
) -> list[Run]:
    """Starts a server of each kind, which take turns; the first batch of each warms it up."""
    rates: dict[str, list[float]] = {kind: [] for kind in starts}
    with contextlib.ExitStack() as alive:
        servers: dict[str, Server] = {}
        for kind, start in starts.items():
            with suspended(servers.values()):
                servers[kind] = alive.enter_context(start())
        for repetition in range(repetitions + 1):
            for kind in sorted(servers, reverse=repetition % 2 == 1):
                server = servers[kind]
                crowd = Crowd(server, waiting, batch)
                with suspended(one for one in servers.values() if one is not server):
                    seed = 1000 * pair + repetition
                    window = batch.measure(server, seed, crowd, crowd.since_s)
                rates[kind].append(window.tokens_per_s)
    return [Run(pair, kind, tuple(found[1:])) for kind, found in rates.items()]


@contextlib.contextmanager
def suspended(servers: Iterable[Server]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server.suspended())
        yield


def ratios(runs: Sequence[Run], kind: str) -> list[float]:
    """For each pair that has both, the throughput of that kind as a share of stock's: the median
    over the batches."""
    found = {(run.pair, run.kind): run.tokens_per_s for run in runs}
    pairs = sorted(pair for pair, one in found if one == kind and (pair, "stock") in found)
    return [
        statistics.median(map(truediv, found[pair, kind], found[pair, "stock"])) for pair in pairs
    ]


def _rounded(run: Run) -> dict[str, Any]:
    return asdict(run) | {"tokens_per_s": [round(rate, 2) for rate in run.tokens_per_s]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
