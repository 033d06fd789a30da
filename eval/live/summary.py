"""The tables of a campaign, from its raw results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.bootstrap import Interval, paired_difference, share_interval
from eval.live.records import Row, from_row
from eval.metrics import (
    PER_REQUEST,
    Served,
    by_run,
    makespan_s,
    metrics,
    shares,
    tokens_per_s,
)

Group = tuple[float, str]  # load, contestant
COLUMNS = (
    ("contestant", "---"),
    ("good %", "---:"),
    ("strict %", "---:"),
    ("generated: good/strict %", "---:"),
    ("tokens on time %", "---:"),
    ("TTFT/TPOT/TBT ok %", "---:"),
    ("gaps ok %, raw/deposited", "---:"),
    ("tokens/s", "---:"),
    ("TTFT P50/P95 s", "---:"),
    ("TBT P95/worst s", "---:"),
    ("errors", "---:"),
    ("other ids", "---:"),
    ("others' cores", "---:"),
)
DIFFERENCES = ("good", "strict", "strict_generated", "tbt_ok_deposited")


def summarise(rows: Sequence[Row], runs: Sequence[Row], baseline: str) -> dict[str, Any]:
    """Metrics of each contestant and load, and how ``baseline`` differs from the others."""
    served = group(rows)
    result: dict[str, Any] = {"baseline": baseline, "loads": {}}
    for load in sorted({load for load, _ in served}):
        names = sorted(name for at, name in served if at == load)
        entry: dict[str, Any] = {"contestants": {}, "differences": {}}
        for name in names:
            ours = [run for run in runs if (run["load"], run["contestant"]) == (load, name)]
            entry["contestants"][name] = _contestant(served[load, name], ours)
        for name in names:
            if baseline in names and name != baseline:
                entry["differences"][name] = compare(served[load, baseline], served[load, name])
        result["loads"][f"{load:g}"] = entry
    cleaned: dict[str, Any] = _clean(result)
    return cleaned


def group(rows: Sequence[Row]) -> dict[Group, list[Served]]:
    """The requests of all repeats of each contestant at each load."""
    found: dict[Group, list[Served]] = {}
    for row in rows:
        found.setdefault((row["load"], row["contestant"]), []).append(from_row(row))
    return found


def compare(ours: Sequence[Served], theirs: Sequence[Served]) -> dict[str, Any]:
    """Ours minus theirs, paired by repeat and request; shares, not percent."""
    result = {}
    for metric, test in PER_REQUEST.items():
        left, right = (
            {(one.repeat, one.rid): float(test(one)) for one in side} for side in (ours, theirs)
        )
        difference = paired_difference(left, right)
        repeats = sorted({repeat for repeat, _ in left.keys() & right.keys()})
        each = [_mean_difference(left, right, repeat) for repeat in repeats]
        result[metric] = difference.as_dict() | {"tie": difference.tie, "by_repeat": each}
    return result


def markdown(summary: Mapping[str, Any]) -> str:
    """A table of metrics and one of differences for each load."""
    lines = []
    for load, entry in summary["loads"].items():
        lines += [f"## Load {load}", ""]
        lines += [_cells(title for title, _ in COLUMNS), _cells(rule for _, rule in COLUMNS)]
        contestants: Mapping[str, Any] = entry["contestants"]
        ranked = sorted(contestants, key=lambda name: -contestants[name]["good"])
        lines += [_line(name, contestants[name]) for name in ranked]
        if entry["differences"]:
            lines += ["", *_differences(summary["baseline"], entry["differences"])]
        lines.append("")
    return "\n".join(lines)


def _contestant(served: Sequence[Served], runs: Sequence[Row]) -> dict[str, Any]:
    repeats = by_run(served)
    rates = [tokens_per_s(run) for run in repeats.values()]
    intervals = {
        name: _interval_dict(share_interval(*pair)) for name, pair in shares(served).items()
    }
    return metrics(served) | {
        "repeats": len(repeats),
        "tokens_per_s": sum(rates) / len(rates),
        "tokens_per_s_by_repeat": rates,
        "makespan_s_by_repeat": [makespan_s(run) for run in repeats.values()],
        "code_by_repeat": [run.get("code") for run in runs],
        "mismatches": sum(run["mismatches"] for run in runs),
        "failed_idle_checks": _total(runs, "failed_idle_checks"),
        "problems": [run["problem"] for run in runs if run.get("problem")],
        "most_late_s": max((run.get("most_late_s") or 0.0 for run in runs), default=0.0),
        "others_cores_by_repeat": [run.get("others_cores", 0.0) for run in runs],
        "intervals": intervals,
    }


def _interval_dict(interval: Interval) -> list[float]:
    return [round(interval.low, 5), round(interval.high, 5)]


def _mean_difference(
    left: Mapping[tuple[int, str], float], right: Mapping[tuple[int, str], float], repeat: int
) -> float:
    common = [key for key in left.keys() & right.keys() if key[0] == repeat]
    return round(sum(left[key] - right[key] for key in common) / len(common), 5)


def _total(runs: Sequence[Row], field: str) -> int | None:
    values = [run[field] for run in runs if run.get(field) is not None]
    return sum(values) if values else None


def _line(name: str, of: Mapping[str, Any]) -> str:
    def share(*fields: str) -> str:
        return "/".join(_number(of[field], 100, ".0f") for field in fields)

    def spread(field: str) -> str:
        low, high = of["intervals"][field]
        return f"{share(field)} ({_number(low, 100, '.0f')}-{_number(high, 100, '.0f')})"

    def seconds(*fields: str) -> str:
        return "/".join(_number(of[field], 1, ".3f" if "tbt" in fields[0] else ".1f")
                        for field in fields)  # fmt: skip

    return _cells(
        (
            f"`{name}`",
            spread("good"),
            spread("strict"),
            share("good_generated", "strict_generated"),
            share("tokens_on_time"),
            share("ttft_ok", "tpot_ok", "tbt_ok"),
            share("gaps_ok", "gaps_ok_deposited"),
            _number(of["tokens_per_s"], 1, ".0f"),
            seconds("ttft_p50_s", "ttft_p95_s"),
            seconds("tbt_p95_s", "worst_gap_s"),
            str(of["errors"]),
            str(of["mismatches"]),
            _number(max(of["others_cores_by_repeat"], default=0.0), 1, ".1f"),
        )
    )


def _differences(baseline: str, differences: Mapping[str, Any]) -> list[str]:
    titles = [f"`{baseline}` minus", *(f"{name}, points" for name in DIFFERENCES), "good, repeats"]
    lines = [_cells(titles), _cells(["---", *["---:"] * (len(titles) - 1)])]
    for name, of in differences.items():
        each = " ".join(f"{100 * value:+.1f}" for value in of["good"]["by_repeat"])
        lines.append(_cells([f"`{name}`", *(_points(of[one]) for one in DIFFERENCES), each]))
    return lines


def _points(difference: Mapping[str, Any]) -> str:
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}){' tie' if difference['tie'] else ''}"


def _cells(values: Any) -> str:
    return "| " + " | ".join(values) + " |"


def _number(value: float | None, factor: float, form: str) -> str:
    return "never" if value is None else format(value * factor, form)


def _clean(value: Any) -> Any:
    """JSON has neither infinity nor NaN."""
    if isinstance(value, dict):
        return {key: _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
