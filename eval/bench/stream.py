"""``make bench-stream``: how near decoding over a link comes to what the link allows.

With the emulated link a decode step can take no less than its compute and no less than
its bytes take to cross the link: max(compute, bytes / link). Compute is the step of the
same batch on the same server with everything resident. Measured against that are several
amounts offloaded, over links slow enough to be the limit and fast enough not to be. The
ring holds two layers of the batch. ``nothing`` goes through page tables and ring as the
others do, but offloads no layer: what it adds to compute is bookkeeping.

With --gpu a model of 8B shape on an NVIDIA GPU over its real link, which takes what one large copy
takes.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.bench.link import gpu, large_copy_gb_per_s, needs_gpu
from eval.bench.measure import (
    Batch,
    Spread,
    results_folder,
    threads_env,
    write_result,
)
from eval.client import Client
from eval.live.contestants import GPU_MODEL, dummy_args
from eval.server import GPU_ENV, GPU_START_S, Server, stock_args
from eval.tiny_model import TinyModel, build

AIM = 1.15
PAGE_SIZES = {"cpu": 16, "cuda": 64}
RESIDENT = "resident"
SETTLE_TOKENS = 8  # decode steps before the counters are read for the first time


@dataclass(frozen=True)
class Sample:
    """One batch under one policy; the counters are per decode step."""

    step_s: float
    steps: int  # between the two readings of the counters
    h2d_bytes: float
    h2d_busy_s: float
    d2h_bytes: float
    stall_s: float


@dataclass(frozen=True)
class Row:
    """One policy over one link, measured against the bound."""

    link_gb_per_s: float
    policy: str
    bytes_per_step: float
    compute_s: float
    link_s: float
    step_s: float
    stall_s: float
    busy_s: float
    ratio: Spread

    @property
    def limit(self) -> str:
        return "link" if self.link_s > self.compute_s else "compute"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    model = GPU_MODEL if options.gpu else TinyModel(layers=options.layers)
    batch = Batch(options.batch, options.context, options.tokens)
    policies = [RESIDENT, nothing(model.layers), *options.policies]
    rows, samples = [], {}
    print(HEAD, flush=True)
    for link in options.links:
        found = measure(model, batch, link, policies, options)
        samples[link] = found
        for row in table(link, found):
            rows.append(row)
            print(_line(row, model.layers), flush=True)
    worst = max(row.ratio.median for row in rows)
    print(f"\nmeasured / bound: at most {worst:.2f}; aim at most {AIM}")
    result = {
        "aim": AIM,
        "worst_ratio": round(worst, 4),
        "workload": asdict(batch) | {"model": asdict(model), "rounds": options.rounds},
        "threads": None if options.gpu else options.threads,
        "rows": [_rounded(asdict(row) | {"limit": row.limit}) for row in rows],
        "samples": {
            f"{link:g}": {name: [_rounded(asdict(one)) for one in many] for name, many in s.items()}
            for link, s in samples.items()
        },
    }
    write_result(options.output, argv, result | ({"gpu": gpu()} if options.gpu else {}))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.stream", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 link, 1 round")
    parser.add_argument("--gpu", action="store_true", help="8B shape on an NVIDIA GPU, no --layers")
    parser.add_argument(
        "--links", type=float, nargs="+", metavar="X", help="10^9 bytes/s (0.25 0.5 1 2)"
    )
    parser.add_argument(
        "--policies", nargs="+", metavar="NAME", default=["static:3", "static:1", "all-host"],
        help="(%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="batches for each policy and link (3)")
    parser.add_argument("--layers", type=int, default=12, help="(%(default)s)")
    parser.add_argument("--batch", type=int, help="(4, on a GPU 8)")
    parser.add_argument("--context", type=int, help="tokens (1500, on a GPU 4096)")
    parser.add_argument("--tokens", type=int, default=97, help="to generate (%(default)s)")
    # One core computes and one copies: an accelerator's copy engine does not take its cores.
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (%(default)s)")
    parser.add_argument("--output", type=Path, help="(eval/results/{cpu,GPU}/stream.json)")
    options = parser.parse_args(argv)
    if options.gpu:
        needs_gpu(parser)
        if options.links:
            parser.error("--links: with --gpu the link is real")
        options.links = [large_copy_gb_per_s()["h2d"]]
    options.links = options.links or ([0.5] if options.quick else [0.25, 0.5, 1.0, 2.0])
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.batch = options.batch or (8 if options.gpu else 4)
    options.context = options.context or (4096 if options.gpu else 1500)
    folder = results_folder(gpu=options.gpu, quick=options.quick)
    options.output = options.output or folder / "stream.json"
    return options


def nothing(layers: int) -> str:
    """The policy of the name ``static`` that offloads no layer of so many."""
    return f"static:{layers}"


# --- measuring ----------------------------------------------------------------


def server(
    model: TinyModel, batch: Batch, link_gb_per_s: float, policies: Sequence[str], threads: int
) -> Server:
    """An arena in which the whole batch fits beside a ring of two of its layers; not started."""
    on_gpu = model == GPU_MODEL
    page_size = PAGE_SIZES["cuda" if on_gpu else "cpu"]
    longest = batch.prompt_tokens + batch.output_tokens
    layer_pages = batch.requests * (-(-longest // page_size) + 1)
    ring = 2 * layer_pages
    tails = 2 * batch.requests * model.layers  # open, and kept free for the next
    arena = model.layers * layer_pages + ring + tails
    args = [
        *("--enable-orbitflow", "--orbitflow-policy", nothing(model.layers)),
        *("--page-size", str(page_size), "--orbitflow-ring-pages", str(ring)),
        *("--orbitflow-arena-tokens", str(-(-arena // model.layers) * page_size)),
    ]
    env = {"ORBITFLOW_TEST_CONTROL": ",".join(policies)}
    if on_gpu:
        args = [*dummy_args(model), *args, "--orbitflow-host-memory-gb", "16"]
        return Server(args, env=env, base_env=GPU_ENV, start_timeout_s=GPU_START_S)
    args += ["--orbitflow-host-memory-gb", "0.5"]
    args += ["--orbitflow-emulated-link-gb-per-s", str(link_gb_per_s)]
    return Server(stock_args(build(model), *args), env=env | threads_env(threads))


def measure(
    model: TinyModel,
    batch: Batch,
    link_gb_per_s: float,
    policies: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, list[Sample]]:
    """Samples of each policy over one link, the policies in another order in each round."""
    chance = random.Random(options.seed)
    found: dict[str, list[Sample]] = defaultdict(list)
    with server(model, batch, link_gb_per_s, policies, options.threads) as running:
        batch.measure(running, seed=0)  # warms up
        for seed in range(1, options.rounds + 1):
            for policy in chance.sample(policies, len(policies)):
                change = {"orbitflow_policy": policies.index(policy)}
                running.post("/set_internal_state", {"server_args": change})
                found[policy].append(one := sample(running, batch, seed, policy))
                print(f"{policy}: {1e3 * one.step_s:.1f} ms a step", file=sys.stderr, flush=True)
    return {policy: found[policy] for policy in policies}


def sample(client: Client, batch: Batch, seed: int, policy: str) -> Sample:
    counters = _Counters(client, SETTLE_TOKENS, batch.output_tokens - SETTLE_TOKENS)
    window = batch.measure(client, seed, counters.at)
    (before, after) = counters.seen
    if after["policy"] != policy:
        raise RuntimeError(f"the server did not take the policy {policy}")
    steps = int(after["steps"] - before["steps"])

    def per_step(key: str, field: str | None = None) -> float:
        first, last = (
            float(state[key] if field is None else state[key][field]) for state in (before, after)
        )
        return (last - first) / steps

    return Sample(
        step_s=window.step_s,
        steps=steps,
        h2d_bytes=per_step("h2d", "bytes"),
        h2d_busy_s=per_step("h2d", "busy_s"),
        d2h_bytes=per_step("d2h", "bytes"),
        stall_s=per_step("stall_s"),
    )


class _Counters:
    """OrbitFlow's section of ``/server_info`` when the batch has come so far, twice."""

    def __init__(self, client: Client, first: int, second: int) -> None:
        self.seen: list[Mapping[str, Any]] = []
        self._client = client
        self._at = [first, second]
        self._lock = threading.Lock()

    def at(self, tokens: int) -> None:
        with self._lock:
            if self._at and tokens >= self._at[0]:
                del self._at[0]
                (state,) = self._client.orbitflow()
                assert state is not None
                self.seen.append(state)


