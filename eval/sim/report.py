"""``make eval``: tables and figures from the committed runs, of which a sample is run again.

Nothing in the report is typed in but the paper's own numbers: it is what the runs say, and it
fails when one of the sample, whatever code made it, says something else by now. Two figures are
no committed runs but simulated afresh: see ``figures``.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bench.measure import ROOT, write_result
from eval.sim import campaign, figures, paper_table, studies
from eval.sim.campaign import RESULTS, Row, key_of
from eval.sim.scenario import Scenario
from eval.sim.tables import (
    NONE,
    CellKey,
    Difference,
    cell_table,
    difference,
    grouped,
    wide,
    worse,
)
from orbitflow_sglang.control.policies import RULES

SAMPLE = 40
PLANNER = ROOT / "eval" / "results" / "cpu" / "planner.json"
CLAIMS = (  # ours, the metric, and how it is said
    ("orbitflow@paced", "good_requests", "good requests, clients asking for paced delivery"),
    ("orbitflow", "good_requests_strict_generated", "strict as generated, without pacing"),
)
PAPER_COLUMNS = (
    ("paper's TBT", "paper_tbt_attainment", 100, ".1f"),
    ("deposited", "paper_tbt_attainment_deposited", 100, ".1f"),
    ("TPOT", "paper_tpot_attainment", 100, ".1f"),
    ("P95 TBT / SLO", "paper_p95_tbt_ratio", 1, ".2f"),
    ("good", "good_requests", 100, ".1f"),
    ("TBT", "tbt_attainment", 100, ".1f"),
    ("tokens/s", "throughput_tokens_per_s", 1, ".0f"),
    ("P95 TTFT s", "p95_ttft_s", 1, ".0f"),
    ("P95 TBT s", "p95_tbt_s", 1, ".3f"),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.sim.report", description=(__doc__ or "").replace("``", "")
    )
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, help="folder of the runs (%(default)s)")
    add("--sample", type=int, default=SAMPLE, metavar="N", help="runs done again (%(default)s)")
    add("--seed", type=int, default=0, help="of the sample (%(default)s)")
    add("--no-figures", action="store_true")
    options = parser.parse_args(argv)
    found = {name: campaign.read(options.results / f"{name}.jsonl.gz") for name in studies.STUDIES}
    every = [row for rows in found.values() for row in rows]
    if not every:
        print(f"{options.results} has no runs: make eval-full", file=sys.stderr)
        return 1
    again = run_again(every, options.sample, options.seed)
    differing = [str(one) for one in again if one.differs]
    for line in differing:
        print(line, file=sys.stderr)
    text = "\n".join(_report(found, again))
    (options.results / "report.md").write_text(text, encoding="utf-8")
    if not options.no_figures:
        figures.draw(found, options.results)
    write_result(
        options.results / "report.json",
        argv,
        {"runs": len(every), "run_again": len(again), "differing": differing},
    )
    return 1 if differing else 0


@dataclass(frozen=True)
class Again:
    """A stored run that was done again."""

    scenario: dict[str, Any]
    earlier: bool  # made by earlier code
    differs: tuple[str, ...]  # in which parts

    def __str__(self) -> str:
        maker = " of earlier code" if self.earlier else ""
        return f"a run{maker} differs in {', '.join(self.differs)}: {self.scenario}"


def run_again(rows: Sequence[Row], count: int, seed: int) -> list[Again]:
    """Does a sample of the stored runs again, with the code as it is."""
    ordered = sorted(rows, key=lambda row: key_of(row["scenario"]))
    sample = random.Random(seed).sample(ordered, min(count, len(ordered)))
    scenarios = [Scenario(**row["scenario"]) for row in sample]
    again = campaign.run_all(scenarios, os.cpu_count() or 1)
    fresh_of = {key_of(fresh["scenario"]): fresh for fresh in again}
    found = []
    for stored in sample:
        fresh = fresh_of[key_of(stored["scenario"])]
        parts = tuple(part for part in ("metrics", "rows_sha256") if stored[part] != fresh[part])
        found.append(Again(stored["scenario"], _is_earlier(stored), parts))
    return found


def comparison(rows: Iterable[Row], baseline: str) -> str:
    """A table for each cell of these runs."""
    lines = []
    for cell, methods in sorted(grouped(rows).items(), key=lambda one: one[0].name):
        lines += [f"### {cell.name}", "", *cell_table(methods, baseline), ""]
    return "\n".join(lines)


# --- the report -----------------------------------------------------------------


def _report(found: dict[str, list[Row]], again: Sequence[Again] = ()) -> list[str]:
    lines = [
        "# Simulated evaluation",
        "",
        "Made by `make eval` from the runs beside this file; `docs/evaluation.md` says what the "
        "numbers mean. Shares in percent. Differences are paired by seed, with 95 % intervals; "
        "`~lengths` is told how long each answer will be, `@paced` asks for paced delivery.",
        "",
    ]
    lines += _by_earlier_code([row for rows in found.values() for row in rows], again)
    lines += _claims(found)
    lines += _ablation(found["ablation"]) + _paper(found["paper"])
    for name in ("mixes", "close", "machines", "traces", "contexts", "modelling", "crossover"):
        if found[name]:
            lines += [f"## {name.capitalize()}", "", comparison(found[name], studies.OURS[0])]
    return lines


def _is_earlier(row: Row) -> bool:
    return bool(row["code"] != campaign.code_hash())


def _by_earlier_code(rows: Sequence[Row], again: Sequence[Again]) -> list[str]:
    """Says so where runs were kept while the code went on, and whether that matters."""
    earlier = sum(map(_is_earlier, rows))
    if not earlier:
        return []
    tried = [one for one in again if one.earlier]
    same = sum(not one.differs for one in tried)
    return [
        f"Of the {len(rows)} runs {earlier} were made by earlier code; of {len(tried)} of these "
        f"that were done again with the code as it is, {same} came out the same.",
        "",
    ]


def _claims(found: dict[str, list[Row]]) -> list[str]:
    """Where ours is not as good as another, first; then what was compared."""
    rows = [row for name in ("mixes", "close", "machines", "traces") for row in found[name]]
    cells = grouped(rows)
    lines = ["## Where it is not as good", ""]
    for ours, metric, words in CLAIMS:
        told = [name for name in studies.MAIN if name.endswith(studies.LENGTHS)]
        others = [name for name in studies.MAIN if name not in (*told, *studies.OURS)]
        lines += [f"### {ours}: {words}", ""]
        failing = worse(cells, ours, metric, others)
        compared = sum(
            len(set(others) & methods.keys()) for methods in cells.values() if ours in methods
        )
        lines += [
            f"{compared} comparisons with methods that do not know output lengths, in "
            f"{len(cells)} cells: {len(failing)} with an interval that reaches below -1 point.",
            "",
        ]
        lines += _failing(failing)
        known = worse(cells, ours, metric, told)
        lines += [f"Against methods that are told output lengths {len(known)} do.", ""]
        lines += _failing(known)
        unsure = wide(cells, ours, metric)
        if unsure:
            lines += [f"In {len(unsure)} comparisons half the interval is above 3 points.", ""]
    return lines


def _failing(failing: Sequence[tuple[CellKey, str, Difference]]) -> list[str]:
    """The comparisons; of those with one seed, which has no interval, only how many."""
    rows = [
        f"| {cell.name} | `{name}` | {paired.text()} |"
        for cell, name, paired in failing
        if paired.seeds > 1
    ]
    lines = ["| cell | method | difference |", "|---|---|---:|", *rows, ""] if rows else []
    single = len(failing) - len(rows)
    if single:
        lines += [f"Not listed: {single} with one seed at most.", ""]
    return lines


def _ablation(rows: list[Row]) -> list[str]:
    """What each rule brings: ours minus ours without it, in points of good requests."""
    if not rows:
        return []
    lines = ["## What each rule brings", "", "Points of good requests (strict as generated).", ""]
    for ours in studies.OURS:
        cells = {cell: methods for cell, methods in grouped(rows).items() if ours in methods}
        paced = studies.PACED if ours.endswith(studies.PACED) else ""
        names = [f"orbitflow:no-{rule}{paced}" for rule in RULES]
        names = [name for name in names if any(name in methods for methods in cells.values())]
        if not names:
            continue
        ordered = sorted(cells, key=lambda cell: cell.name)
        head = [f"`{ours}` minus", *(cell.name for cell in ordered)]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(ordered)]
        for name in names:
            values = []
            for cell in ordered:
                methods = cells[cell]
                if name not in methods:
                    values.append(NONE)
                    continue
                good, strict = (
                    difference(methods[ours], methods[name], metric).text()
                    for metric in ("good_requests", "good_requests_strict_generated")
                )
                values.append(f"{good} ({strict})")
            lines.append(f"| `{name}` | " + " | ".join(values) + " |")
        lines.append("")
    return lines


def _paper(rows: list[Row]) -> list[str]:
    """The paper's claims and ablation, and its definitions beside honest ones."""
    if not rows:
        return []
    cells = grouped(rows)
    lines = [
        "## The paper's setting",
        "",
        "What it says of OrbitFlow, and what its policy and ours come to here in its definitions; "
        "of several settings or methods the median and the range. Percent where not said.",
        "",
        *paper_table.table(cells, paper_table.plan_seconds(PLANNER)),
        *paper_table.ablation(cells),
        "TBT attainment as in its figures, deposit for OrbitFlow alone; in brackets good requests:",
        "",
        *paper_table.attainment(cells),
    ]
    for cell, methods in sorted(cells.items(), key=lambda one: one[0].name):
        lines += [f"### {cell.name}", ""]
        lines += [*cell_table(methods, studies.OURS[0], PAPER_COLUMNS), ""]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
