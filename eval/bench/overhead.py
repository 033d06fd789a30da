"""``make bench-overhead``: what OrbitFlow costs while memory is not under pressure.

Decode throughput of a server with OrbitFlow and its controller, which has nothing to decide,
against stock SGLang with the same attention backend, page size and capacity. One server is
alive at a time. A pair is one server of each kind in random order; its ratio compares the
medians of their repetitions. The result is the median ratio of the pairs with the least and
the most.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.bench.measure import QUICK_RESULTS, RESULTS, Batch, Spread, threads_env, write_result
from eval.server import Server, stock_args
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


@dataclass(frozen=True)
class Run:
    """One server: decode throughput of each repetition, in tokens per second."""

    pair: int
    kind: str
    tokens_per_s: tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    model = build(TinyModel(layers=options.layers))
    batch = Batch(options.batch, options.context, options.tokens)
    runs = []
    for pair, order in enumerate(orders(options.pairs, options.seed), start=1):
        for kind in order:
            env = threads_env(options.threads)
            runs.append(measure(model, pair, kind, batch, options.repetitions, env))
            rates = " ".join(f"{rate:7.1f}" for rate in runs[-1].tokens_per_s)
            print(f"pair {pair}  {kind:<9}  {rates}  tokens/s", flush=True)
    per_pair = ratios(runs)
    spread = Spread.of(per_pair)
    print("\norbitflow / stock, per pair:", " ".join(f"{ratio:.3f}" for ratio in per_pair))
    print(f"median {spread}; aim at least {AIM}")
    result = {
        "aim": AIM,
        "ratio": asdict(spread),
        "ratios": [round(ratio, 4) for ratio in per_pair],
        "workload": asdict(batch) | {"layers": options.layers, "repetitions": options.repetitions},
        "threads": options.threads or "all cores",
        "server_args": {kind: list(args) for kind, args in KINDS.items()},
        "runs": [_rounded(run) for run in runs],
    }
    write_result(options.output, argv, result)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.overhead", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 pair, 2 repetitions")
    parser.add_argument("--pairs", type=int, help="(3)")
    parser.add_argument("--repetitions", type=int, help="measured, for each server (5)")
    parser.add_argument("--layers", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="to generate (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch (one for each core)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (%(default)s)")
    parser.add_argument("--output", type=Path, help="(eval/results/cpu/overhead.json)")
    options = parser.parse_args(argv)
    options.pairs = options.pairs or (1 if options.quick else 3)
    options.repetitions = options.repetitions or (2 if options.quick else 5)
    folder = QUICK_RESULTS if options.quick else RESULTS
    options.output = options.output or folder / "overhead.json"
    return options


def orders(pairs: int, seed: int) -> list[list[str]]:
    """For each pair, in which order the two kinds of server are measured."""
    chance = random.Random(seed)
    return [chance.sample(sorted(KINDS), len(KINDS)) for _ in range(pairs)]


def measure(
    model: Path, pair: int, kind: str, batch: Batch, repetitions: int, env: Mapping[str, str]
) -> Run:
    """Starts a server; the first batch warms it up. Both kinds get the same prompts."""
    rates = []
    with Server(stock_args(model, *KINDS[kind]), env=env) as server:
        for repetition in range(repetitions + 1):
            seed = 1000 * pair + repetition
            rates.append(batch.measure(server, seed).tokens_per_s)
    return Run(pair, kind, tuple(rates[1:]))


def ratios(runs: Sequence[Run]) -> list[float]:
    """For each pair, the throughput of OrbitFlow as a share of stock's."""
    medians: dict[tuple[int, str], float] = {
        (run.pair, run.kind): statistics.median(run.tokens_per_s) for run in runs
    }
    pairs = sorted({run.pair for run in runs})
    return [medians[pair, "orbitflow"] / medians[pair, "stock"] for pair in pairs]


def _rounded(run: Run) -> dict[str, Any]:
    return asdict(run) | {"tokens_per_s": [round(rate, 2) for rate in run.tokens_per_s]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
