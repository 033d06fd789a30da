"""``make bench-live``: serving policies compared on real servers, in real time ("cpu-live").

TODO
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

from eval.bench.measure import QUICK_RESULTS, ROOT, write_result
from eval.client import Client, RequestFailed
from eval.live import contestants, summary
from eval.live.calibrate import Calibration, calibrate, warm_up
from eval.live.contestants import Setup
from eval.live.records import CannotResume, Cell, Results, from_row
from eval.live.replay import Answer, replay
from eval.live.workload import LiveRequest, Mix, at_rate, draw, prompts, with_slo
from eval.server import ServerFailed

RESULTS = ROOT / "eval" / "results" / "cpu-live"


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    setup, mix = _setup(options), Mix(cv=options.cv)
    try:
        for name in (*options.contestants, options.calibrate_with):
            contestants.check(name)
        results = Results(options.out, _settings(options, setup, mix), options.resume)
    except (CannotResume, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    calibration = _calibration(results, options, setup, mix)
    wanted = cells(options.contestants, options.loads, options.repeats, options.seed)
    failed = []
    for index, cell in enumerate(wanted, start=1):
        if cell in results.done:
            continue
        head = f"[{index}/{len(wanted)}] load {cell.load:g} repeat {cell.repeat} {cell.contestant}"
        print(f"{head} ...", flush=True)
        trace = trace_of(cell, calibration, options, mix)
        try:
            answers, run = measure(cell, setup, trace, options.seed)
        except (ServerFailed, RuntimeError) as error:
            failed.append(f"{head}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        results.add(cell, answers, run)
        print(f"  {_outcome(results, cell)}", flush=True)
    _write_summary(results, calibration, argv, options, setup, mix)
    return 1 if failed else 0


def cells(names: Sequence[str], loads: Sequence[float], repeats: int, seed: int) -> list[Cell]:
    """Every run of a campaign. Within a repeat and load the order of contestants is drawn.

    It depends on nothing but these two and the seed, so that a resumed campaign draws alike.
    """
    found = []
    for repeat in range(repeats):
        for load in loads:
            order = sorted(names)
            random.Random(f"{seed}/{repeat}/{load:g}").shuffle(order)
            found += [Cell(repeat, load, name) for name in order]
    return found


def trace_of(
    cell: Cell, calibration: Calibration, options: argparse.Namespace, mix: Mix
) -> list[LiveRequest]:
    """The trace of a repeat, the same for every contestant, stretched to the load."""
    drawn = draw(mix, options.requests, options.seed + cell.repeat)
    rate = cell.load * calibration.load_1_requests_per_s
    targets = calibration.targets(_seconds(options.ttft_slo_ms), _seconds(options.tpot_slo_ms))
    trace = with_slo(at_rate(drawn, rate), targets)
    if contestants.is_paced(cell.contestant):
        trace = [replace(one, slo=replace(one.slo, deposit=True)) for one in trace]
    return trace


def measure(
    cell: Cell, setup: Setup, trace: Sequence[LiveRequest], seed: int
) -> tuple[list[Answer], dict[str, Any]]:
    """One server's life: start, warm-up, replay, stop."""
    load_before = os.getloadavg()[0]  # of others: nothing of this run is alive yet
    with contestants.server(cell.contestant, setup) as server:
        warm_up(server, setup)
        answers = replay(server.url, trace, prompts(trace, seed + cell.repeat))
        state, problem = _after(server)
    orbitflow = {key: value for key, value in (state or {}).items() if key != "requests"}
    return answers, {
        "problem": problem,
        "failed_idle_checks": orbitflow.get("failed_idle_checks"),
        "most_late_s": round(max(one.sent_s - one.request.arrival_s for one in answers), 4),
        "load_1min_before": round(load_before, 2),
        "orbitflow": orbitflow or None,
    }


def _after(client: Client) -> tuple[dict[str, Any] | None, str | None]:
    """OrbitFlow's section once the server is idle; or what is wrong with the server."""
    try:
        client.wait_idle(timeout_s=60)
        return client.orbitflow()[0], None
    except (TimeoutError, requests.RequestException, RequestFailed) as error:
        return None, f"{type(error).__name__}: {error}"[:500]


def _calibration(
    results: Results, options: argparse.Namespace, setup: Setup, mix: Mix
) -> Calibration:
    if results.calibration is None:
        print(f"Calibrating with {options.calibrate_with} ...", flush=True)
        trace = draw(mix, options.requests, options.seed)
        measured = calibrate(options.calibrate_with, setup, mix, trace, options.seed)
        results.calibrated(measured.as_dict())
    calibration = Calibration(**results.calibration or {})
    numbers = calibration.numbers(setup, mix)
    print(
        f"t {numbers['t_s'] * 1e3:.1f} ms with {calibration.step_requests} requests, "
        f"h {numbers['h_bytes'] / 1e6:.2f} MB, arena {setup.arena_bytes / 1e6:.1f} MB, "
        f"rho {numbers['rho']:.3f}, s {numbers['s']:.2f}, mu {numbers['mu']:.2f}\n"
        f"prefill {calibration.prefill_s * 1e3:.1f} ms + "
        f"{calibration.prefill_s_per_token * 1e3:.3f} ms/token, load 1 = "
        f"{calibration.load_1_requests_per_s:.3f} requests/s "
        f"(drained in {calibration.drain_s:.0f} s, {calibration.drain_errors} errors)",
        flush=True,
    )
    return calibration


