from __future__ import annotations

import io
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import orjson
import pytest
from test_modes import ALL
from test_problem_file import GOOD

from orbitflow_sglang.__main__ import main


def run(capsys: pytest.CaptureFixture[str], path: Path, *args: str) -> str:
    assert main(["plan", str(path), *args]) == 0
    return capsys.readouterr().out


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "problem.json"
    path.write_bytes(orjson.dumps(GOOD))
    return path


def test_the_table_shows_every_unit(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run(capsys, good)
    assert table.startswith("orbitflow: optimal, solved in ")
    rows = {line.split()[0]: line for line in table.splitlines()[-3:]}
    assert rows.keys() == {"a", "b", "p"}
    assert "170.0 ms met" in rows["a"]


def test_json_has_the_keys_of_the_format(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan: dict[str, Any] = orjson.loads(run(capsys, good, "--json"))
    assert {
        "status", "step_time_s", "stall_s", "lower_bound_s", "gap", "solve_s",
        "arena_pages_used", "ring_pages", "units",
    } <= plan.keys()  # fmt: skip
    assert plan["status"] == "optimal"
    assert plan["arena_pages_used"] + plan["ring_pages"] <= GOOD["arena_pages"]
    for unit in plan["units"]:
        assert unit.keys() == {"id", "pattern", "offloaded_layers", "paused", "slo_met"}
    assert [unit["id"] for unit in plan["units"]] == ["a", "b", "p"]


@pytest.mark.parametrize("mode", ALL)
def test_a_picture_of_any_plan_is_well_formed(
    mode: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good.write_bytes(orjson.dumps(GOOD | {"mode": mode}))
    picture = tmp_path / "plan.svg"
    run(capsys, good, "--picture", str(picture))
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    boxes = [element for element in root if element.tag.endswith("rect")]
    assert len(boxes) >= 3 * 32
    width = float(root.attrib["width"])
    for box in boxes:
        left, size = float(box.attrib["x"]) if "x" in box.attrib else 0.0, box.attrib["width"]
        assert left >= -0.1 and left + float(size) <= width + 1


def test_a_picture_that_cannot_be_written_is_an_error(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(good), "--picture", str(tmp_path)]) == 2
    assert "--picture" in capsys.readouterr().err


def test_a_picture_of_odd_names_is_well_formed(tmp_path: Path) -> None:
    path, picture = tmp_path / "odd.json", tmp_path / "odd.svg"
    units = [{"id": name, "pages_per_layer": 9} for name in ("a\x01", "<&>", 'q"', "x" * 99)]
    path.write_bytes(orjson.dumps(GOOD | {"units": units}))
    assert main(["plan", str(path), "--picture", str(picture)]) == 0
    ElementTree.parse(picture)


def test_standard_input_is_read_for_a_dash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(orjson.dumps(GOOD))))
    assert main(["plan", "-", "--json"]) == 0
    assert orjson.loads(capsys.readouterr().out)["status"] == "optimal"


def test_a_batch_of_nobody_has_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.json"
    for mode in ALL:
        path.write_bytes(orjson.dumps(GOOD | {"units": [], "mode": mode}))
        plan = orjson.loads(run(capsys, path, "--json", "--picture", str(tmp_path / "e.svg")))
        assert (plan["units"], plan["stall_s"]) == ([], 0)
