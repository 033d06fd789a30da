"""How the sizes that operators give, or leave open, become page counts."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbitflow_sglang.config import ConfigError, OrbitFlowConfig
from orbitflow_sglang.engine import sizing
from orbitflow_sglang.engine.sizing import Budget, check_sizes, resolve_capacity
from orbitflow_sglang.residency.layout import Capacity

pytestmark = pytest.mark.unit

PAGE_BYTES = 1000
BUDGET = Budget(
    profiled_tokens=1600, max_total_tokens=None, layers=8, page_size=16, token_bytes=500
)
PLENTY = 10**12


def resolved(
    config: OrbitFlowConfig, budget: Budget = BUDGET, free_host_bytes: int = PLENTY
) -> Capacity:
    assert budget.token_bytes * budget.page_size // budget.layers == PAGE_BYTES
    return resolve_capacity(config, budget, free_host_bytes)


def test_by_default_the_arena_is_what_sglang_profiled_and_the_host_holds_eight_of_it() -> None:
    arena = 100 * 8
    assert resolved(OrbitFlowConfig(policy="static:1")) == Capacity(
        arena_pages=arena,
        ring_pages=arena // 8,
        host_pages=8 * arena,
        logical_pages=(arena - arena // 8 + 8 * arena) // 8 - 1,  # one comes back at a time
    )


def test_the_ring_is_smaller_where_little_is_streamed_of_every_layer() -> None:
    assert resolved(OrbitFlowConfig(policy="orbitflow")).ring_pages == 800 // 16
    assert resolved(OrbitFlowConfig(policy="swap")).ring_pages == 800 // 16
    assert resolved(OrbitFlowConfig(policy="paper")).ring_pages == 800 // 8


def test_by_default_the_host_store_takes_at_most_half_of_what_is_free() -> None:
    capacity = resolved(OrbitFlowConfig(policy="static:1"), free_host_bytes=100 * PAGE_BYTES)
    assert capacity.host_pages == 50


def test_the_resident_policy_has_neither_ring_nor_host_store() -> None:
    assert resolved(OrbitFlowConfig(policy="resident")) == Capacity(800, 0, 0, 100)


@pytest.mark.parametrize("gb", [None, 0.001])
def test_ranks_on_one_host_share_its_memory(gb: float | None) -> None:
    config = OrbitFlowConfig(policy="static:1", host_memory_gb=gb)
    budget = replace(BUDGET, ranks=4)
    free = 800 * PAGE_BYTES
    total = 400 if gb is None else 1000  # half of what is free, or what was given
    if gb is not None:
        with pytest.raises(ConfigError, match="free on this host"):
            check_sizes(config, 8, 16, free)
    # The others may have taken theirs already: of what is free, only the own share must be.
    assert resolved(config, budget, free).host_pages == total // 4
    assert resolved(config, budget, PLENTY).host_pages == (8 * 800 if gb is None else total // 4)


def test_the_default_arena_is_bounded_by_max_total_tokens() -> None:
    budget = replace(BUDGET, max_total_tokens=800)
    assert resolved(OrbitFlowConfig(), budget).arena_pages == 50 * 8


def test_an_arena_that_is_given_is_not_but_what_sglang_may_hand_out_is() -> None:
    budget = replace(BUDGET, max_total_tokens=800)
    capacity = resolved(OrbitFlowConfig(policy="static:1", arena_tokens=1600), budget)
    assert capacity.arena_pages == 100 * 8
    assert capacity.logical_pages == 50


def test_a_fraction_is_a_share_of_what_was_profiled() -> None:
    assert resolved(OrbitFlowConfig(arena_fraction=0.25)).arena_pages == 25 * 8


def test_sizes_that_are_given_are_taken_as_they_are() -> None:
    config = OrbitFlowConfig(
        policy="all-host", arena_tokens=800, host_memory_gb=2e-3, ring_pages=40
    )
    assert resolved(config) == Capacity(400, 40, 2000, (360 + 2000) // 8 - 1)


def test_an_arena_of_part_pages_is_rounded_down() -> None:
    config = OrbitFlowConfig(policy="resident", arena_tokens=47)
    assert resolved(config).arena_pages == 2 * 8


def test_the_default_ring_has_two_pages_at_least() -> None:
    budget = replace(BUDGET, layers=2, token_bytes=125)
    capacity = resolved(OrbitFlowConfig(policy="static:1", arena_tokens=48), budget)
    assert (capacity.arena_pages, capacity.ring_pages) == (6, 2)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (OrbitFlowConfig(arena_tokens=1601), ["--orbitflow-arena-tokens", "--mem-fraction-static"]),
        (OrbitFlowConfig(arena_tokens=31), ["--orbitflow-arena-tokens", "--page-size"]),
        (OrbitFlowConfig(arena_fraction=0.01), ["--orbitflow-arena-tokens", "--page-size"]),
        (
            OrbitFlowConfig(policy="static:1", arena_tokens=800, ring_pages=399),
            ["--orbitflow-arena-tokens", "--orbitflow-ring-pages"],
        ),
        (OrbitFlowConfig(policy="static:1", host_memory_gb=1e4), ["--orbitflow-host-memory-gb"]),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_the_flags_to_change(
    config: OrbitFlowConfig, flags: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(config)
    assert [flag for flag in flags if flag not in str(caught.value)] == []


def test_what_was_left_open_is_logged_with_its_flag(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, sizing.__name__)
    resolved(OrbitFlowConfig(policy="static:1"))
    for flag in ("--orbitflow-arena-tokens", "--orbitflow-ring-pages", "--orbitflow-host-memory"):
        assert f"OrbitFlow chose {flag}" in caplog.text
    caplog.clear()
    resolved(
        OrbitFlowConfig(policy="static:1", arena_tokens=800, ring_pages=8, host_memory_gb=1e-3)
    )
    assert caplog.text == ""


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    layers, page_size = draw(st.integers(1, 16)), draw(st.sampled_from([1, 4, 16, 64]))
    return Budget(
        profiled_tokens=draw(st.integers(1, 5000)),
        max_total_tokens=draw(st.none() | st.integers(page_size, 5000)),
        layers=layers,
        page_size=page_size,
        token_bytes=layers * draw(st.sampled_from([64, 1024])),
    )


@st.composite
def configs(draw: st.DrawFn) -> OrbitFlowConfig:
    tokens = draw(st.none() | st.integers(1, 6000))
    fraction = draw(st.none() | st.floats(0.01, 1)) if tokens is None else None
    return OrbitFlowConfig(
        policy=draw(st.sampled_from(["resident", "static:1", "all-host", "random:3"])),
        arena_tokens=tokens,
        arena_fraction=fraction,
        host_memory_gb=draw(st.none() | st.floats(0, 0.01)),
        ring_pages=draw(st.none() | st.integers(2, 100)),
    )


@given(configs(), budgets(), st.integers(0, 2 * 10**7))
def test_a_capacity_holds_a_request_and_stays_within_what_there_is(
    config: OrbitFlowConfig, budget: Budget, free: int
) -> None:
    try:
        capacity = resolve_capacity(config, budget, free)
    except ConfigError as error:
        assert "--" in str(error)
        return
    page_bytes = budget.token_bytes * budget.page_size // budget.layers
    assert capacity.main_pages >= 2 * budget.layers
    assert capacity.arena_pages * budget.page_size <= budget.profiled_tokens * budget.layers
    assert capacity.host_pages * page_bytes <= free
    together = capacity.main_pages + capacity.host_pages
    assert 0 < capacity.logical_pages * budget.layers <= together
    assert capacity.logical_pages * budget.page_size <= (budget.max_total_tokens or math.inf)


@given(configs(), budgets(), st.integers(0, 2 * 10**7))
def test_the_launcher_refuses_nothing_that_the_scheduler_would_accept(
    config: OrbitFlowConfig, budget: Budget, free: int
) -> None:
    try:
        check_sizes(config, budget.layers, budget.page_size, free)
    except ConfigError:
        with pytest.raises(ConfigError):
            resolve_capacity(config, budget, free)


@given(configs(), budgets(), st.integers(0, 2 * 10**7))
def test_the_launcher_sees_what_is_wrong_with_the_sizes_that_were_given(
    config: OrbitFlowConfig, budget: Budget, free: int
) -> None:
    if config.arena_tokens is None or config.arena_tokens > budget.profiled_tokens:
        return  # these depend on what SGLang profiles once the model is loaded
    try:
        resolve_capacity(config, budget, free)
    except ConfigError:
        with pytest.raises(ConfigError):
            check_sizes(config, budget.layers, budget.page_size, free)


def test_memory_that_is_free_is_bounded_by_the_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, usage = tmp_path / "limit", tmp_path / "usage"
    monkeypatch.setattr(sizing, "CGROUP_LIMITS", (str(limit),))
    monkeypatch.setattr(sizing, "CGROUP_USAGE", (str(usage),))
    unbounded = sizing.free_host_bytes()  # no such cgroup
    assert unbounded > 0
    usage.write_text("900\n")
    limit.write_text("1000\n")
    assert sizing.free_host_bytes() == 100
    limit.write_text("800\n")  # lowered below what is in use
    assert sizing.free_host_bytes() == 0
    limit.write_text("max\n")
    assert sizing.free_host_bytes() > 1000
