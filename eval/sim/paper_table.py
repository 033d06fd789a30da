"""The paper's claims beside what the simulated runs of its setting say, in its own definitions.

Its numbers are typed in, as quoted from it: those of its abstract, and of its figures as others
have noted them down. Everything else comes from the runs of the study ``paper`` and, for what a
plan takes, from ``make bench-planner``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.sim import studies
from eval.sim.tables import NONE, Cells, Row, mean, number

Methods = Mapping[str, Mapping[int, Row]]  # of a cell: method, seed
TBT, DEPOSITED = "paper_tbt_attainment", "paper_tbt_attainment_deposited"
THEIRS, UNIFORM = "paper", "paper-uniform"
DEEPSPEED, FLEXGEN = "next-layer", "static:1"  # what the paper calls these policies
BASELINES = tuple(name for name in studies.PAPERS if name not in (THEIRS, UNIFORM))
IN_ITS_PLACE = (THEIRS, studies.OURS[0])  # whose numbers stand beside the paper's
ABLATION = (  # Fig. 14a: TBT attainment at SLO scale 1, percent
    ("one distance for all", 45.1, UNIFORM, TBT),
    ("a distance for each request", 54.5, studies.REQUEST_WISE, TBT),
    ("and pauses", 71.0, THEIRS, TBT),
    ("and token deposit", 85.6, THEIRS, DEPOSITED),
)
# Of the planner's benchmark, nearest to the setting: requests, layers, who decodes left to it.
PLANNER_CASE = (8, 32, "alone")


@dataclass(frozen=True)
class Claim:
    """``of(methods, name)``: its values in one cell, with the method ``name`` as OrbitFlow."""

    words: str
    paper: str
    of: Callable[[Methods, str], Sequence[float]]
    factor: float = 100
    form: str = "+.0f"


def _of(metric: str) -> Callable[[Methods, str], Sequence[float]]:
    return lambda methods, name: [mean(methods[name], metric)]


def _against(
    metric: str, others: Sequence[str], baseline_metric: str | None = None
) -> Callable[[Methods, str], Sequence[float]]:
    """Relative to each of ``others``, as a gain; nothing where there is no run, or 0."""

    def gains(methods: Methods, name: str) -> Sequence[float]:
        ours = mean(methods[name], metric)
        theirs = [mean(methods[other], baseline_metric or metric) for other in others
                  if other in methods]  # fmt: skip
        return [ours / one - 1 for one in theirs if one > 0]

    return gains


def _best(
    metric: str, others: Sequence[str], baseline_metric: str | None = None
) -> Callable[[Methods, str], Sequence[float]]:
    """Relative to the best of ``others``, as a gain."""
    each = _against(metric, others, baseline_metric)

    def gain(methods: Methods, name: str) -> Sequence[float]:
        gains = each(methods, name)
        return [min(gains)] if gains else []

    return gain


def _highest(metric: str, others: Sequence[str]) -> Callable[[Methods, str], Sequence[float]]:
    def highest(methods: Methods, _: str) -> Sequence[float]:
        found = [mean(methods[name], metric) for name in others if name in methods]
        return [max(found)] if found else []

    return highest


def _plans(methods: Methods, name: str) -> Sequence[float]:
    return [row["metrics"]["plans"] / row["metrics"]["requests"] for row in methods[name].values()]


def _planning(plan_s: float) -> Callable[[Methods, str], Sequence[float]]:
    def share(methods: Methods, name: str) -> Sequence[float]:
        if name == THEIRS:  # another model, of whose solves the benchmark of ours says nothing
            return []
        rows = [row["metrics"] for row in methods[name].values()]
        return [plan_s * row["plans"] / row["makespan_s"] for row in rows]

    return share


def claims(plan_s: float) -> Sequence[Claim]:
    """What the paper says of its system, in its definitions; a plan takes ``plan_s`` seconds."""
    but_deepspeed = [name for name in BASELINES if name != DEEPSPEED]
    tpot, p95, p99 = "paper_tpot_attainment", "paper_p95_tbt_ratio", "paper_p99_tbt_ratio"
    speed = "throughput_tokens_per_s"
    return (
        Claim("TBT attainment, with deposit", "above 75 %", _of(DEPOSITED), form=".0f"),
        Claim("that of the best other, without", "about 50 %", _highest(TBT, BASELINES),
              form=".0f"),
        Claim("TBT attainment against the best other", "up to +66 %, +48 % in its first version",
              _best(DEPOSITED, BASELINES, TBT)),
        Claim("both with deposit", "not given", _best(DEPOSITED, BASELINES)),
        Claim("TPOT attainment against the best other", "up to +62 %, +66 % in its first version",
              _best(tpot, BASELINES)),
        Claim("P95 TBT against every other", "-38 %", _against(p95, BASELINES)),
        Claim(f"P95 TBT against DeepSpeed (`{DEEPSPEED}`)", "-68.6 %", _against(p95, [DEEPSPEED])),
        Claim(f"P95 TBT against FlexGen (`{FLEXGEN}`)", "-21.7 %", _against(p95, [FLEXGEN])),
        Claim("P99 TBT against DeepSpeed", "-65 %", _against(p99, [DEEPSPEED])),
        Claim("P99 TBT against the rest", "-3 to -9 %", _against(p99, but_deepspeed)),
        Claim("tokens/s against DeepSpeed", "up to +230 %", _against(speed, [DEEPSPEED])),
        Claim("tokens/s against the rest", "+4 to +52 %", _against(speed, but_deepspeed)),
        Claim("plans a request", "1.25 to 48", _plans, 1, ".1f"),
        Claim("planning, of all time", "0.27 to 0.64 %", _planning(plan_s), form=".2f"),
    )  # fmt: skip


def table(cells: Cells, plan_s: float) -> list[str]:
    """Each claim: median and range over settings, seeds' means (and other methods)."""
    columns = [
        (f"{profile}, `{name}`", [methods for methods in group if name in methods], name)
        for profile, group in _by_profile(cells)
        for name in IN_ITS_PLACE
    ]
    columns = [column for column in columns if column[1]]
    if not columns:
        return []
    lines = ["| | paper | " + " | ".join(title for title, *_ in columns) + " |"]
    lines += ["|---|---|" + "---:|" * len(columns)]
    for claim in claims(plan_s):
        values = [
            _range([x for methods in group for x in claim.of(methods, name)], claim)
            for _, group, name in columns
        ]
        lines.append(f"| {claim.words} | {claim.paper} | " + " | ".join(values) + " |")
    return [*lines, ""]


