"""``python -m eval.sim.against_live``: the simulator beside real servers, on the same traces.

Takes the runs of ``eval/results/cpu-live``, or of --results FOLDER: their calibration, the cost
profiles that their servers measured, and the requests as each contestant got them; simulates
each run, and says by how much step times and good requests differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import metrics
from eval.live.calibrate import FILL, Calibration
from eval.live.compare import RESULTS, trace_of
from eval.live.contestants import PACED, STOCK
from eval.live.records import Cell, Results, from_row
from eval.live.workload import Mix
from eval.metrics import Served
from eval.sim.engine import Setup, Simulation
from eval.sim.hardware import Hardware, Linear
from eval.sim.result import check, served

# Of this machine: what copies beside a step add to it
# (docs/evaluation.md, The simulator against real servers).
TIERED_S = 0.0005
COPY_SLOWDOWN = 0.15
COLUMNS = ("contestant", "load", "repeat", "good, live", "simulated", "gap between tokens, live",
           "simulated", "off", "tokens/s, live", "simulated")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.sim.against_live", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="of eval-live (%(default)s)")
    options = parser.parse_args(argv)
    if not (options.results / "runs.jsonl").exists():
        print(
            f"{options.results} has no runs: make eval-live, or give --results FOLDER",
            file=sys.stderr,
        )
        return 1
    print("\n".join(compared(options.results)))
    return 0


def compared(folder: Path) -> list[str]:
    """A table of all runs, and what they come to."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    calibration = Calibration(**settings.pop("calibration"))
    results = Results(folder, settings, resume=True)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    off, apart = [], []
    for run in sorted(results.runs, key=lambda one: (one["load"], one["contestant"])):
        cell = Cell.of(run)
        live = [from_row(row) for row in results.rows if Cell.of(row) == cell]
        ours = simulated(cell, settings, calibration, profile_of(results.runs, run))
        gaps = _median_gap(live), _median_gap(ours)
        good = [100 * statistics.mean(map(metrics.good, ones)) for ones in (live, ours)]
        off.append(gaps[1] / gaps[0] - 1)
        apart.append(good[1] - good[0])
        values = [
            f"`{cell.contestant}`", f"{cell.load:g}", str(cell.repeat),
            *(f"{share:.1f}" for share in good), *(f"{1e3 * gap:.1f} ms" for gap in gaps),
            f"{100 * off[-1]:+.0f} %",
            *(f"{metrics.tokens_per_s(ones):.0f}" for ones in (live, ours)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(values) + " |")
    lines += [
        "",
        f"Median error of the time between tokens {100 * statistics.median(map(abs, off)):.1f} %; "
        f"good requests apart by {statistics.median(map(abs, apart)):.1f} points at the median, "
        f"by {max(map(abs, apart)):.1f} at most.",
    ]
    return lines


def simulated(
    cell: Cell, settings: Mapping[str, Any], calibration: Calibration, profile: Mapping[str, Any]
) -> list[Served]:
    """The requests of one run as the simulator serves them."""
    options = argparse.Namespace(
        requests=settings["requests"],
        seed=settings["seed"],
        ttft_slo_ms=settings["ttft_slo_ms"],
        tpot_slo_ms=settings["tpot_slo_ms"],
    )
    mix = Mix(**{key: tuple(value) if isinstance(value, list) else value
                 for key, value in settings["mix"].items()})  # fmt: skip
    trace = trace_of(cell, calibration, options, mix)
    name = cell.contestant.removesuffix(PACED)
    policy = "retract" if name in STOCK["cpu"] else name
    hardware = machine_of(settings["setup"], calibration, profile)
    # The replay says how long each answer is to be.
    simulation = Simulation(Setup(hardware, known_lengths=True), policy, trace)
    simulation.run()
    check(simulation)
    return served(simulation)


def machine_of(
    setup: Mapping[str, Any], calibration: Calibration, profile: Mapping[str, Any]
) -> Hardware:
    """This machine as the simulator sees it."""
    compute, layers = profile["compute"], setup["layers"]
    token_bytes = profile["page_bytes"] * layers // setup["page_size"]
    link = setup["link_gb_per_s"]
    filled = FILL * setup["arena_tokens"]
    profiled = layers * (
        compute["constant_s"]
        + compute["per_request_s"] * calibration.step_requests
        + compute["per_token_s"] * filled
    )
    # What a step takes between one client's tokens beyond what its server's profile says.
    around = max(0.0, calibration.step_s - profiled)
    return Hardware(
        name="cpu-live",
        about="the tiny model on the machine of eval-live",
        source="measured by the servers at their start",
        measured=True,
        layers=layers,
        page_size=setup["page_size"],
        kv_bytes_per_token=token_bytes,
        arena_gb=setup["arena_tokens"] * token_bytes / 1e9,
        host_gb=setup["host_memory_gb"],
        h2d_gb_per_s=link,
        d2h_gb_per_s=link,
        chunk_tokens=setup["prefill_chunk"],
        max_running=setup["max_running"],
        ttft_slo_s=0.0,
        costs=Linear(
            constant_s=layers * compute["constant_s"] + around,
            per_request_s=layers * compute["per_request_s"],
            per_token_s=layers * compute["per_token_s"],
            prefill_per_token_s=calibration.prefill_s_per_token,
            prefill_constant_s=calibration.prefill_s,
            tiered_s=TIERED_S,
            copy_slowdown=COPY_SLOWDOWN,
        ),
    )


def profile_of(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> dict[str, Any]:
    """The cost profile that the server of ``run`` measured; stock SGLang has none: another's."""
    for one in (run, *runs):
        if one.get("orbitflow") and one["orbitflow"].get("profile"):
            section = one["orbitflow"]
            return {"compute": section["profile"]["compute"], "page_bytes": section["page_bytes"]}
    raise ValueError("no run has a cost profile")


def _median_gap(ones: Sequence[Served]) -> float:
    """Of all gaps between two tokens, seconds."""
    return statistics.median(gap for one in ones for gap in one.gaps_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
