from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from problems import problems, seeded

from orbitflow_sglang.__main__ import main
from orbitflow_sglang.planner.problem import PlanningProblem
from orbitflow_sglang.planner.problem_file import (
    ProblemError,
    load_problem,
    parse_problem,
    problem_as_json,
)

GOOD: dict[str, Any] = {
    "layers": 32,
    "arena_pages": 34531,
    "layer_compute_s": 0.0021,
    "page_transfer_s": 8.6e-06,
    "mode": "orbitflow",
    "window_steps": 32,
    "units": [
        {"id": "a", "pages_per_layer": 332, "tpot_slo_s": 0.17, "deposit_tokens": 0},
        {"id": "b", "pages_per_layer": 867, "present": [4, 8]},
        {"id": "p", "pages_per_layer": 100, "shared_by": ["a", "b"]},
    ],
}
NOT_INTEGERS = ("8", 1.5, True, None, [], {}, -1)
NOT_NUMBERS = ("8", True, [], {}, -1.0, 1e300)


def changed(value: Any, *path: Any) -> bytes:
    """``GOOD`` with another value somewhere; ``...`` for none at all."""
    copied = copy.deepcopy(GOOD)
    at: Any = copied
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return orjson.dumps(copied)


def malformed() -> Iterator[tuple[str, bytes]]:
    """Broken files, each with the key that its error must name."""
    for key in ("layers", "arena_pages", "layer_compute_s", "page_transfer_s", "units"):
        yield key, changed(..., key)
    for key in ("layers", "arena_pages"):
        for value in (*NOT_INTEGERS, 0, 2**50):
            yield key, changed(value, key)
    for key in ("layer_compute_s", "page_transfer_s"):
        for value in (*NOT_NUMBERS, None, 0):
            yield key, changed(value, key)
    for key in ("window_steps", "stream_budget_pages", "ring_pages", "host_pages"):
        for value in NOT_INTEGERS:
            if value is not None or key == "window_steps":
                yield key, changed(value, key)
    for value in (0, 1):
        yield "ring_pages", changed(value, "ring_pages")
    for key in ("transfer_setup_s", "time_limit_s", "average_pages_per_layer"):
        for value in NOT_NUMBERS:
            yield key, changed(value, key)
    for value in ("", "fast", 3, None, [], "static:0", "orbitflow:", "swap"):
        yield "mode", changed(value, "mode")
    for value in ("a", 3, None, {}, {"id": "a"}):
        yield "units", changed(value, "units")
    for value in ("a", 3, None, []):
        yield "units[1]", changed(value, "units", 1)
    for key in ("id", "pages_per_layer"):
        yield f"units[1].{key}", changed(..., "units", 1, key)
    for key in ("pages_per_layer", "growth_pages_per_layer"):
        for value in (*NOT_INTEGERS, 2**40):
            yield f"units[1].{key}", changed(value, "units", 1, key)
    for value in ("0.1", True, [], {}, 0, -1.0, 1e300):
        yield "units[0].tpot_slo_s", changed(value, "units", 0, "tpot_slo_s")
    for value in ("1", True, None, [], {}, 1e300, -1e300):
        yield "units[0].deposit_tokens", changed(value, "units", 0, "deposit_tokens")
    for value in NOT_NUMBERS:
        yield "units[0].age_s", changed(value, "units", 0, "age_s")
    for value in ("", 1, None, [], {}):
        yield "units[1].id", changed(value, "units", 1, "id")
    yield "units[1].id", changed("a", "units", 1, "id")
    for value in (3, None, {}, [0], [33], [-1], ["4"], [4, 4], [4.0], "distance", "layers:40"):
        yield "units[1].present", changed(value, "units", 1, "present")
    for value in ("all@0-900", "layers:1@3-9", "layers:", "distance:0", "layers:2,2"):
        yield "units[1].present", changed(value, "units", 1, "present")
    for value in ("a", 3, None, ["x"], ["p"], ["a", "a"], [1], [""]):
        yield "units[2].shared_by", changed(value, "units", 2, "shared_by")
    for key in ("tpot_slo_s", "deposit_tokens", "age_s"):
        yield f"units[2].{key}", changed(1, "units", 2, key)
    for key in ("layer", "Layers", "units_", "slo", "", "seed"):
        yield key, changed(1, key)
    for key in ("pages", "slo_s", "shared", "pattern"):
        for unit in (0, 2):
            yield f"units[{unit}].{key}", changed(1, "units", unit, key)
    whole = orjson.dumps(GOOD)
    for text in (
        b"",
        b"{",
        whole[:-1],
        whole + b"}",
        b"\xff\xfe",
        b"nan",
        b"{'layers': 3}",
        b'{"layers": NaN}',
    ):
        yield "not JSON", text
    for text in (b"[]", b"3", b"null", b'"layers"', b"true", b"[{}]", b"0.5"):
        yield "the problem", text


MALFORMED = list(malformed())


def test_there_are_200_malformed_files() -> None:
    assert len(MALFORMED) >= 200
    assert len({text for _, text in MALFORMED}) >= 200


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_file_ends_with_the_key_and_status_2(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, text = MALFORMED[number]
    path = tmp_path / "problem.json"
    path.write_bytes(text)
    assert main(["plan", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"{path}: {key}"), line
    assert len(line) < 400


def test_the_good_one_is_good() -> None:
    assert [unit.id for unit in load_problem(orjson.dumps(GOOD)).units] == ["a", "b", "p"]


def test_no_traceback_and_nothing_on_standard_output_from_a_real_process(tmp_path: Path) -> None:
    for name, content, said in (
        ("bad.json", b"{", "not JSON"),
        ("none.json", None, "No such file"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        run = subprocess.run(
            [sys.executable, "-m", "orbitflow_sglang", "plan", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (run.returncode, run.stdout) == (2, "")
        assert said in run.stderr and "Traceback" not in run.stderr


@seeded(150)
@given(problems())
def test_a_problem_read_back_is_the_same(one: PlanningProblem) -> None:
    text = orjson.dumps(problem_as_json(one))
    assert parse_problem(orjson.loads(text)) == one


def test_defaults_need_not_be_given() -> None:
    few = {key: GOOD[key] for key in ("layers", "arena_pages", "layer_compute_s")}
    few |= {"page_transfer_s": 1e-5, "units": []}
    one = parse_problem(few)
    assert (one.mode, one.window_steps, one.units) == ("orbitflow", 32, ())
    with pytest.raises(ProblemError, match=r"^units\[0\].id: is missing"):
        parse_problem(few | {"units": [{"pages_per_layer": 3}]})