def attainment(cells: Cells) -> list[str]:
    """TBT attainment as in the paper's figures, and good requests, by SLO scale and rate."""
    lines = []
    names = [*studies.PAPERS, studies.REQUEST_WISE, "swap+order", *studies.OURS]
    with_deposit = (THEIRS, *studies.OURS)
    for profile, _ in _by_profile(cells):
        ordered = sorted((cell for cell, methods in cells.items() if _profile(methods) == profile),
                         key=lambda cell: cell.name)  # fmt: skip
        settings = [cell.name.removeprefix(f"{profile}, ") for cell in ordered]
        lines += [f"| {profile} | " + " | ".join(settings) + " |"]
        lines += ["|---|" + "---:|" * len(ordered)]
        for name in names:
            values = []
            for cell in ordered:
                rows = cells[cell].get(name, {})
                tbt = mean(rows, DEPOSITED if name in with_deposit else TBT)
                good = mean(rows, "good_requests")
                values.append(f"{number(tbt, 100, '.0f')} ({number(good, 100, '.0f')})")
            if set(values) != {f"{NONE} ({NONE})"}:
                lines.append(f"| `{name}` | " + " | ".join(values) + " |")
        lines.append("")
    return lines


def ablation(cells: Cells) -> list[str]:
    """Steps and cells as far as there are runs of them."""
    names = {name for _, _, name, _ in ABLATION}
    tight = [
        cell for cell, methods in sorted(cells.items(), key=lambda one: one[0].name)
        if "slo_scale 1.0" in cell.name and names & methods.keys()
    ]  # fmt: skip
    if not tight:
        return []
    lines = ["TBT attainment at SLO scale 1, in percent, in the paper's definition:", ""]
    lines += ["| step | paper | " + " | ".join(cell.name for cell in tight) + " |"]
    lines += ["|---|---:|" + "---:|" * len(tight)]
    for step, theirs, name, metric in ABLATION:
        ours = [number(mean(cells[cell].get(name, {}), metric), 100, ".1f") for cell in tight]
        if set(ours) != {NONE}:
            lines.append(f"| {step} | {theirs} | " + " | ".join(ours) + " |")
    return [*lines, ""]


def plan_seconds(path: Path) -> float:
    """Of the median plan of ``PLANNER_CASE``; NaN where it is not there."""
    if not path.exists():
        return math.nan
    for row in json.loads(path.read_text(encoding="utf-8"))["speed"]:
        if (row["units"], row["layers"], row["use"]) == PLANNER_CASE:
            return float(row["solve_p50_ms"]) / 1e3
    return math.nan


def _by_profile(cells: Cells) -> Iterator[tuple[str, list[Methods]]]:
    for profile in sorted({_profile(methods) for methods in cells.values()}):
        yield profile, [methods for methods in cells.values() if _profile(methods) == profile]


def _profile(methods: Methods) -> str:
    row = next(iter(next(iter(methods.values())).values()))
    return str(row["scenario"]["profile"])


def _range(values: Sequence[float], claim: Claim) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return NONE
    middle, *ends = (
        number(value, claim.factor, claim.form)
        for value in (statistics.median(known), min(known), max(known))
    )
    return middle if len(known) == 1 else f"{middle} ({' to '.join(ends)})"
