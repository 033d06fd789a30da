from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from eval.bench import planner as bench
from orbitflow_sglang.planner.solver import solve


def test_the_recorded_batches_are_the_same_each_time_and_can_be_planned() -> None:
    first, again = list(bench.batches(60)), list(bench.batches(60))
    assert first == again and len(first) == 60
    assert all(steps >= 1 for _, steps in first)
    assert max(len(problem.units) for problem, _ in first) > 4
    assert any(solve(problem).offloaded.any() for problem, _ in first)
    assert all(solve(problem).fits for problem, _ in first)


@pytest.mark.skipif(
    os.environ.get("ORBITFLOW_TEST_FULL") != "1", reason="takes most of a minute: in make test-full"
)
def test_a_smoke_run_writes_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SIZES", ((2, 8), (3, 12)))
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    output = tmp_path / "planner.json"
    args = ["--problems", "4", "--changes", "20", "--output", str(output)]
    assert bench.main(args) == 0
    result = orjson.loads(output.read_bytes())
    assert len(result["speed"]) == 4
    assert result["scheduler"]["adopt_ms"] > 0
    assert [row["idea"] for row in result["ideas"]][-1] == "+ page ranges"
    assert sum(result["incremental"]["outcomes"].values()) == pytest.approx(1)
    for use in ("alone", "given"):
        assert "ours is worse" not in result["against_paper"][use]["outcome"]
    assert "batch changes" in capsys.readouterr().out
