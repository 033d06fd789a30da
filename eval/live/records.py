"""The raw results of a campaign on disk, one cell at a time, so that it can be resumed.

``requests.jsonl.gz``  one line for each request of each cell
``runs.jsonl``         one line for each finished cell; a cell without one does not count
``settings.json``      what must not change between the cells, with the calibration
``references.json.gz`` the ids that each request got first
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.bench.measure import write_whole
from eval.live.replay import Answer
from eval.metrics import Generated, Served
from orbitflow_sglang.slo import SLO

TICKS_PER_S = 10_000  # token times are kept in steps of 0.1 ms
Row = dict[str, Any]


class CannotResume(ValueError):
    """The folder holds results that this campaign may not be added to."""


@dataclass(frozen=True, order=True)
class Cell:
    """One run: a server's life with one trace."""

    repeat: int
    load: float
    contestant: str

    @staticmethod
    def of(row: Mapping[str, Any]) -> Cell:
        return Cell(row["repeat"], row["load"], row["contestant"])


class Results:
    """What is in a folder. ``resume`` is needed where there are finished cells already."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        resume: bool = False,
        redo_disturbed: float | None = None,
        other_code: bool = False,
    ) -> None:
        """``redo_disturbed``: a run in which others used more cores does not count as done;
        ``other_code``: one of other code does."""
        self.folder = folder
        self._requests = folder / "requests.jsonl.gz"
        self._runs = folder / "runs.jsonl"
        self._settings = folder / "settings.json"
        self._references = folder / "references.json.gz"
        folder.mkdir(parents=True, exist_ok=True)
        if self._runs.exists() and not resume:
            raise CannotResume(f"{folder} has results: give --resume, or another --out")
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.calibration: dict[str, Any] | None = None
        self._take_settings({"code"} if other_code else set())
        most = math.inf if redo_disturbed is None else redo_disturbed
        self.runs: list[Row] = [
            run for run in self._read_runs() if run.get("others_cores", 0.0) <= most
        ]
        done = {Cell.of(run) for run in self.runs}
        # A run that was cut off between its requests and its own line is done again.
        self.rows: list[Row] = [row for row in self._read_rows() if Cell.of(row) in done]
        self.references: dict[str, list[int]] = self._read_references()

    @property
    def done(self) -> set[Cell]:
        return {Cell.of(run) for run in self.runs}

    def calibrated(self, calibration: Mapping[str, Any]) -> None:
        """Keeps the calibration for this campaign and those that resume it."""
        self.calibration = dict(calibration)
        write_whole(self._settings, _json(self.settings | {"calibration": self.calibration}))

    def add(self, cell: Cell, answers: Sequence[Answer], run: Mapping[str, Any]) -> int:
        """Stores a finished cell; returns how many requests got other ids than before."""
        rows = [self._row(cell, answer) for answer in answers]
        mismatches = sum(row["mismatch_at"] is not None for row in rows)
        self.rows += rows
        known = {"code": self.settings.get("code"), "mismatches": mismatches}
        self.runs.append(_cell_fields(cell) | known | dict(run))
        lines = (json.dumps(row, separators=(",", ":")) for row in self.rows)
        write_whole(self._references, gzip.compress(_json(self.references), mtime=0))
        write_whole(self._requests, gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
        write_whole(self._runs, b"".join(json.dumps(one).encode() + b"\n" for one in self.runs))
        return mismatches

    def _row(self, cell: Cell, answer: Answer) -> Row:
        reference = (
            self.references.setdefault(f"{cell.repeat}/{answer.request.rid}", answer.output_ids)
            if answer.error is None
            else None
        )
        differs = None if reference is None else first_difference(reference, answer.output_ids)
        return _cell_fields(cell) | to_row(answer) | {"mismatch_at": differs}

    def _take_settings(self, whatever: set[str]) -> None:
        """``whatever``: names of settings that may differ."""
        if not self._settings.exists():
            return
        stored = json.loads(self._settings.read_text(encoding="utf-8"))
        calibration = stored.pop("calibration", None)
        differing = sorted(set(_differing(stored, self.settings)) - whatever)
        if not differing:
            self.calibration = calibration
        elif self._runs.exists():
            raise CannotResume(
                f"{self.folder} was measured with other {', '.join(differing)}: give another --out"
            )

    def _read_runs(self) -> list[Row]:
        if not self._runs.exists():
            return []
        return [json.loads(line) for line in self._runs.read_text(encoding="utf-8").splitlines()]

    def _read_rows(self) -> Iterable[Row]:
        if not self._requests.exists():
            return []
        text = gzip.decompress(self._requests.read_bytes()).decode()
        return (json.loads(line) for line in text.splitlines())

    def _read_references(self) -> dict[str, list[int]]:
        if not self._references.exists():
            return {}
        references: dict[str, list[int]] = json.loads(
            gzip.decompress(self._references.read_bytes())
        )
        return references


def _differing(stored: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Names of settings that are not the same, inner ones as in ``setup.model.heads``."""
    for key in stored.keys() | given.keys():
        ours, theirs = stored.get(key), given.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from (f"{key}.{inner}" for inner in _differing(ours, theirs))
        elif ours != theirs:
            yield key


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The index of the first token that differs; None where none does."""
    for at, (want, have) in enumerate(zip(expected, got, strict=False)):
        if want != have:
            return at
    return None if len(expected) == len(got) else min(len(expected), len(got))


def to_row(answer: Answer) -> Row:
    """A request's line, without its cell. Token times become differences of ticks."""
    request, slo = answer.request, answer.request.slo
    ticks = [round(at_s * TICKS_PER_S) for at_s in answer.token_s]
    digest = hashlib.sha256(json.dumps(answer.output_ids).encode()).hexdigest()[:16]
    return {
        "rid": request.rid,
        "arrival_s": round(request.arrival_s, 6),
        "late_s": round(answer.sent_s - request.arrival_s, 4),
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "slo": [slo.ttft_s, slo.tpot_s, slo.tbt_s],
        "ticks": [*ticks[:1], *(later - earlier for earlier, later in pairwise(ticks))],
        "finish": answer.finish_reason,
        "error": answer.error,
        "orbitflow": answer.orbitflow,
        "ids": digest,
    }


def from_row(row: Mapping[str, Any]) -> Served:
    """A request's line as the metrics want it."""
    now, times = 0, []
    for difference in row["ticks"]:
        now += difference
        times.append(now / TICKS_PER_S)
    return Served(
        rid=row["rid"],
        repeat=row["repeat"],
        arrival_s=row["arrival_s"],
        asked_tokens=row["output_tokens"],
        slo=SLO(*row["slo"]),
        token_s=tuple(times),
        error=row["error"],
        generated=_generated(row["orbitflow"]),
    )


def _generated(orbitflow: Mapping[str, Any] | None) -> Generated | None:
    times = (orbitflow or {}).get("generated") or {}
    if times.get("ttft_s") is None:
        return None
    return Generated(times["ttft_s"], times.get("tpot_s"), times.get("max_tbt_s"))


def _cell_fields(cell: Cell) -> Row:
    return {"contestant": cell.contestant, "load": cell.load, "repeat": cell.repeat}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
