"""Tables of the simulated evaluation: methods over seeds, and paired differences with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from eval.sim.scenario import Scenario
from eval.sim.studies import method_name

Row = Mapping[str, Any]
CONFIDENCE = 0.95
NONE = "–"
NOT_WORSE = -0.01  # lower bound of a paired difference that still counts as as good
Column = tuple[str, str, float, str]  # title, metric, factor, format
COLUMNS: Sequence[Column] = (
    ("good", "good_requests", 100, ".1f"),
    ("strict", "good_requests_strict", 100, ".1f"),
    ("strict as generated", "good_requests_strict_generated", 100, ".1f"),
    ("on time", "tokens_on_time", 100, ".1f"),
    ("TTFT", "ttft_attainment", 100, ".0f"),
    ("TPOT", "tpot_attainment", 100, ".0f"),
    ("TBT", "tbt_attainment", 100, ".1f"),
    ("TBT deposited", "tbt_attainment_deposited", 100, ".1f"),
    ("tokens/s", "throughput_tokens_per_s", 1, ".0f"),
    ("P95 TTFT s", "p95_ttft_s", 1, ".1f"),
    ("P95 TBT s", "p95_tbt_s", 1, ".3f"),
    ("worst gap s", "worst_gap_s", 1, ".1f"),
)


@dataclass(frozen=True)
class Difference:
    """Of two methods over the same seeds: the mean, and half the width of its interval."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    def text(self, factor: float = 100) -> str:
        """In points, with what is inside the interval marked as a tie; without seeds nothing."""
        if not self.seeds:
            return NONE
        if self.seeds == 1:
            return f"{factor * self.mean:+.1f} (one seed)"
        tie = " tie" if abs(self.mean) <= self.half else ""
        return f"{factor * self.mean:+.1f} ± {factor * self.half:.1f}{tie}"


@dataclass(frozen=True)
class CellKey:
    """A workload on a machine at a load: what methods are compared within."""

    name: str

    @staticmethod
    def of(row: Row) -> CellKey:
        """Everything of the scenario that is neither the method nor the seed, in words."""
        values = row["scenario"]
        default = Scenario(values["profile"], "")
        words = [values["profile"], values["mix"] or values["trace"]]
        for name in ("load", "rate", "speed"):
            if values[name] is not None:
                words.append(f"{name} {values[name]:g}")
        skipped = ("profile", "policy", "seed", "paced", "known_lengths", "mix", "trace", "load",
                   "rate", "speed", "skip", "requests", "oversize")  # fmt: skip
        for name, value in values.items():
            if name not in skipped and value != getattr(default, name):
                words.append(name if value is True else f"{name} {value}")
        return CellKey(", ".join(words))


Cells = dict[CellKey, dict[str, dict[int, Row]]]  # method, seed


def grouped(rows: Iterable[Row]) -> Cells:
    """Runs by cell, method and seed."""
    cells: Cells = {}
    for row in rows:
        name = method_name(Scenario(**row["scenario"]))
        cells.setdefault(CellKey.of(row), {}).setdefault(name, {})[row["scenario"]["seed"]] = row
    return cells


def difference(ours: Mapping[int, Row], theirs: Mapping[int, Row], metric: str) -> Difference:
    """Ours minus theirs, paired by seed; the interval is Student's."""
    seeds = sorted(ours.keys() & theirs.keys())
    values = [
        (ours[seed]["metrics"][metric] or 0.0) - (theirs[seed]["metrics"][metric] or 0.0)
        for seed in seeds
    ]
    if len(values) < 2:
        return Difference(values[0] if values else math.nan, math.inf, len(values))
    spread = statistics.stdev(values) / math.sqrt(len(values))
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return Difference(statistics.mean(values), quantile * spread, len(values))


def mean(rows: Mapping[int, Row], metric: str) -> float:
    """Over seeds; NaN where a run has no such number."""
    values = [row["metrics"][metric] for row in rows.values()]
    if not values or any(value is None for value in values):
        return math.nan
    return statistics.mean(values)


def cell_table(
    methods: Mapping[str, Mapping[int, Row]], baseline: str, columns: Sequence[Column] = COLUMNS
) -> list[str]:
    """One cell: a line for each method, best first, and how ``baseline`` differs in good."""
    head = ["method", *(title for title, *_ in columns), f"`{baseline}` minus, good"]
    lines = [_cells(head), _cells(["---", *["---:"] * (len(head) - 1)])]
    for name in sorted(methods, key=lambda one: (-mean(methods[one], "good_requests"), one)):
        values = [number(mean(methods[name], metric), factor, form)
                  for _, metric, factor, form in columns]  # fmt: skip
        if name == baseline or baseline not in methods:
            values.append("")
        else:
            values.append(difference(methods[baseline], methods[name], "good_requests").text())
        lines.append(_cells([f"`{name}`", *values]))
    return lines


def worse(
    cells: Cells, ours: str, metric: str, methods: Sequence[str] | None = None
) -> list[tuple[CellKey, str, Difference]]:
    """Where ``ours`` is not as good as a method, worst first: the interval reaches below
    ``NOT_WORSE``."""
    found = []
    for cell, by_method in cells.items():
        for name, rows in by_method.items():
            if ours not in by_method or name == ours or (methods and name not in methods):
                continue
            paired = difference(by_method[ours], rows, metric)
            if paired.low < NOT_WORSE:
                found.append((cell, name, paired))
    return sorted(found, key=lambda one: one[2].mean)


def wide(cells: Cells, ours: str, metric: str, most: float = 0.03) -> list[tuple[CellKey, str]]:
    """Where the interval is too wide to say: more seeds are needed."""
    return [
        (cell, name)
        for cell, by_method in cells.items()
        for name, rows in by_method.items()
        if ours in by_method
        and name != ours
        and difference(by_method[ours], rows, metric).half > most
    ]


def _cells(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def number(value: float, factor: float, form: str) -> str:
    return NONE if math.isnan(value) else format(value * factor, form)
