"""The flags: what they accept, what they say when they refuse, and how they travel."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import pytest

from orbitflow_sglang import config
from orbitflow_sglang.config import CONFIG_ENV, ConfigError, OrbitFlowConfig

pytestmark = pytest.mark.unit

# As the contract names them; the value is one that each accepts.
FLAGS = {
    "--orbitflow-policy": "static:2",
    "--orbitflow-arena-tokens": "2048",
    "--orbitflow-arena-fraction": "0.5",
    "--orbitflow-host-memory-gb": "1.5",
    "--orbitflow-ring-pages": "16",
    "--orbitflow-emulated-link-gb-per-s": "12.5",
    "--orbitflow-disable": "pause,ordering",
    "--orbitflow-ttft-slo-ms": "800",
    "--orbitflow-tpot-slo-ms": "50",
    "--orbitflow-tbt-slo-ms": "200.5",
    "--orbitflow-slo-scale": "2.5",
    "--orbitflow-token-deposit": "",
    "--orbitflow-max-paused": "4",
    "--orbitflow-profile": "profile.json",
    "--orbitflow-overlap-schedule": "",
}
WRONG_VALUES: list[tuple[str, str, dict[str, Any]]] = [
    ("--orbitflow-arena-tokens", "above 0", {"arena_tokens": 0}),
    ("--orbitflow-arena-tokens", "above 0", {"arena_tokens": -5}),
    ("--orbitflow-arena-fraction", "above 0", {"arena_fraction": 0.0}),
    ("--orbitflow-arena-fraction", "at most 1", {"arena_fraction": 1.01}),
    ("--orbitflow-arena-fraction", "a number", {"arena_fraction": float("nan")}),
    ("--orbitflow-host-memory-gb", "negative", {"host_memory_gb": -0.1}),
    ("--orbitflow-host-memory-gb", "a number", {"host_memory_gb": float("inf")}),
    ("--orbitflow-ring-pages", "at least 2", {"ring_pages": 1}),
    ("--orbitflow-ring-pages", "at least 2", {"ring_pages": 0}),
    ("--orbitflow-emulated-link-gb-per-s", "above 0", {"emulated_link_gb_per_s": 0.0}),
    ("--orbitflow-emulated-link-gb-per-s", "a number", {"emulated_link_gb_per_s": float("nan")}),
    ("--orbitflow-policy", "all-host or random:SEED", {"policy": "nonsense"}),
    ("--orbitflow-policy", "at least 1", {"policy": "static:0"}),
    ("--orbitflow-policy", "unknown rule 'x'", {"policy": "orbitflow:no-x"}),
    ("--orbitflow-disable", "unknown rule 'nap'", {"policy": "swap", "disable": ("nap",)}),
    ("--orbitflow-disable", "no rules", {"policy": "static:1", "disable": ("pause",)}),
    ("--orbitflow-tpot-slo-ms", "above 0", {"tpot_slo_ms": 0.0}),
    ("--orbitflow-tbt-slo-ms", "above 0", {"tbt_slo_ms": -1.0}),
    ("--orbitflow-tpot-slo-ms", "no target", {"tpot_slo_ms": 1e-322}),
    ("--orbitflow-ttft-slo-ms", "no target", {"ttft_slo_ms": 1e308}),
    ("--orbitflow-ttft-slo-ms", "a number", {"ttft_slo_ms": float("nan")}),
    ("--orbitflow-slo-scale", "above 0", {"slo_scale": 0.0}),
    ("--orbitflow-slo-scale", "derives all", {"slo_scale": 2.0, "tpot_slo_ms": 50.0}),
    ("--orbitflow-max-paused", "negative", {"max_paused": -1}),
]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return parser


def parsed(parser: argparse.ArgumentParser, line: str) -> OrbitFlowConfig | None:
    return config.from_arguments(parser.parse_args(shlex.split(line)))


@pytest.mark.parametrize(("flag", "says", "values"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_its_flag_and_a_reason(
    flag: str, says: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        OrbitFlowConfig(**values)
    assert flag in str(caught.value)
    assert says in str(caught.value)


def test_the_two_ways_to_size_the_arena_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give only one of them") as caught:
        OrbitFlowConfig(arena_tokens=10, arena_fraction=0.5)
    for flag in ("--orbitflow-arena-tokens", "--orbitflow-arena-fraction"):
        assert flag in str(caught.value)


def test_the_bounds_themselves_are_accepted() -> None:
    OrbitFlowConfig(arena_tokens=1, host_memory_gb=0.0, ring_pages=2)
    OrbitFlowConfig(arena_fraction=1.0)


def test_the_group_has_exactly_the_flags_of_the_contract(parser: argparse.ArgumentParser) -> None:
    (group,) = (group for group in parser._action_groups if group.title == "orbitflow")
    found = {name for action in group._group_actions for name in action.option_strings}
    assert found == {"--enable-orbitflow", *FLAGS}


def test_every_flag_sets_a_field_and_every_field_has_a_flag(
    parser: argparse.ArgumentParser,
) -> None:
    wanted = {
        "policy": "static:2",
        "arena_tokens": 2048,
        "arena_fraction": 0.5,
        "host_memory_gb": 1.5,
        "ring_pages": 16,
        "emulated_link_gb_per_s": 12.5,
        "ttft_slo_ms": 800,
        "tpot_slo_ms": 50,
        "tbt_slo_ms": 200.5,
        "slo_scale": 2.5,
        "token_deposit": True,
        "max_paused": 4,
        "profile": "profile.json",
        "overlap_schedule": True,
    }
    rules = parsed(
        parser, "--orbitflow-disable pause,ordering --enable-orbitflow --orbitflow-policy swap"
    )
    assert rules == OrbitFlowConfig(policy="swap", disable=("pause", "ordering"))
    wanted_flags = {config.flag(field) for field in [*wanted, "disable"]}
    assert wanted_flags == FLAGS.keys()
    for field, value in wanted.items():
        name = config.flag(field)
        found = parsed(parser, f"--enable-orbitflow {name} {FLAGS[name]}")
        assert found == OrbitFlowConfig(**{field: value})


def test_with_the_switch_alone_everything_has_its_default(parser: argparse.ArgumentParser) -> None:
    assert parsed(parser, "--enable-orbitflow") == OrbitFlowConfig()
    assert OrbitFlowConfig().policy == "orbitflow"


def test_without_any_flag_there_is_no_configuration(parser: argparse.ArgumentParser) -> None:
    assert parsed(parser, "") is None


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_without_the_switch_is_refused_by_name(
    parser: argparse.ArgumentParser, flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"{flag} has no effect: add --enable-orbitflow"):
        parsed(parser, f"{flag} {FLAGS[flag]}")


def test_a_namespace_that_knows_no_flag_of_ours_asks_for_nothing() -> None:
    assert config.from_arguments(argparse.Namespace(model_path="x")) is None


@pytest.mark.parametrize(
    "wanted",
    [
        OrbitFlowConfig(),
        OrbitFlowConfig(policy="random:7", arena_tokens=4096, ring_pages=8),
        OrbitFlowConfig(arena_fraction=0.25, host_memory_gb=0.2, emulated_link_gb_per_s=1.5),
    ],
)
def test_an_exported_configuration_is_read_back_as_it_was(
    wanted: OrbitFlowConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG_ENV, "")  # so that it is put back as it was
    wanted.export()
    assert OrbitFlowConfig.from_env() == wanted


@pytest.mark.parametrize("text", [None, ""])
def test_without_the_variable_orbitflow_is_off(
    text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    if text is not None:
        monkeypatch.setenv(CONFIG_ENV, text)
    assert OrbitFlowConfig.from_env() is None


@pytest.mark.parametrize("text", ["1", "{policy", '["resident"]', '{"arena_token": 5}'])
def test_a_variable_that_is_no_configuration_is_refused_by_name(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG_ENV, text)
    with pytest.raises(ConfigError, match=CONFIG_ENV):
        OrbitFlowConfig.from_env()


def test_a_configuration_in_the_variable_is_validated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, json.dumps({"ring_pages": 1}))
    with pytest.raises(ConfigError, match="--orbitflow-ring-pages"):
        OrbitFlowConfig.from_env()


@pytest.mark.parametrize("rules", ["pause, chunking", ["pause", "chunking"], ("pause", "chunking")])
def test_rules_may_be_listed_or_written_as_on_the_command_line(rules: object) -> None:
    """As ``sgl.Engine(orbitflow_disable=...)`` of a patched SGLang hands them over."""
    namespace = argparse.Namespace(enable_orbitflow=True, orbitflow_disable=rules)
    found = config.from_arguments(namespace)
    assert found is not None and found.disable == ("pause", "chunking")
