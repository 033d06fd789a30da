"""The request traces that the project carries."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


def load(name: str) -> list[Arrival]:
    """The trace ``name`` (of a file here, without its suffixes), in the order of arrival."""
    with gzip.open(FOLDER / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return [
            Arrival(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]))
            for row in csv.DictReader(file)
        ]
