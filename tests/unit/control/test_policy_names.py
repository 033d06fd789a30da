"""The registry of policies: names, suffixes, ablations."""

from __future__ import annotations

import pytest

from orbitflow_sglang.control.policies import RULES, find_policy

pytestmark = pytest.mark.unit


def test_orbitflow_has_every_rule_and_an_ablation_one_less() -> None:
    assert find_policy("orbitflow").rules == set(RULES)
    for rule in RULES:
        by_name, by_flag = find_policy(f"orbitflow:no-{rule}"), find_policy("orbitflow", [rule])
        assert by_name == by_flag
        assert by_name.rules == set(RULES) - {rule}
        assert by_name.name == f"orbitflow:no-{rule}"


def test_several_rules_are_switched_off_together() -> None:
    spec = find_policy("orbitflow:no-pause:no-deposit", ["ordering"])
    assert spec.rules == set(RULES) - {"pause", "deposit", "ordering"}
    assert spec.name == "orbitflow:no-pause:no-deposit:no-ordering"


def test_without_streaming_nothing_is_streamed() -> None:
    assert find_policy("orbitflow").streaming == "hidden"
    assert find_policy("orbitflow:no-streaming").streaming == "none"


@pytest.mark.parametrize("name", ["swap", "queue", "retract", "paper", "time-sliced-swap"])
def test_a_baseline_can_be_given_our_ordering(name: str) -> None:
    plain, ordered = find_policy(name), find_policy(f"{name}+order")
    assert ordered.rules == plain.rules | {"ordering"}
    assert ordered.name == f"{name}+order"
    assert (ordered.overflow, ordered.streaming) == (plain.overflow, plain.streaming)


@pytest.mark.parametrize(
    ("name", "spills"),
    [
        ("orbitflow", True), ("paper", True), ("swap", True), ("time-sliced-swap", True),
        ("queue", False), ("retract", False), ("resident", False), ("static:2", True),
        ("all-host", True), ("random:3", True),
    ],
)  # fmt: skip
def test_who_needs_a_host_store(name: str, spills: bool) -> None:
    assert find_policy(name).spills is spills


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("orbit", "unknown policy 'orbit'"),
        ("static:0", "at least 1"),
        ("static:2+order", "unknown policy 'static:2[+]order'"),
        ("swap+ord", "unknown policy"),
        ("orbitflow:no-sleep", "unknown rule 'sleep'"),
        ("static:2:no-pause", "no rules to switch off"),
        ("", "unknown policy"),
    ],
)
def test_other_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_policy(name)