def _outcome(results: Results, cell: Cell) -> str:
    rows = [from_row(row) for row in results.rows if Cell.of(row) == cell]
    found = summary.metrics(rows)
    run = results.runs[-1]
    return (
        f"good {found['good']:.2f}, strict {found['strict']:.2f}, TTFT ok {found['ttft_ok']:.2f}, "
        f"TPOT ok {found['tpot_ok']:.2f}, {summary.tokens_per_s(rows):.0f} tokens/s in "
        f"{summary.makespan_s(rows):.0f} s, {found['errors']} errors, {run['mismatches']} with "
        f"other ids{', ' + run['problem'] if run['problem'] else ''}"
    )


def _write_summary(
    results: Results,
    calibration: Calibration,
    argv: Sequence[str],
    options: argparse.Namespace,
    setup: Setup,
    mix: Mix,
) -> None:
    found = summary.summarise(results.rows, results.runs, options.baseline)
    known = {run["contestant"] for run in results.runs}
    targets = calibration.targets(_seconds(options.ttft_slo_ms), _seconds(options.tpot_slo_ms))
    result = {
        "settings": results.settings,
        "calibration": calibration.as_dict() | calibration.numbers(setup, mix),
        "targets": targets.as_dict(),
        "server_args": {name: contestants.flags(name, setup) for name in sorted(known)},
    }
    table = summary.markdown(found)
    (options.out / "summary.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    write_result(options.out / "summary.json", argv, result | found)


def _settings(options: argparse.Namespace, setup: Setup, mix: Mix) -> dict[str, Any]:
    """What must be the same in every cell of a folder."""
    return {
        "setup": setup.as_dict(),
        "mix": vars(mix),
        "requests": options.requests,
        "seed": options.seed,
        "calibrate_with": options.calibrate_with,
        "ttft_slo_ms": options.ttft_slo_ms,
        "tpot_slo_ms": options.tpot_slo_ms,
    }


def _setup(options: argparse.Namespace) -> Setup:
    return Setup(
        arena_tokens=options.arena_tokens,
        link_gb_per_s=options.link_gb_per_s,
        host_memory_gb=options.host_memory_gb,
        threads=options.threads,
        server_args=tuple(options.server_args.split()),
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.live.compare",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, Setup()
    add("--quick", action="store_true", help="a smoke run: few requests, stock and static:1")
    add("--contestants", nargs="+", metavar="NAME", help=" ".join(contestants.DEFAULT))
    add("--baseline", default="orbitflow", help="of the paired differences (%(default)s)")
    add("--loads", type=float, nargs="+", metavar="X", help="(0.9 1.2)")
    add("--repeats", type=int, help="(3)")
    add("--requests", type=int, help="of one run (200)")
    add("--calibrate-with", metavar="NAME", help="whose drain is load 1 (queue)")
    add("--ttft-slo-ms", type=float, help="(2000, or 5 unloaded prefills if longer)")
    add("--tpot-slo-ms", type=float, help="(2 decode steps of a full arena)")
    add("--cv", type=float, default=Mix.cv, help="of the time between arrivals (%(default)s)")
    add("--arena-tokens", type=int, default=default.arena_tokens, help="(%(default)s)")
    add("--link-gb-per-s", type=float, default=default.link_gb_per_s, help="(%(default)s)")
    add("--host-memory-gb", type=float, default=default.host_memory_gb, help="(%(default)s)")
    add("--threads", type=int, default=default.threads, help="of PyTorch (%(default)s)")
    add("--server-args", default="", metavar="'ARGS'", help="for every server, last")
    add("--seed", type=int, default=0, help="of traces, prompts and orders (%(default)s)")
    add("--out", type=Path, help="folder (eval/results/cpu-live)")
    add("--resume", action="store_true", help="skip the runs that the folder has")
    options = parser.parse_args(argv)
    quick = options.quick
    quick_contestants = ("stock", "static:1")
    options.contestants = options.contestants or (
        quick_contestants if quick else contestants.DEFAULT
    )
    options.loads = options.loads or ([1.0] if quick else [0.9, 1.2])
    options.repeats = options.repeats or (1 if quick else 3)
    options.requests = options.requests or (16 if quick else 200)
    options.calibrate_with = options.calibrate_with or ("stock" if quick else "queue")
    options.out = options.out or (QUICK_RESULTS / "live" if quick else RESULTS)
    if quick and not options.resume:
        shutil.rmtree(QUICK_RESULTS / "live", ignore_errors=True)
    return options


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
