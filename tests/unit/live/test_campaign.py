from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.live import compare, contestants
from eval.live.calibrate import Calibration
from eval.live.compare import GPU_MIX, ON_GPU, cells
from eval.live.contestants import Setup, flags
from eval.live.records import (
    CannotResume,
    Cell,
    Results,
    first_difference,
    from_row,
    to_row,
)
from eval.live.replay import Answer, read_event
from eval.live.summary import markdown, summarise
from eval.live.workload import Mix
from eval.metrics import Generated
from eval.workload.requests import TraceRequest
from orbitflow_sglang.slo import SLO

pytestmark = pytest.mark.unit
SETTINGS = {"requests": 2, "mix": {"short_input": (1, 2)}}
CALIBRATION = Calibration("queue", 0.01, 5, 0.0, 0.0002, 1.5, 100.0, 0, 0.0)
RUN = {"problem": None, "failed_idle_checks": 0, "most_late_s": 0.002}


def answer(rid: str, at_s: float = 0.5, ids: tuple[int, ...] = (7, 8, 9)) -> Answer:
    request = TraceRequest(1.0, 10, 3, rid, SLO(1.0, 0.5))
    events = [(1.0 + at_s, 1), (1.25 + at_s, 3)]
    return Answer(request, 1.001, events, list(ids), "length")


def results(folder: Path, resume: bool = False, **settings: Any) -> Results:
    return Results(folder, SETTINGS | settings, resume)


def test_finished_cells_are_there_after_a_restart(tmp_path: Path) -> None:
    first = results(tmp_path)
    first.calibrated({"step_s": 0.01})
    first.add(Cell(0, 0.9, "stock"), [answer("a"), answer("b")], RUN)
    again = results(tmp_path, resume=True)
    assert again.done == {Cell(0, 0.9, "stock")}
    assert again.calibration == {"step_s": 0.01}
    assert again.rows == first.rows and again.references == first.references
    again.add(Cell(0, 0.9, "swap"), [answer("a"), answer("b")], RUN)
    third = results(tmp_path, resume=True)
    assert len(third.done) == 2 and len(third.rows) == 4


def test_results_are_not_mixed_or_overwritten_by_accident(tmp_path: Path) -> None:
    results(tmp_path).add(Cell(0, 0.9, "stock"), [answer("a")], RUN)
    with pytest.raises(CannotResume, match="--resume"):
        results(tmp_path)


def test_other_settings_cannot_be_added_to_results(tmp_path: Path) -> None:
    first = results(tmp_path)
    first.calibrated({"step_s": 0.01})
    first.add(Cell(0, 0.9, "stock"), [answer("a")], RUN)
    with pytest.raises(CannotResume, match="other requests: give another --out"):
        results(tmp_path, resume=True, requests=3)
    with pytest.raises(CannotResume, match=r"other mix\.short_input: give"):
        results(tmp_path, resume=True, mix={"short_input": (1, 3)})


def test_another_model_or_other_code_are_other_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def settings() -> dict[str, Any]:
        return compare._settings(compare._parse(["--quick", "--resume"]), Setup(), Mix())

    first = Results(tmp_path, settings())
    first.calibrated({"step_s": 0.01})
    first.add(Cell(0, 0.9, "stock"), [answer("a")], RUN)
    with (
        monkeypatch.context() as changed,
        pytest.raises(CannotResume, match=r"other setup\.model\.heads:"),
    ):
        changed.setattr(contestants, "CPU_MODEL", replace(contestants.CPU_MODEL, heads=4))
        Results(tmp_path, settings(), resume=True)
    monkeypatch.setattr(compare, "DECISIVE", compare.DECISIVE[1:])
    with pytest.raises(CannotResume, match="other code:"):
        Results(tmp_path, settings(), resume=True)
    mixed = Results(tmp_path, settings(), resume=True, other_code=True)
    assert mixed.calibration == {"step_s": 0.01}
    mixed.add(Cell(1, 0.9, "stock"), [answer("a")], RUN)
    codes = [run["code"] for run in mixed.runs]
    assert codes == [first.settings["code"], mixed.settings["code"]] and codes[0] != codes[1]


@pytest.mark.parametrize(("overrun_s", "said"), [(0.1, False), (0.5, True)])
def test_a_machine_too_slow_for_the_emulated_device_is_said(
    tmp_path: Path, overrun_s: float, said: bool
) -> None:
    campaign, cell = results(tmp_path), Cell(0, 0.9, "orbitflow")
    emulated = {"emulated_compute": {"s": 10.0, "overrun_s": overrun_s}}
    campaign.add(cell, [answer("a")], RUN | {"others_cores": 0.0, "orbitflow": emulated})
    slow = "SLOW: compute took 5.0% longer than emulated"
    assert (slow in compare._outcome(campaign, cell)) == said


