"""``python -m eval.simulate``: one policy serves one workload on one modelled machine.

python -m eval.simulate --mix MIX --load 1.2 --profile a5000-8b --policy orbitflow
python -m eval.simulate --trace mooncake_fast25_conversation --requests 500 --speed 0.1
    --profile a6000-8b --policy swap+order --json out.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import orjson

from eval.bench.measure import machine
from eval.sim import hardware
from eval.sim.scenario import Run, Scenario, run
from eval.workload import arrivals, overflow

SHOWN = (
    "good_requests",
    "good_requests_strict",
    "tokens_on_time",
    "ttft_attainment",
    "tpot_attainment",
    "tbt_attainment",
    "throughput_tokens_per_s",
    "p95_ttft_s",
    "p95_tbt_s",
    "worst_gap_s",
)


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    names = {field.name for field in fields(Scenario)}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.planner_latency_ms == "measured":
        given["planner_latency_s"] = None
    else:
        given["planner_latency_s"] = float(options.planner_latency_ms) / 1e3
    try:
        finished = run(Scenario(**given))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = finished.as_dict()
    for name in SHOWN:
        print(f"{name:28} {found['metrics'][name]}")
    if finished.dropped:
        print(f"{finished.dropped} rows dropped: larger than this machine can hold")
    if options.json:
        options.json.write_bytes(written(finished, argv))
    return 0


def written(finished: Run, argv: Sequence[str]) -> bytes:
    """The result as JSON, with the command and the environment that it comes from."""
    command = "python -m eval.simulate " + " ".join(argv)
    found = {"command": command, "environment": machine()} | finished.as_dict()
    return orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.simulate",
        description=(__doc__ or "").replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--trace", metavar="FILE", help="CSV, or the name of one that comes along")
    who.add_argument("--mix", metavar="NAME", help="MIX, SS, SL, LS, LL or a blend: SS:1+LL:3")
    add("--arrivals", default="lognormal:4", help=f"of a mix: {arrivals.HELP} (%(default)s)")
    add("--requests", type=int, metavar="N", help="the first N rows; of a mix 200")
    add("--skip", type=int, default=0, metavar="N", help="rows of the trace before these")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--load", type=float, metavar="X", help="times what SGLang drains")
    when.add_argument("--rate", type=float, metavar="X", help="requests a second")
    when.add_argument("--speed", type=float, metavar="X", help="divides arrival times")
    add("--profile", required=True, help=f"one of {', '.join(hardware.names())}")
    add("--policy", required=True, help="orbitflow, orbitflow:no-pause, swap+order, static:2, …")
    add("--seed", type=int, default=0)
    add("--slo-scale", type=float, default=2.0, metavar="X", help="TPOT, in steps of a full arena")
    add("--ttft-slo-s", type=float, metavar="S", help="least TTFT target (of the profile)")
    add("--paced", action="store_true", help="clients ask for paced delivery")
    add("--known-lengths", action="store_true", help="max_new_tokens is what a request will say")
    add("--mixed", action="store_true", help="prompt chunks and decode tokens in one step")
    add("--arena-gb", type=float, metavar="X", help="instead of the profile's")
    add("--overflow", metavar="LEVEL", help=f"instead: {', '.join(overflow.LEVELS)}, by the paper")
    add("--link-gb-per-s", type=float, metavar="X", help="instead of the profile's")
    add("--max-running", type=int, metavar="N", help="instead of the profile's")
    add("--oversize", action="store_true", help="also requests larger than the arena")
    add("--planner-latency-ms", default="5", metavar="MS", help="or `measured` (%(default)s)")
    add("--link-jitter", type=float, default=0.0, metavar="SIGMA", help="of the log of its rate")
    add("--json", type=Path, metavar="OUT", help="metrics, rows and environment")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
