"""``python -m eval.bench.link``: how near page transfers on an NVIDIA GPU come to one large copy.

Pages of an 8B model move between arena and pinned host memory by the engine that a server has,
in runs of several lengths, from one page at a time (kernel) to hundreds (copy engine). Measured
against that, in the same process, is one contiguous copy of as many bytes each way.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.bench.measure import results_folder, write_result
from eval.server import PROFILES
from orbitflow_sglang.residency.arena import Arena
from orbitflow_sglang.residency.engines import engine_for
from orbitflow_sglang.residency.host_store import HostStore
from orbitflow_sglang.residency.layout import Capacity, KVLayout

AIM = 0.9
LAYOUT = KVLayout(32, 64, kv_heads=8, head_dim=128, v_head_dim=128, dtype=torch.bfloat16)
DEVICE = "cuda:0"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    os.environ.setdefault("ORBITFLOW_CACHE_DIR", str(PROFILES))  # as servers of eval have it
    pages = options.pages
    nbytes = pages * LAYOUT.page_bytes
    large = large_copy_gb_per_s(nbytes, options.repeats)
    arena = Arena(LAYOUT, Capacity(2 * pages, 2, 2 * pages, 2 * pages), DEVICE)
    host = HostStore(LAYOUT, 2 * pages, DEVICE)
    engine: Any = engine_for(arena, host, None)
    copier = engine._copier
    print(f"{copier._kernels.name} kernels; runs of {copier.least_run} pages by the copy engine")
    print(f"one copy of {nbytes / 1e6:.0f} MB: {large['h2d']:.1f} and {large['d2h']:.1f} GB/s")
    for tensor in (host.k, host.v):
        words = tensor.view(torch.int32).view(-1)
        torch.arange(len(words), out=words)
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        on_host, on_device = _spaced(pages, run), np.arange(pages)
        for direction, copy, source, of, target, to in (
            ("h2d", engine.fetch, host, on_host, arena, on_device),
            ("d2h", engine.write_back, arena, on_device, host, on_host),
        ):

            def move(copy: Any = copy, of: np.ndarray = of, to: np.ndarray = to) -> None:
                copy(of, to)
                engine.drain()

            rate = _rate(nbytes, move, options.repeats)
            _check(move, source, of, target, to)
            share = rate / large[direction]
            rows.append({"run_pages": run, "direction": direction, "gb_per_s": round(rate, 3),
                         "of_large_copy": round(share, 4)})  # fmt: skip
            print(f"{direction} in runs of {run:4} pages: {rate:6.2f} GB/s, {share:.3f}")
    engine.close()
    result = {
        "aim": AIM,
        "gpu": gpu(),
        "kernels": copier._kernels.name,
        "least_run_pages": copier.least_run if math.isfinite(copier.least_run) else None,
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
    needs_gpu(parser)
    folder = results_folder(gpu=True, quick=options.quick)
    options.output = options.output or folder / "link.json"
    return options


def needs_gpu(parser: argparse.ArgumentParser) -> None:
    if not torch.cuda.is_available():
        parser.error("it needs an NVIDIA GPU, and torch.cuda.is_available() is False here")


def gpu() -> str:
    """What measured: its name, driver and link."""
    fields = "name,driver_version,pcie.link.gen.max,pcie.link.width.max"
    return subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def large_copy_gb_per_s(nbytes: int = 1 << 29, repeats: int = 7) -> dict[str, float]:
    """What the link of this GPU takes in one copy, each way, from and to pinned memory."""
    rates = _large_copies(nbytes, repeats)
    torch.cuda.empty_cache()  # a server may be next
    return rates


def _large_copies(nbytes: int, repeats: int) -> dict[str, float]:
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


def _check(
    move: Callable[[], None],
    source: Arena | HostStore,
    of: np.ndarray,
    target: Arena | HostStore,
    to: np.ndarray,
) -> None:
    """Raise ``RuntimeError`` unless it is the pages that move."""
    for tensor in (target.k, target.v):
        tensor[to] = 0
    torch.cuda.synchronize()
    move()
    for found, wanted in ((target.k, source.k), (target.v, source.v)):
        # As numbers some would be NaN, which is equal to nothing.
        if not torch.equal(*(pages.cpu().view(torch.int16) for pages in (found[to], wanted[of]))):
            raise RuntimeError("other bytes arrived than were sent")


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
