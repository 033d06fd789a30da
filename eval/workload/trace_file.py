"""Traces as CSV: ``arrival_s,input_tokens,output_tokens`` and, optionally, what else is known.

prefix_id, prefix_tokens                     the first tokens are those of others with that id
ttft_slo_ms, tpot_slo_ms, tbt_slo_ms         targets of the request; empty: none of its own
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from eval import traces
from eval.workload.requests import NO_SLO, TraceRequest
from orbitflow_sglang.slo import SLO

REQUIRED = ("arrival_s", "input_tokens", "output_tokens")
TARGETS = ("ttft_slo_ms", "tpot_slo_ms", "tbt_slo_ms")
OPTIONAL = ("prefix_id", "prefix_tokens", *TARGETS)


class BadTrace(ValueError):
    """A trace that cannot be read; the message has its line."""


def load(name: str | Path) -> list[TraceRequest]:
    """The trace in a file, or of that name among those that come with the project.

    Raises ``BadTrace``, which names file, line and reason.
    """
    path = Path(name)
    if not path.exists():
        known = sorted(file.name.removesuffix(".csv.gz") for file in traces.FOLDER.glob("*.gz"))
        path = traces.FOLDER / f"{name}.csv.gz"
        if str(name) not in known:
            raise BadTrace(f"{name}: no such file, and none of the traces {', '.join(known)}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            return read(file, str(name))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadTrace(f"{name}: {error}") from None


def read(file: Iterable[str], name: str) -> list[TraceRequest]:
    """A trace, in the order of arrival. Raises ``BadTrace``."""
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    missing = [column for column in REQUIRED if column not in columns]
    unknown = [column for column in columns if column not in (*REQUIRED, *OPTIONAL)]
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise BadTrace(f"{name}, line 1: {wrong}; the columns are {', '.join(REQUIRED)} and, "
                       f"optionally, {', '.join(OPTIONAL)}")  # fmt: skip
    found = []
    for row in reader:
        try:
            found.append(_request(row, len(found)))
        except ValueError as error:
            raise BadTrace(f"{name}, line {reader.line_num}: {error}") from None
    if not found:
        raise BadTrace(f"{name}: no requests")
    return sorted(found, key=lambda one: one.arrival_s)


def write(trace: Sequence[TraceRequest], file: TextIO) -> None:
    """The trace as CSV; ``read`` gives it back."""
    prefixes = any(one.prefix_id for one in trace)
    targets = any(one.slo != NO_SLO for one in trace)
    columns = [*REQUIRED, *(OPTIONAL[:2] if prefixes else ()), *(TARGETS if targets else ())]
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for one in trace:
        values = {
            "arrival_s": f"{one.arrival_s:.6f}",
            "input_tokens": one.input_tokens,
            "output_tokens": one.output_tokens,
            "prefix_id": one.prefix_id,
            "prefix_tokens": one.prefix_tokens or "",
        }
        for column in TARGETS:
            target = getattr(one.slo, f"{column.removesuffix('_slo_ms')}_s")
            values[column] = "" if target is None else f"{target * 1e3:.6g}"
        writer.writerow(values)


def fitting(trace: Sequence[TraceRequest], most_tokens: int) -> tuple[list[TraceRequest], int]:
    """Those whose input and output have at most so many tokens, and how many have more."""
    kept = [one for one in trace if one.input_tokens + one.output_tokens <= most_tokens]
    return kept, len(trace) - len(kept)


def _request(row: dict[str, str], number: int) -> TraceRequest:
    if None in row or None in row.values():
        raise ValueError("does not have as many fields as line 1")
    prefix = row.get("prefix_id") or ""
    prefix_tokens = _count(row, "prefix_tokens", 0) if row.get("prefix_tokens") else 0
    inputs = _count(row, "input_tokens", 1)
    if bool(prefix) != bool(prefix_tokens) or prefix_tokens > inputs:
        raise ValueError("prefix_id and prefix_tokens go together, within input_tokens")
    slo = {}
    for column in TARGETS:
        if row.get(column):
            target = _number(row, column, 0.0)
            if not target:
                raise ValueError(f"{column} must be above 0; leave it empty for no target")
            slo[f"{column.removesuffix('_slo_ms')}_s"] = target / 1e3
    return TraceRequest(
        arrival_s=_number(row, "arrival_s", 0.0),
        input_tokens=inputs,
        output_tokens=_count(row, "output_tokens", 1),
        rid=f"r{number:04d}",
        slo=SLO(**slo) if slo else NO_SLO,
        prefix_id=prefix,
        prefix_tokens=prefix_tokens,
    )


def _number(row: dict[str, str], column: str, least: float) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{column} must be a number of at least {least:g}, got {row[column]!r}")
    return value


def _count(row: dict[str, str], column: str, least: int) -> int:
    value = _number(row, column, least)
    if value != int(value):
        raise ValueError(f"{column} must be whole, got {row[column]!r}")
    return int(value)