# --- judging ------------------------------------------------------------------


def bound_s(compute_s: float, nbytes: float, link_gb_per_s: float) -> float:
    """No step is shorter: it computes, and its bytes cross the link."""
    return max(compute_s, nbytes / (link_gb_per_s * 1e9))


def table(link_gb_per_s: float, found: Mapping[str, Sequence[Sample]]) -> list[Row]:
    """A row for each policy but ``resident``, which says what compute takes."""
    compute_s = Spread.of([one.step_s for one in found[RESIDENT]]).median
    rows = []
    for policy, many in found.items():
        if policy == RESIDENT:
            continue
        ratios = [one.step_s / bound_s(compute_s, one.h2d_bytes, link_gb_per_s) for one in many]
        nbytes = Spread.of([one.h2d_bytes for one in many]).median
        rows.append(
            Row(
                link_gb_per_s=link_gb_per_s,
                policy=policy,
                bytes_per_step=nbytes,
                compute_s=compute_s,
                link_s=nbytes / (link_gb_per_s * 1e9),
                step_s=Spread.of([one.step_s for one in many]).median,
                stall_s=Spread.of([one.stall_s for one in many]).median,
                busy_s=Spread.of([one.h2d_busy_s for one in many]).median,
                ratio=Spread.of(ratios),
            )
        )
    return rows


HEAD = """\
                 |           one decode step: |   ms            |
 link  offloaded |   MB  compute    link step | waited  copying | limit    step / bound
 GB/s            |                            |                 |"""


def _line(row: Row, layers: int) -> str:
    policy = "nothing" if row.policy == nothing(layers) else row.policy
    ms = [1e3 * s for s in (row.compute_s, row.link_s, row.step_s, row.stall_s, row.busy_s)]
    return (
        f"{row.link_gb_per_s:5.2f}  {policy:<10}|{row.bytes_per_step / 1e6:5.1f} {ms[0]:8.1f}"
        f" {ms[1]:7.1f} {ms[2]:4.0f} | {ms[3]:6.1f}  {ms[4]:7.1f} | {row.limit:<8}"
        f" {row.ratio.median:.2f} ({row.ratio.least:.2f} to {row.ratio.most:.2f})"
    )


def _rounded(values: Any) -> Any:
    """Six digits are more than was measured."""
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    return float(f"{values:.6g}") if isinstance(values, float) else values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