def test_what_only_a_gpu_runs_is_other_code_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(path.exists() for path in compare.ONLY_ON_GPU)
    options = compare._parse(["--quick"])
    seen = []

    def code_of(patterns: object, without: set[Path]) -> str:
        seen.append(without)
        return ""

    monkeypatch.setattr(compare, "hash_of_files", code_of)
    for setup in (Setup(), contestants.ON_GPU):
        compare._settings(options, setup, Mix())
    assert seen == [compare.AROUND | compare.ONLY_ON_GPU, compare.AROUND]


def test_a_calibration_alone_is_not_kept_for_other_settings(tmp_path: Path) -> None:
    results(tmp_path).calibrated({"step_s": 0.01})
    assert results(tmp_path).calibration == {"step_s": 0.01}
    assert results(tmp_path, requests=3).calibration is None


def test_a_run_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    first = results(tmp_path)
    first.add(Cell(0, 0.9, "stock"), [answer("a")], RUN)
    first.add(Cell(0, 0.9, "swap"), [answer("a")], RUN)
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text(runs[0] + "\n")  # its requests were stored, not it
    again = results(tmp_path, resume=True)
    assert again.done == {Cell(0, 0.9, "stock")} and len(again.rows) == 1


def test_a_disturbed_run_can_be_done_again(tmp_path: Path) -> None:
    first = results(tmp_path)
    first.add(Cell(0, 0.9, "calm"), [answer("a")], RUN | {"others_cores": 0.05})
    first.add(Cell(0, 0.9, "disturbed"), [answer("a")], RUN | {"others_cores": 0.9})
    assert len(results(tmp_path, resume=True).done) == 2
    again = Results(tmp_path, SETTINGS, resume=True, redo_disturbed=0.2)
    assert again.done == {Cell(0, 0.9, "calm")} and len(again.rows) == 1


def test_other_ids_than_the_first_contestants_are_counted(tmp_path: Path) -> None:
    store = results(tmp_path)
    failed = answer("a", ids=())
    failed.error = "timeout"
    assert store.add(Cell(0, 0.9, "first"), [failed, answer("b")], RUN) == 0
    assert store.add(Cell(0, 0.9, "second"), [answer("a"), answer("b")], RUN) == 0
    other = [answer("a", ids=(7, 8, 1)), answer("b")]
    assert store.add(Cell(0, 1.2, "third"), other, RUN) == 1
    assert store.rows[-2]["mismatch_at"] == 2
    # Another repeat has other prompts.
    assert store.add(Cell(1, 0.9, "third"), other, RUN) == 0


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1]) == 1


def test_a_line_holds_what_the_metrics_need() -> None:
    one = answer("a")
    one.orbitflow = {"generated": {"ttft_s": 0.4, "tpot_s": 0.1, "max_tbt_s": 0.2}}
    row = json.loads(json.dumps(to_row(one) | {"repeat": 2}))
    served = from_row(row)
    assert served.token_s == pytest.approx((0.5, 0.75, 0.75))
    assert served.complete and served.asked_tokens == 3
    assert served.slo == SLO(1.0, 0.5)
    assert served.generated == Generated(0.4, 0.1, 0.2)
    assert row["late_s"] == 0.001


def test_events_of_a_stream_become_token_times_and_errors() -> None:
    one = Answer(TraceRequest(1.0, 10, 3, "a"))
    read_event(one, 1.5, {"output_ids": [4], "meta_info": {"finish_reason": None}})
    final = {"finish_reason": {"type": "length"}, "orbitflow": {"generated": {}}}
    read_event(one, 2.0, {"output_ids": [4, 5, 6], "meta_info": final})
    assert one.token_s == [0.5, 1.0, 1.0] and one.output_ids == [4, 5, 6]
    assert one.finish_reason == "length" and one.orbitflow == {"generated": {}}
    assert one.error is None
    read_event(one, 2.1, {"error": {"message": "no"}})
    assert "no" in str(one.error)
    aborted = Answer(TraceRequest(1.0, 10, 3, "a"))
    abort = {"finish_reason": {"type": "abort", "message": "too long"}}
    read_event(aborted, 2.0, {"output_ids": [], "meta_info": abort})
    assert aborted.error == "abort: too long"


def test_every_repeat_and_load_has_each_contestant_once_in_an_order_of_its_own() -> None:
    names = ["a", "b", "c", "d"]
    drawn = cells(names, [0.9, 1.2], 10, seed=0)
    assert len(drawn) == len(set(drawn)) == 80
    orders = {
        tuple(cell.contestant for cell in drawn[start : start + 4]) for start in range(0, 80, 4)
    }
    assert len(orders) > 5
    assert drawn == cells(list(reversed(names)), [0.9, 1.2], 10, seed=0)


