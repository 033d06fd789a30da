"""Tables, intervals, the campaign's cache, and commands on what they are given."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from eval import compare, simulate
from eval.sim import campaign, figures, report, studies, tables
from eval.sim.scenario import Scenario, run

pytestmark = pytest.mark.unit
SMALL = Scenario("a5000-8b", "retract", mix="SS", load=1.0, requests=6)


def row(policy: str, seed: int, good: float, **changes: object) -> campaign.Row:
    scenario = replace(SMALL, policy=policy, seed=seed, **changes)  # type: ignore[arg-type]
    return {"scenario": scenario.as_dict(), "metrics": {"good_requests": good}}


def test_differences_are_paired_by_seed() -> None:
    ours = {seed: row("orbitflow", seed, good) for seed, good in ((1, 0.5), (2, 0.7), (3, 0.9))}
    theirs = {seed: row("retract", seed, good) for seed, good in ((1, 0.4), (2, 0.6), (4, 0.0))}
    found = tables.difference(ours, theirs, "good_requests")
    assert (found.seeds, round(found.mean, 9)) == (2, 0.1)
    assert found.half == pytest.approx(0.0, abs=1e-9)
    # Student's interval of 0.1 and 0.3: mean 0.2, 12.706 x 0.1.
    ours[2]["metrics"] = {"good_requests": 0.9}
    found = tables.difference(ours, theirs, "good_requests")
    assert (found.mean, found.half) == pytest.approx((0.2, 1.2706), rel=1e-4)
    assert "tie" in found.text()


def test_a_single_seed_says_nothing_for_sure() -> None:
    found = tables.difference({1: row("orbitflow", 1, 1.0)}, {1: row("queue", 1, 0.0)},
                              "good_requests")  # fmt: skip
    assert math.isinf(found.half)
    assert found.text() == "+100.0 (one seed)"


def test_cells_are_what_methods_share() -> None:
    rows = [
        row(policy, seed, 0.5, load=load)
        for policy in ("orbitflow", "queue")
        for seed in (1, 2)
        for load in (0.9, 1.2)
    ]
    cells = tables.grouped(rows)
    assert {cell.name for cell in cells} == {f"a5000-8b, SS, load {load}" for load in (0.9, 1.2)}
    assert all(set(methods) == {"orbitflow", "queue"} for methods in cells.values())


def test_where_ours_is_worse_comes_with_the_interval() -> None:
    rows = [row("orbitflow", seed, 0.5) for seed in (1, 2, 3)]
    rows += [row("queue", seed, 0.6) for seed in (1, 2, 3)]
    rows += [row("swap", seed, 0.4) for seed in (1, 2, 3)]
    rows += [row("retract", 1, 0.3)]
    failing = tables.worse(tables.grouped(rows), "orbitflow", "good_requests")
    found = [(name, round(paired.mean, 6)) for _, name, paired in failing]
    assert found == [("queue", -0.1), ("retract", 0.2)]
    *_, listed, _, left_out, _ = report._failing(failing)
    assert "`queue` | -10.0 ± 0.0" in listed
    assert left_out == "Not listed: 1 with one seed at most."


def test_methods_are_named_as_they_are_read() -> None:
    for name in (*studies.MAIN, *studies.PAPERS):
        assert studies.method_name(studies.method(SMALL, name)) == name


def test_every_run_of_the_evaluation_can_be_run_and_is_listed_once() -> None:
    for name, study in studies.STUDIES.items():
        scenarios = list(study())
        assert len(set(scenarios)) == len(scenarios), name
        for scenario in scenarios:
            scenario.check()
            assert scenario.seed not in studies.TUNING_SEEDS or scenario.trace, name


def test_a_first_look_takes_the_first_seeds_of_each_cell() -> None:
    scenarios = [
        replace(SMALL, policy=policy, seed=seed, load=load)
        for policy in ("queue", "retract")
        for seed in (5, 3, 4)
        for load in (0.9, 1.2)
    ]
    found = campaign.first_seeds(scenarios, 2)
    assert len(found) == 8 and {scenario.seed for scenario in found} == {3, 4}
    assert campaign.first_seeds(scenarios, None) == scenarios


def test_a_campaign_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "UNFINISHED", tmp_path / "parts")
    scenarios = [replace(SMALL, policy=policy) for policy in ("retract", "queue")]
    first = campaign.finish("s", scenarios[:1], tmp_path, workers=1)
    ran: list[Scenario] = []

    def counted(missing: list[Scenario], workers: int) -> list[campaign.Row]:
        ran.extend(missing)
        return [campaign.row_of(scenario) for scenario in missing]

    monkeypatch.setattr(campaign, "run_all", counted)
    both = campaign.finish("s", scenarios, tmp_path, workers=1)
    assert ran == scenarios[1:]
    assert both[0] == first[0]
    assert len(campaign.read(tmp_path / "s.jsonl.gz")) == 2
    monkeypatch.setattr(campaign, "code_hash", lambda: "changed")
    campaign.finish("s", scenarios, tmp_path, workers=1)
    assert ran[1:] == scenarios


def test_a_part_of_a_study_adds_to_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "UNFINISHED", tmp_path / "parts")
    scenarios = [replace(SMALL, policy=policy) for policy in ("retract", "queue", "swap")]
    campaign.finish("s", scenarios, tmp_path, workers=1, now=scenarios[:1])
    found = campaign.finish("s", scenarios, tmp_path, workers=1, now=scenarios[2:])
    assert [row["scenario"]["policy"] for row in found] == ["retract", "swap"]
    # What earlier code made stays where it is not asked for, and is done again where it is.
    with monkeypatch.context() as changed:
        changed.setattr(campaign, "code_hash", lambda: "changed")
        changed.setattr(campaign, "run_all", lambda missing, _: map(campaign.row_of, missing))
        found = campaign.finish("s", scenarios, tmp_path, workers=1, now=scenarios[2:])
    assert [row["code"] for row in found] == [campaign.code_hash(), "changed"]
    kept = campaign.read(tmp_path / "s.jsonl.gz")
    assert kept == sorted(found, key=lambda row: str(row["code"]))
    # What has left the study leaves the file.
    found = campaign.finish("s", scenarios[1:], tmp_path, workers=1, now=[])
    assert [row["scenario"]["policy"] for row in found] == ["swap"]


def test_a_study_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.jsonl.gz"
    campaign.write(path, [row("retract", 1, 0.5)])

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        campaign.write(path, [])
    assert len(campaign.read(path)) == 1


def test_runs_of_earlier_code_are_said_to_be_such_and_done_again_too() -> None:
    rows = [campaign.row_of(replace(SMALL, seed=seed)) for seed in (1, 2, 3)]
    found: dict[str, list[campaign.Row]] = {name: [] for name in studies.STUDIES}
    found["mixes"] = rows
    assert "earlier code" not in "".join(report._report(found))
    rows[0]["code"] = rows[1]["code"] = "earlier"
    rows[1]["metrics"] = rows[1]["metrics"] | {"good_requests": 0.123}
    again = report.run_again(rows, count=5, seed=0)
    assert sorted((one.earlier, one.differs) for one in again) == [
        (False, ()),
        (True, ()),
        (True, ("metrics",)),
    ]
    assert (
        "Of the 3 runs 2 were made by earlier code; of 2 of these that were done again with the "
        "code as it is, 1 came out the same."
    ) in "".join(report._report(found, again))


def test_what_is_missing_of_a_study_is_left_out() -> None:
    part = [row("paper-uniform", 1, 0.5, slo_scale=1.0), row("retract", 1, 0.5, slo_scale=1.0)]
    for one in part:
        one["metrics"] = {metric: 0.25 for _, metric, *_ in report.PAPER_COLUMNS}
    text = "\n".join(report._paper(part))
    assert "| one distance for all | 45.1 | 25.0 |" in text and "and pauses" not in text
    assert "TBT attainment at SLO scale 1" not in "\n".join(report._paper(part[1:]))
    names = "orbitflow", "orbitflow:no-pause", "orbitflow:no-chunking"
    rules = [row(name, 1, 0.5, load=load) for name, load in zip(names, (1, 1, 2), strict=True)]
    for one in rules:
        one["metrics"]["good_requests_strict_generated"] = 0.5
    text = "\n".join(report._ablation(rules))
    assert "`orbitflow:no-pause`" in text and "no-chunking" not in text
    ours = row("orbitflow", 1, 0.5, paced=True, link_gb_per_s=6.0)
    ahead = figures._ahead([ours, row("retract", 1, 0.25, link_gb_per_s=6.0)])
    assert ahead == {"over stock SGLang": {(2.0, 6.0): 25.0}}
    assert len(figures.crossover_figure(ahead).axes) == 2  # with its scale of greys
    assert figures._ahead([ours]) == {}


def test_a_stored_run_that_says_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = campaign.row_of(SMALL)
    (one,) = report.run_again([stored], count=5, seed=0)
    assert not one.differs
    stored["metrics"] = stored["metrics"] | {"good_requests": 0.123}
    (one,) = report.run_again([stored], count=5, seed=0)
    assert str(one).startswith("a run differs in metrics")


@pytest.mark.parametrize("policy", ["orbitflow", "paper"])  # the authors' plans have ties
def test_equal_scenarios_give_equal_bytes_on_every_machine(tmp_path: Path, policy: str) -> None:
    """With other hashes and threads, and as on a processor without AVX."""
    old = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"}
    outputs = []
    for threads, processor in (("1", {}), ("2", old if platform.machine() == "x86_64" else {})):
        environment = {"PYTHONHASHSEED": threads, "OMP_NUM_THREADS": threads} | processor
        path = tmp_path / f"{threads}.json"
        command = [sys.executable, "-m", "eval.simulate", "--mix", "MIX", "--load", "1.5",
                   "--profile", "a5000-8b", "--policy", policy, "--requests", "12",
                   "--paced", "--json", str(path)]  # fmt: skip
        subprocess.run(command, check=True, env=environment, capture_output=True)
        found = json.loads(path.read_text())
        outputs.append(orjson.dumps([found["metrics"], found["rows"]]))
    assert outputs[0] == outputs[1]


def test_simulate_refuses_what_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--mix", "SS", "--profile", "a5000-8b", "--policy", "orbitflow"]
    for change, text in (
        (["--policy", "magic"], "unknown policy"),
        (["--profile", "a100"], "unknown profile"),
        (["--mix", "XX"], "unknown mix"),
        (["--arrivals", "weekly"], "unknown arrival"),
    ):
        assert simulate.main([*base, *change]) == 2
        assert text in capsys.readouterr().err


def test_two_results_are_compared_request_by_request() -> None:
    busy = replace(SMALL, mix="MIX", load=3.0, requests=20)
    one, other = (run(replace(busy, policy=name)).as_dict() for name in ("queue", "orbitflow"))
    gained = sum(row["good"] for row in other["rows"]) - sum(row["good"] for row in one["rows"])
    text = "\n".join(compare.compared(one, other))
    assert gained > 0 and f"good, second minus first: +{5 * gained:.1f} points" in text
    assert "policy" in text
    with pytest.raises(ValueError, match="no request in common"):
        compare.compared(one, other | {"rows": []})
    for field in ("arrival_s", "input_tokens", "output_tokens"):
        changed = [other["rows"][0] | {field: 7}, *other["rows"][1:]]
        with pytest.raises(ValueError, match=f"same trace: r0000 differs in {field}"):
            compare.compared(one, other | {"rows": changed})
