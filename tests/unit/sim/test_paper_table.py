"""The paper's claims beside runs: what is divided by what, and what is left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from eval.sim import paper_table
from eval.sim.campaign import Row
from eval.sim.scenario import Scenario
from eval.sim.tables import grouped

pytestmark = pytest.mark.unit
SETTING = Scenario("a5000-8b-published", "", mix="MIX:full", rate=0.0162, slo_scale=1.0)


def row(
    policy: str, tbt: float, deposited: float, p95: float, speed: float, scale: float = 1.0
) -> Row:
    metrics = {
        "paper_tbt_attainment": tbt,
        "paper_tbt_attainment_deposited": deposited,
        "paper_tpot_attainment": tbt,
        "paper_p95_tbt_ratio": p95,
        "paper_p99_tbt_ratio": p95,
        "throughput_tokens_per_s": speed,
        "good_requests": 0.5,
        "requests": 52,
        "plans": 104,
        "makespan_s": 200.0,
    }
    scenario = replace(SETTING, policy=policy, slo_scale=scale)
    return {"scenario": scenario.as_dict(), "metrics": metrics}


def line(lines: list[str], words: str) -> list[str]:
    """Its cells but the first."""
    (found,) = (one for one in lines if one.startswith(f"| {words} |"))
    return [cell.strip() for cell in found.strip("| ").split(" | ")][1:]


def test_claims_are_of_the_paper_s_policy_against_the_others() -> None:
    rows = [
        row("paper", 0.6, 0.9, p95=1.0, speed=100),
        row("static:1", 0.5, 0.75, p95=1.25, speed=75),
        row("next-layer", 0.2, 0.3, p95=4.0, speed=25),
        row("paper", 0.8, 0.96, p95=1.0, speed=100, scale=1.5),
        row("static:1", 0.8, 0.8, p95=1.0, speed=125, scale=1.5),
    ]
    lines = paper_table.table(grouped(rows), plan_s=0.01)
    assert lines[0] == "| | paper | a5000-8b-published, `paper` |"  # ours has no run
    assert line(lines, "TBT attainment, with deposit")[1] == "93 (90 to 96)"
    assert line(lines, "that of the best other, without")[1] == "65 (50 to 80)"
    # 0.9 / 0.5, 0.96 / 0.8; with deposit for all 0.9 / 0.75, 0.96 / 0.8.
    assert line(lines, "TBT attainment against the best other")[1] == "+50 (+20 to +80)"
    assert line(lines, "both with deposit")[1] == "+20 (+20 to +20)"
    assert line(lines, "TPOT attainment against the best other")[1] == "+10 (+0 to +20)"
    # 1.0 / 1.25, 1.0 / 4.0, 1.0 / 1.0.
    assert line(lines, "P95 TBT against every other")[1] == "-20 (-75 to +0)"
    assert line(lines, "P95 TBT against DeepSpeed (`next-layer`)") == ["-68.6 %", "-75"]
    assert line(lines, "tokens/s against DeepSpeed")[1] == "+300"
    assert line(lines, "tokens/s against the rest")[1] == "+7 (-20 to +33)"
    # 104 plans of 52 requests.
    assert line(lines, "plans a request")[1] == "2.0 (2.0 to 2.0)"


def test_what_planning_takes_is_said_of_our_model_alone() -> None:
    """104 plans of 10 ms in 200 s; of the paper's model the benchmark says nothing."""
    rows = [row(name, 0.6, 0.9, p95=1.0, speed=100) for name in paper_table.IN_ITS_PLACE]
    lines = paper_table.table(grouped(rows), plan_s=0.01)
    assert line(lines, "planning, of all time")[1:] == ["–", "0.52"]


def test_what_there_is_no_run_of_is_left_out() -> None:
    assert paper_table.table(grouped([row("static:1", 0.5, 0.5, 1.0, 80)]), 0.01) == []
    alone = paper_table.table(grouped([row("paper", 0.6, 0.9, 1.0, 100)]), math.nan)
    for words in ("that of the best other, without", "both with deposit", "planning, of all time"):
        assert line(alone, words)[1] == "–"


def test_deposit_is_given_as_in_the_paper_s_figures() -> None:
    rows = [row("paper", 0.6, 0.9, 1.0, 100), row("static:1", 0.5, 0.75, 1.25, 80, scale=1.5)]
    lines = paper_table.attainment(grouped(rows))
    assert line(lines, "`paper`") == ["90 (50)", "– (–)"]
    assert line(lines, "`static:1`") == ["– (–)", "50 (50)"]
    assert len(lines) == 5  # nobody else has a line


def test_what_a_plan_takes_is_of_the_planner_s_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "planner.json"
    assert math.isnan(paper_table.plan_seconds(path))
    speed = [
        {"units": units, "layers": 32, "use": use, "solve_p50_ms": ms}
        for units, use, ms in ((2, "alone", 1.0), (8, "given", 2.0), (8, "alone", 3.0))
    ]
    path.write_text(json.dumps({"speed": speed}), encoding="utf-8")
    assert paper_table.plan_seconds(path) == 0.003
    path.write_text(json.dumps({"speed": speed[:2]}), encoding="utf-8")
    assert math.isnan(paper_table.plan_seconds(path))