def test_contestants_differ_in_nothing_but_policy() -> None:
    setup = Setup()
    swap, paced = flags("swap+order", setup), flags("orbitflow:no-pause@paced", setup)
    at = swap.index("--orbitflow-policy") + 1
    assert swap[at] == "swap+order" and paced[at] == "orbitflow:no-pause"
    assert swap[:at] == paced[:at] and swap[at + 1 :] == paced[at + 1 :]
    stock = flags("stock", setup)
    assert not any("--orbitflow" in arg for arg in stock) and "--max-total-tokens" in stock
    for name in ("stok", "stock@paced", "orbitflow:no-such-rule"):
        with pytest.raises(ValueError):
            contestants.check(name, setup)
    for name in contestants.DEFAULT:
        contestants.check(name, setup)


def test_who_takes_turns_is_compared_where_requests_are_paced() -> None:
    for names in (contestants.DEFAULT, ON_GPU):
        assert {"time-sliced-swap@paced", "orbitflow@paced"} <= set(names)
        assert "time-sliced-swap" not in names


def test_what_takes_no_emulated_compute_is_not_compared_with_what_does() -> None:
    contestants.check(contestants.NATIVE, replace(Setup(), compute_ms=None))
    with pytest.raises(ValueError, match="--real-compute"):
        contestants.check(contestants.NATIVE, Setup())


def test_on_a_gpu_there_are_other_stock_servers_and_a_real_link() -> None:
    setup = contestants.ON_GPU
    for name in ON_GPU:
        contestants.check(name, setup)
    with pytest.raises(ValueError):
        contestants.check(contestants.NATIVE, setup)
    with pytest.raises(ValueError):
        contestants.check("hicache", Setup())
    ours = flags("orbitflow", setup)
    assert "orbitflow_flashinfer" in ours and "--orbitflow-emulated-link-gb-per-s" not in ours
    overlapped = flags("orbitflow:no-pause@overlapped@paced", setup)
    assert overlapped[overlapped.index("--orbitflow-policy") + 1] == "orbitflow:no-pause"
    assert {"breakable", "--orbitflow-overlap-schedule"} <= set(overlapped)
    with pytest.raises(ValueError, match="no CUDA graphs on a CPU"):
        contestants.check("orbitflow@graphs", Setup())
    eager = set(flags("stock-eager", setup)) - set(flags("stock", setup))
    assert eager == set(contestants.EAGER)
    hicache = flags("hicache", setup)
    assert hicache[hicache.index("--hicache-size") + 1] == "64"  # of GB, as ours has
    with pytest.raises(ValueError, match="--host-memory-gb a whole number"):
        contestants.check("hicache", replace(setup, host_memory_gb=0.5))
    assert "rho" not in CALIBRATION.numbers(setup, GPU_MIX)
    assert GPU_MIX.longest < setup.model.context


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--gpu"])
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_numbers_of_a_calibration() -> None:
    calibration, mix = CALIBRATION, Mix((100, 100), (300, 300), (200, 200), (200, 200))
    numbers = calibration.numbers(Setup(arena_tokens=3000, link_gb_per_s=0.5), mix)
    assert numbers["h_bytes"] == pytest.approx(5e6)
    assert numbers["rho"] == pytest.approx(5e6 / (3000 * 2048))
    # 10 requests of 300 tokens fill the arena: 200 steps against 10 prefills of 200 tokens.
    assert numbers["mu"] == pytest.approx(200 * 0.01 / (10 * 200 * 0.0002))
    targets = calibration.targets()
    assert targets.tpot_s == pytest.approx(0.02) and targets.of(10).ttft_s == 3.0
    assert calibration.targets(ttft_s=0.1).of(10_000).ttft_s == 0.1


def test_the_summary_has_every_contestant_and_the_baseline_against_each(tmp_path: Path) -> None:
    store = results(tmp_path)
    for repeat in range(2):
        fast = [answer("a"), answer("b")]
        store.add(Cell(repeat, 0.9, "orbitflow"), fast, RUN)
        store.add(Cell(repeat, 0.9, "stock"), [answer("a"), answer("b", 3.0)], RUN)
    found = summarise(store.rows, store.runs, "orbitflow")
    load = found["loads"]["0.9"]
    assert load["contestants"]["orbitflow"]["good"] == 1.0
    assert load["contestants"]["stock"]["good"] == 0.5
    difference = load["differences"]["stock"]["good"]
    assert difference["value"] == 0.5 and difference["by_repeat"] == [0.5, 0.5]
    assert list(load["differences"]) == ["stock"]
    json.dumps(found, allow_nan=False)
    table = markdown(found)
    assert table.index("`orbitflow` |") < table.index("`stock` |")
    assert "## Load 0.9" in table and "+50.0" in table
    assert summarise(store.rows, store.runs, "nobody")["loads"]["0.9"]["differences"] == {}
