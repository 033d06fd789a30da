"""``make eval-live``: serving policies compared on real servers, in real time ("cpu-live").

For every repeat, load and contestant a server is started, warmed up, given the same trace of
requests as all the others, and stopped; one is alive at a time, in an order drawn anew for
each repeat. What each client saw is stored request by request, and summarised with intervals
over requests, and differences paired by request and resampled by repeat too. A campaign takes
hours and can be stopped at any time: --resume goes on where it was, unless what decides has
changed; where only code has, --other-code keeps what it made, and each run says which code
that was. Two cores must be left alone meanwhile; a run in which others used more than 0.2 of
them says so, and --redo-disturbed 0.2 repeats it.

Load 1 is the rate at which `queue` (no offload) drains the whole trace offered at time 0;
a repeat has a trace and prompts of its own, the load is that of the first one's drain.
SLOs are multiples of what was measured at the start: TPOT two decode steps of a batch that
fills the arena, TTFT 3 s or five unloaded prefills of that length, if longer.

Chosen so that memory is the bottleneck, on two cores of an AMD EPYC:
- One thread of PyTorch: with two a step took 24 instead of 15 ms. SGLang's other
  processes, copies and the client have the other core.
- Layers take the time of an emulated device, so that a machine whose speed varies does not
  decide, and the model is so small that what these cores really do for a layer, Python and
  copies included, fits in: see docs/evaluation.md. --real-compute: not.
- Arena 4,096 tokens, inputs 64-256 or 512-1536, outputs 32-96 or 160-384: six requests of
  mean size fit (676 tokens), two of the largest. t = 36 ms; prefill takes 0.5 ms a token.
  So what fills the arena was prefilled in 2 s and decodes for 6 s: mu = 3.2.
- Link 0.047e9 bytes/s: h = 1.7 MB a step, rho = 0.2 of the arena.
- Prefill chunks of 512 tokens: one stops decoding for the time of 7 steps.
- 200 requests: 380 s to drain, 420 s at load 0.9, and 20 to 30 s for the server. `static:d` is
  bound by the link and takes twice as long.
- No prompt shares a prefix with another, so the radix cache decides nothing.

With --gpu (``make eval-gpu``) the same on an NVIDIA GPU: a model of 8B shape with made-up
weights, an arena of 65,536 tokens, inputs and outputs five times as long, a link that is real,
and stock SGLang on FlashInfer with and without CUDA graphs and with its hierarchical cache.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests
import torch

from eval.bench.measure import ROOT, hash_of_files, results_folder, write_result
from eval.client import Client, RequestFailed
from eval.live import contestants, summary
from eval.live.calibrate import Calibration, calibrate, warm_up
from eval.live.contestants import Setup
from eval.live.machine import DISTURBED_CORES, OthersLoad
from eval.live.records import CannotResume, Cell, Results, from_row
from eval.live.replay import Answer, replay
from eval.live.workload import Mix, draw, prompts
from eval.server import ServerFailed
from eval.workload.requests import TraceRequest, at_rate, with_slo

RESULTS = results_folder(kind="live")
ON_GPU = (
    *("stock", "stock-eager", "hicache", "swap+order", "paper", "orbitflow"),
    *("orbitflow@overlapped", "time-sliced-swap@paced", "orbitflow@paced"),
)
DECISIVE = (  # what runs depend on
    *("orbitflow_sglang/**/*.py", "kernels/*.cu", "kernels/*.py", "patches/**/*.patch"),
    *("eval/live/*.py", "eval/bench/measure.py", "eval/workload/requests.py"),
    *("eval/client.py", "eval/server.py", "eval/tiny_model.py"),
)
AROUND = {ROOT / "eval" / "live" / "summary.py"}  # but not this
ONLY_ON_GPU = {  # nor, on a CPU, what has no part in a server there
    *(ROOT / "kernels").iterdir(),
    *(ROOT / "orbitflow_sglang" / "engine" / f"{name}.py"
      for name in ("attention_flashinfer", "flashinfer_wrappers", "graphs")),
    *(ROOT / "orbitflow_sglang" / "residency" / f"{name}.py"
      for name in ("host_memory", "kernels", "streams")),
}  # fmt: skip
# Long enough that decoding, not prefill, fills the time of a GPU too.
GPU_MIX = Mix((320, 1280), (2560, 7680), (160, 480), (800, 1920))
SLOW = 0.02  # a machine on which compute takes so much longer than emulated decides with
FAILURES = (ServerFailed, RuntimeError, requests.RequestException)  # of a server, not of ours


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    setup, mix = _setup(options), replace(GPU_MIX if options.gpu else Mix(), cv=options.cv)
    try:
        for name in (*options.contestants, options.calibrate_with):
            contestants.check(name, setup)
        results = Results(
            options.out, _settings(options, setup, mix), options.resume, options.redo_disturbed,
            options.other_code,
        )  # fmt: skip
    except (CannotResume, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        calibration = _calibration(results, options, setup, mix)
    except FAILURES as error:
        print(f"calibrating with {options.calibrate_with}: {error}", file=sys.stderr)
        return 1
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
        except FAILURES as error:
            failed.append(f"{head}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        results.add(cell, answers, run)
        print(f"  {_outcome(results, cell)}", flush=True)
    _write_summary(results, calibration, argv, options, setup, mix, failed)
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
) -> list[TraceRequest]:
    """The trace of a repeat, the same for every contestant, stretched to the load."""
    drawn = draw(mix, options.requests, options.seed + cell.repeat)
    rate = cell.load * calibration.load_1_requests_per_s
    targets = calibration.targets(_seconds(options.ttft_slo_ms), _seconds(options.tpot_slo_ms))
    trace = with_slo(at_rate(drawn, rate), targets.of)
    if contestants.is_paced(cell.contestant):
        trace = [replace(one, slo=replace(one.slo, deposit=True)) for one in trace]
    return trace


def measure(
    cell: Cell, setup: Setup, trace: Sequence[TraceRequest], seed: int
) -> tuple[list[Answer], dict[str, Any]]:
    """One server's life: start, warm-up, replay, stop."""
    with contestants.server(cell.contestant, setup) as server:
        warm_up(server, setup)
        token_ids = prompts(trace, seed + cell.repeat)
        others = OthersLoad()
        answers = replay(server.url, trace, token_ids)
        others_cores = others.cores()
        state, problem = _after(server)
    orbitflow = {key: value for key, value in (state or {}).items() if key != "requests"}
    if profile := orbitflow.get("profile"):
        # Not where it lies on this machine.
        orbitflow["profile"] = profile | {"model": Path(profile["model"]).name}
    return answers, {
        "problem": problem,
        "failed_idle_checks": orbitflow.get("failed_idle_checks"),
        "most_late_s": round(max(one.sent_s - one.request.arrival_s for one in answers), 4),
        "others_cores": round(others_cores, 3),
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
    hidden = ""
    if "rho" in numbers:
        hidden = f"h {numbers['h_bytes'] / 1e6:.2f} MB, rho {numbers['rho']:.3f}, "
    print(
        f"t {numbers['t_s'] * 1e3:.1f} ms with {calibration.step_requests} requests, "
        f"arena {setup.arena_bytes / 1e6:.1f} MB, {hidden}"
        f"s {numbers['s']:.2f}, mu {numbers['mu']:.2f}\n"
        f"prefill {calibration.prefill_s * 1e3:.1f} ms + "
        f"{calibration.prefill_s_per_token * 1e3:.3f} ms/token, load 1 = "
        f"{calibration.load_1_requests_per_s:.3f} requests/s "
        f"(drained in {calibration.drain_s:.0f} s, {calibration.drain_errors} errors)",
        flush=True,
    )
    if calibration.others_cores > DISTURBED_CORES:
        print(
            f"DISTURBED: others used {calibration.others_cores:.1f} cores meanwhile, so load 1 is "
            f"too low and SLOs are too lax; to measure again, delete {results.folder}",
            flush=True,
        )
    return calibration


def _outcome(results: Results, cell: Cell) -> str:
    rows = [from_row(row) for row in results.rows if Cell.of(row) == cell]
    found = summary.metrics(rows)
    run = results.runs[-1]
    others = run["others_cores"]
    emulated = (run["orbitflow"] or {}).get("emulated_compute") or {}
    slow = ""
    if (beyond := emulated.get("overrun_s", 0.0) / max(1e-9, emulated.get("s", 0.0))) > SLOW:
        slow = f", SLOW: compute took {beyond:.1%} longer than emulated"
    disturbed = f", DISTURBED: others used {others:.1f} cores" * (others > DISTURBED_CORES)
    return (
        f"good {found['good']:.2f}, strict {found['strict']:.2f}, TTFT ok {found['ttft_ok']:.2f}, "
        f"TPOT ok {found['tpot_ok']:.2f}, {summary.tokens_per_s(rows):.0f} tokens/s in "
        f"{summary.makespan_s(rows):.0f} s, {found['errors']} errors, {run['mismatches']} with "
        f"other ids{', ' + run['problem'] if run['problem'] else ''}{disturbed}{slow}"
    )


def _write_summary(
    results: Results,
    calibration: Calibration,
    argv: Sequence[str],
    options: argparse.Namespace,
    setup: Setup,
    mix: Mix,
    failed: Sequence[str],
) -> None:
    found = summary.summarise(results.rows, results.runs, options.baseline)
    known = {run["contestant"] for run in results.runs}
    targets = calibration.targets(_seconds(options.ttft_slo_ms), _seconds(options.tpot_slo_ms))
    result = {
        "settings": results.settings,
        "calibration": calibration.as_dict() | calibration.numbers(setup, mix),
        "targets": targets.as_dict(),
        "not_measured": list(failed),
        "server_args": {name: contestants.flags(name, setup) for name in sorted(known)},
    }
    table = summary.markdown(found)
    (options.out / "summary.md").write_text(table, encoding="utf-8")
    print(f"\n{table}")
    write_result(options.out / "summary.json", argv, result | found)


def _settings(options: argparse.Namespace, setup: Setup, mix: Mix) -> dict[str, Any]:
    """What must be the same in every cell of a folder."""
    return {
        "code": hash_of_files(DECISIVE, AROUND if setup.device == "cuda" else AROUND | ONLY_ON_GPU),
        "setup": setup.as_dict(),
        "mix": vars(mix),
        "requests": options.requests,
        "seed": options.seed,
        "calibrate_with": options.calibrate_with,
        "ttft_slo_ms": options.ttft_slo_ms,
        "tpot_slo_ms": options.tpot_slo_ms,
    }


def _setup(options: argparse.Namespace) -> Setup:
    base = contestants.ON_GPU if options.gpu else Setup()
    fields = ("arena_tokens", "link_gb_per_s", "host_memory_gb", "threads")
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    if options.real_compute:
        given["compute_ms"] = None
    return replace(base, **given, server_args=tuple(options.server_args.split()))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.live.compare",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, Setup()
    add("--quick", action="store_true", help="a smoke run: few requests, stock and another")
    add("--contestants", nargs="+", metavar="NAME", help=" ".join(contestants.DEFAULT))
    add("--baseline", default="orbitflow", help="of the paired differences (%(default)s)")
    add("--loads", type=float, nargs="+", metavar="X", help="(0.9 1.2)")
    add("--repeats", type=int, help="(3)")
    add("--requests", type=int, help="of one run (200)")
    add("--calibrate-with", metavar="NAME", help="whose drain is load 1 (queue)")
    add("--ttft-slo-ms", type=float, help="(3000, or 5 unloaded prefills if longer)")
    add("--tpot-slo-ms", type=float, help="(2 decode steps of a full arena)")
    add("--cv", type=float, default=Mix.cv, help="of the time between arrivals (%(default)s)")
    add("--arena-tokens", type=int, help=f"({default.arena_tokens})")
    add("--link-gb-per-s", type=float, help=f"emulated ({default.link_gb_per_s})")
    add("--host-memory-gb", type=float, help=f"({default.host_memory_gb})")
    add("--threads", type=int, help=f"of PyTorch ({default.threads})")
    add("--real-compute", action="store_true", help="layers take what they take")
    add("--gpu", action="store_true", help="make eval-gpu: on an NVIDIA GPU, model of 8B shape")
    add("--server-args", default="", metavar="'ARGS'", help="for every server, last")
    add("--seed", type=int, default=0, help="of traces, prompts and orders (%(default)s)")
    add("--out", type=Path, help="folder (eval/results/cpu-live; on a GPU eval/results/NAME-live)")
    add("--resume", action="store_true", help="skip the runs that the folder has")
    add("--other-code", action="store_true", help="with --resume: keep runs that other code made")
    add(
        "--redo-disturbed",
        type=float,
        metavar="CORES",
        help="with --resume: of finished runs "
        "repeat those in which others used more than so many cores",
    )
    options = parser.parse_args(argv)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs an NVIDIA GPU, and torch.cuda.is_available() is False here")
    quick = options.quick
    # On a GPU both eager: targets from steps out of graphs would be met by nothing else.
    quick_contestants = ("stock-eager", "orbitflow") if options.gpu else ("stock", "static:1")
    options.contestants = options.contestants or (
        quick_contestants if quick else ON_GPU if options.gpu else contestants.DEFAULT
    )
    options.loads = options.loads or ([1.0] if quick else [0.9, 1.2])
    options.repeats = options.repeats or (1 if quick else 3)
    options.requests = options.requests or (16 if quick else 200)
    options.calibrate_with = options.calibrate_with or (quick_contestants[0] if quick else "queue")
    folder = results_folder(gpu=options.gpu, quick=quick, kind="live")
    options.out = options.out or folder
    if quick and not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    return options


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
