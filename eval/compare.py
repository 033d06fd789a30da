"""``python -m eval.compare A.json B.json``: two results of ``eval.simulate``, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from eval.bootstrap import paired_difference

PER_REQUEST = ("good", "strict")
TRACE = ("arrival_s", "input_tokens", "output_tokens")  # what makes two requests the same


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("files", nargs=2, type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        one, other = (_read(path) for path in options.files)
        lines = compared(one, other)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs in their scenarios, all metrics, and shares of requests paired by request.

    Raises ``ValueError`` where the two did not serve the same requests.
    """
    _check_same_trace(one, other)
    scenarios = one["scenario"], other["scenario"]
    changed = [name for name in scenarios[0] if scenarios[0][name] != scenarios[1].get(name)]
    lines = [f"{name:36} {scenarios[0][name]!s:>16} {scenarios[1].get(name)!s:>16}"
             for name in changed]  # fmt: skip
    for name, value in one["metrics"].items():
        theirs = other["metrics"].get(name)
        change = ""
        if isinstance(value, int | float) and isinstance(theirs, int | float) and value:
            change = f"{100 * (theirs / value - 1):+9.1f} %"
        lines.append(f"{name:36} {_number(value):>16} {_number(theirs):>16} {change}")
    for name in PER_REQUEST:
        shares = [{(0, row["rid"]): float(row[name]) for row in run["rows"]}
                  for run in (other, one)]  # fmt: skip
        paired = paired_difference(*shares)
        lines.append(
            f"{name}, second minus first: {100 * paired.value:+.1f} points, 95 % interval over "
            f"requests {100 * paired.low:+.1f} to {100 * paired.high:+.1f}"
        )
    return lines


def _check_same_trace(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Ids alone say nothing: they are the same in every trace."""
    first, second = ({row["rid"]: row for row in run["rows"]} for run in (one, other))
    for rid in first.keys() & second.keys():
        if changed := [name for name in TRACE if first[rid][name] != second[rid][name]]:
            raise ValueError(
                f"the two did not serve the same trace: {rid} differs in {', '.join(changed)}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not {"scenario", "metrics", "rows"} <= found.keys():
        raise ValueError(f"{path}: not a result of eval.simulate")
    return found


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "–"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
