"""``python -m eval.bench.link``: how near page transfers on an NVIDIA GPU come to one large copy.

Pages of an 8B model move between arena and pinned host memory by the engine that a server has,
in runs of several lengths, from one page at a time (kernel) to hundreds (copy engine). Measured
against that, in the same process, is one contiguous copy of as many bytes each way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.bench.measure import QUICK_RESULTS, gpu_results, write_result
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.engines import engine_for
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout

AIM = 0.9
LAYOUT = KVLayout(32, 64, kv_heads=8, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
DEVICE = "cuda:0"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not torch.cuda.is_available():
        print("eval.bench.link needs an NVIDIA GPU", file=sys.stderr)
        return 1
    pages = options.pages
    nbytes = pages * LAYOUT.page_bytes
    large = large_copy_gb_per_s(nbytes, options.repeats)
    arena = Arena(LAYOUT, Capacity(2 * pages, 2, 2 * pages, 2 * pages), DEVICE)
    host = HostStore(LAYOUT, 2 * pages, DEVICE)
    engine = engine_for(arena, host, None)
    print(f"one copy of {nbytes / 1e6:.0f} MB: {large['h2d']:.1f} and {large['d2h']:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        source, target = _spaced(pages, run), np.arange(pages)
        for direction, copy, of, to in (
            ("h2d", engine.fetch, source, target),
            ("d2h", engine.write_back, target, source),
        ):

            def move(copy: Any = copy, of: np.ndarray = of, to: np.ndarray = to) -> None:
                copy(of, to)
                engine.drain()

            rate = _rate(nbytes, move, options.repeats)
            share = rate / large[direction]
            rows.append({"run_pages": run, "direction": direction, "gb_per_s": round(rate, 3),
                         "of_large_copy": round(share, 4)})  # fmt: skip
            print(f"{direction} in runs of {run:4} pages: {rate:6.2f} GB/s, {share:.3f}")
    engine.close()
    result = {
        "aim": AIM,
        "large_copy_gb_per_s": {name: round(rate, 3) for name, rate in large.items()},
        "bytes": nbytes,
        "page_bytes": LAYOUT.page_bytes,
        "rows": rows,
    }
    write_result(options.output, argv, result)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.link", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--pages", type=int, default=2048, help="in a transfer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(%(default)s)")
    parser.add_argument(
        "--runs", type=int, nargs="+", default=[1, 4, 8, 16, 64, 256], metavar="PAGES",
        help="(%(default)s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smoke run: not to be committed")
    parser.add_argument("--output", type=Path, help="(eval/results/GPU/link.json)")
    options = parser.parse_args(argv)
    if options.output is None:
        folder = QUICK_RESULTS if options.quick else gpu_results()
        options.output = folder / "link.json"
    return options


def large_copy_gb_per_s(nbytes: int = 1 << 29, repeats: int = 7) -> dict[str, float]:
    """What the link of this GPU takes in one copy, each way, from and to pinned memory."""
    device = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def move(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return {
        "h2d": _rate(nbytes, lambda: move(device, host), repeats),
        "d2h": _rate(nbytes, lambda: move(host, device), repeats),
    }


def _spaced(pages: int, run: int) -> np.ndarray:
    """So many page ids in runs of ``run``, with a gap behind each; twice as many at most."""
    order = np.arange(pages)
    spaced = order // run * (run + 1) + order % run
    assert spaced[-1] < 2 * pages
    return spaced


def _rate(nbytes: int, move: Callable[[], None], repeats: int) -> float:
    """10^9 bytes/s, the median."""
    move()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
