"""``make eval-full``: every run of the evaluation, kept as it comes.

It takes hours and can be stopped at any time: a run is done again only when its scenario, or
code that its result depends on, has changed. With --seeds or --skip the other runs of a study
stay as they are, made by whatever code. Finished studies are written compressed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from eval.bench.measure import (
    QUICK_RESULTS,
    ROOT,
    hash_of_files,
    write_result,
    write_whole,
)
from eval.sim import studies
from eval.sim.scenario import Scenario, drained, run, unloaded

RESULTS = ROOT / "eval" / "results" / "sim"
UNFINISHED = ROOT / ".cache" / "eval" / "sim"
DECISIVE = (  # what results depend on
    *("orbitflow_sglang/control/*.py", "orbitflow_sglang/planner/*.py", "orbitflow_sglang/slo.py"),
    *("eval/sim/*", "eval/metrics.py", "eval/workload/*.py", "eval/traces/*.gz"),
)
AROUND = {  # but not these
    *(ROOT / "eval" / "sim" / f"{name}.py"
      for name in ("against_live", "campaign", "figures", "paper_table", "report", "studies",
                   "tables")),
    ROOT / "orbitflow_sglang" / "planner" / "worker.py",  # the server's process for planning
}  # fmt: skip
Row = dict[str, Any]


@cache
def code_hash() -> str:
    """Of all files that a result depends on."""
    return hash_of_files(DECISIVE, AROUND)


def key_of(scenario: dict[str, Any]) -> str:
    """Names a scenario, whatever the code."""
    return hashlib.sha256(orjson.dumps(scenario, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def row_of(scenario: Scenario, load_1: float | None = None) -> Row:
    """One finished run as it is kept: its metrics, and a hash of its requests' rows."""
    finished = run(scenario, load_1).as_dict()
    rows = orjson.dumps(finished.pop("rows"))
    return finished | {"rows_sha256": hashlib.sha256(rows).hexdigest(), "code": code_hash()}


def read(path: Path) -> list[Row]:
    """The runs in a file; none if there is none."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    return [orjson.loads(line) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> None:
    """The runs, sorted by scenario; equal runs make equal files."""
    lines = sorted(orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(b"\n".join(lines) + b"\n", mtime=0))


def finish(
    study: str,
    scenarios: Sequence[Scenario],
    folder: Path,
    workers: int,
    now: Sequence[Scenario] | None = None,
) -> list[Row]:
    """The runs of a study: those there are, and the rest, or those of it to be done ``now``.

    What earlier code made is done again, or stays where it is not asked for now.
    """
    part, whole = UNFINISHED / f"{study}.jsonl", folder / f"{study}.jsonl.gz"
    stored = sorted((*read(whole), *read(part)), key=_is_current)  # where there are two, current
    known = {key_of(row["scenario"]): row for row in stored}
    done = {key for key, row in known.items() if _is_current(row)}
    every = [key_of(scenario.as_dict()) for scenario in scenarios]
    asked = scenarios if now is None else now
    missing = [scenario for scenario in asked if key_of(scenario.as_dict()) not in done]
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        for row in _progress(study, run_all(missing, workers), len(missing)):
            known[key_of(row["scenario"])] = row
            file.write(orjson.dumps(row) + b"\n")
            file.flush()
    found = [known[key] for key in every if key in known]
    write(whole, found)
    part.unlink()
    return found


def _is_current(row: Row) -> bool:
    return bool(row["code"] == code_hash())


def first_seeds(scenarios: Iterable[Scenario], count: int | None) -> list[Scenario]:
    """Of each cell those with its ``count`` lowest seeds; None: all."""
    found = list(scenarios)
    if count is None:
        return found
    seeds: dict[Scenario, set[int]] = {}
    for scenario in found:
        seeds.setdefault(_cell_of(scenario), set()).add(scenario.seed)
    kept = {cell: sorted(of_cell)[:count] for cell, of_cell in seeds.items()}
    return [scenario for scenario in found if scenario.seed in kept[_cell_of(scenario)]]


def _cell_of(scenario: Scenario) -> Scenario:
    return replace(scenario, policy="", seed=0, skip=0, paced=False, known_lengths=False)


def run_all(scenarios: Sequence[Scenario], workers: int) -> Iterator[Row]:
    """Rows as they come, in any order; the paper's plans take longest, and so begin first."""
    with ProcessPoolExecutor(workers, initializer=_quiet) as pool:
        loaded = [scenario for scenario in scenarios if scenario.load is not None]
        workloads = list(dict.fromkeys(map(unloaded, loaded)))
        load_1 = dict(zip(workloads, pool.map(drained, workloads), strict=True))
        waiting = [
            pool.submit(row_of, scenario, load_1.get(unloaded(scenario)))
            for scenario in sorted(scenarios, key=lambda one: not one.policy.startswith("paper"))
        ]
        for done in as_completed(waiting):
            yield done.result()


def _quiet() -> None:
    """HiGHS prints to file descriptor 1 now and then: away from the progress bar."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _progress(study: str, rows: Iterator[Row], total: int) -> Iterator[Row]:
    begun = time.monotonic()
    for done, row in enumerate(rows, start=1):
        yield row
        spent = time.monotonic() - begun
        left = spent / done * (total - done)
        bar = "#" * (30 * done // total)
        end = "\n" if done == total else ""
        print(f"\r{study:10} [{bar:30}] {done}/{total}, {left / 60:4.0f} min left",
              end=end, flush=True)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.sim.campaign", description=(__doc__ or "").replace("``", "")
    )
    add = parser.add_argument
    add("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(studies.STUDIES)} (all)")
    add("--quick", action="store_true", help="a smoke run of under a minute, and its report")
    add("--seeds", type=int, metavar="N", help="now only the first N of each cell")
    add("--skip", nargs="+", default=[], metavar="METHOD", help="not now: paper takes longest")
    add("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    unknown = set(options.studies) - set(studies.STUDIES)
    if unknown:
        parser.error(f"no such study: {', '.join(sorted(unknown))}")
    if options.quick:
        from eval.sim import report

        folder = QUICK_RESULTS / "sim"
        rows = finish("quick", list(studies.quick()), folder, options.workers)
        print(report.comparison(rows, studies.OURS[0]))
        return 0
    for name in options.studies or studies.STUDIES:
        every = list(studies.STUDIES[name]())
        now = [
            scenario
            for scenario in first_seeds(every, options.seeds)
            if studies.method_name(scenario) not in options.skip
        ]
        finish(name, every, RESULTS, options.workers, now)
    write_result(RESULTS / "runs.json", argv, {"studies": dict(_finished(RESULTS))})
    return 0


def _finished(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is of each study. A window of a trace counts as a seed."""
    for name in studies.STUDIES:
        if rows := read(folder / f"{name}.jsonl.gz"):
            seeds = sorted({row["scenario"]["seed"] for row in rows})
            code = sorted({row["code"] for row in rows})
            yield name, {"runs": len(rows), "seeds": seeds, "code": code}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
