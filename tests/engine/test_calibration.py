"""The cost profile is measured on the engine at start, kept, given, and leaves nothing behind."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from servers import CONCURRENCY, WANTED, Stock, assert_nothing_is_left, in_full_only, orbitflow_args

from eval.client import Request
from eval.server import Server, ServerFailed
from orbitflow_sglang.planner.cost_model import ComputeModel, Profile, TransferModel
from orbitflow_sglang.residency.layout import Capacity, KVLayout
from orbitflow_sglang.residency.store import ResidencyStore

LINK_GB_PER_S = 0.2
SIZES = ("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0.2")
SLOW_LINK = (*SIZES, "--orbitflow-emulated-link-gb-per-s", str(LINK_GB_PER_S))

PROFILE = Profile(  # of the tiny Llama with 8 layers, pages of 16 tokens, float32
    model="given",
    device="by hand",
    page_bytes=16_384,
    compute=ComputeModel(8, 1.25e-3, 1e-4, 1e-7, 1.0),
    h2d=TransferModel(1e-5, 1e-5, 1.0),
    d2h=TransferModel(1e-5, 1e-5, 1.0),
    prefill_tokens_per_s=4321.0,
)


def server(cache: Path, *extra: str, policy: str = "orbitflow") -> Server:
    args = orbitflow_args("llama", "--orbitflow-policy", policy, *extra)
    return Server(args, env={"ORBITFLOW_CACHE_DIR": str(cache)})


def state_of(running: Server) -> dict[str, Any]:
    (state,) = running.orbitflow()
    assert state is not None
    return state


def assert_sensible(profile: Mapping[str, Any]) -> None:
    compute = profile["compute"]
    assert compute["layers"] == 8
    for name in ("constant_s", "per_request_s", "per_token_s"):
        assert compute[name] >= 0, name
    step_s = 8 * (compute["constant_s"] + compute["per_request_s"] + 1000 * compute["per_token_s"])
    assert step_s > 1e-4, "no CPU is that fast"
    assert compute["r2"] <= 1
    assert profile["prefill_tokens_per_s"] > 0
    for link in ("h2d", "d2h"):
        assert profile[link]["setup_s"] >= 0
        # An emulated link never is faster than its rate; how much slower depends on the machine.
        assert 0 < profile[link]["bytes_per_s"] <= LINK_GB_PER_S * 1e9 * 1.02


def most_together(running: Server) -> int:
    """How many of twelve decode together that have half an arena in common, and little else."""
    lax = {"orbitflow": {"ttft_slo_ms": 1e6, "tpot_slo_ms": 1e5}}
    prefix = [7] * 1024
    running.generate(prefix, 1)
    wanted = [Request(f"like-{n}", (*prefix, *[100 + n] * 10), 32) for n in range(12)]
    running.generate_batch(wanted, custom_params=lax)
    return max(map(int, state_of(running)["decode_batch_sizes"]))


def test_costs_are_measured_and_nothing_is_left_of_it(stock: Stock, tmp_path: Path) -> None:
    with server(tmp_path, *SLOW_LINK) as running:
        fresh = state_of(running)
        for place in ("arena", "ring", "host"):
            assert fresh[place]["free"] == fresh[place]["pages"], (place, fresh)
        assert fresh["h2d"]["bytes"] == fresh["d2h"]["bytes"] == 0
        assert fresh["failed_idle_checks"] == 0
        assert fresh["policy"] == "orbitflow"
        # Nothing but health checks has ended so far, and these say nothing about real requests.
        running.generate_batch(WANTED)
        assert state_of(running)["decode_batch_sizes"].get("2", 0) > 0
        answers = running.generate_many(WANTED, CONCURRENCY)
        assert most_together(running) >= 6
        assert_nothing_is_left(running)
    measured = fresh["profile"]
    assert measured["source"] == "measured"
    assert measured["seconds"] > 0
    assert_sensible(measured)
    expected = stock.answers("llama", WANTED)
    assert [a.output_ids for a in answers] == [e.output_ids for e in expected]


@in_full_only
def test_costs_are_measured_once(tmp_path: Path) -> None:
    with server(tmp_path, *SLOW_LINK) as running:
        measured = state_of(running)["profile"]
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    with server(tmp_path, *SLOW_LINK) as running:
        again = state_of(running)["profile"]
    assert again.pop("source") == "cache"
    assert measured.pop("source") == "measured"
    for profile in (again, measured):
        profile.pop("seconds")
    assert again == measured
    assert kept.read_bytes() == before
    assert list(tmp_path.iterdir()) == [kept]


@in_full_only
@pytest.mark.parametrize("page_size", ["1", "64"])
def test_costs_are_measured_with_small_and_large_pages(tmp_path: Path, page_size: str) -> None:
    with server(tmp_path, *SLOW_LINK, "--page-size", page_size) as running:
        state = state_of(running)
        assert state["profile"]["source"] == "measured"
        assert_sensible(state["profile"])
        running.generate_many(WANTED, CONCURRENCY)
        assert_nothing_is_left(running)


@in_full_only
@pytest.mark.parametrize("most", [1, 2])
def test_costs_are_measured_where_few_may_decode_together(tmp_path: Path, most: int) -> None:
    with server(tmp_path, *SLOW_LINK, "--max-running-requests", str(most)) as running:
        assert_sensible(state_of(running)["profile"])
        running.generate_many(WANTED, CONCURRENCY)
        assert max(map(int, state_of(running)["decode_batch_sizes"])) <= most
        assert_nothing_is_left(running)


@in_full_only
def test_without_a_host_store_no_plan_counts_on_the_link(tmp_path: Path) -> None:
    sizes = ("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0")
    with server(tmp_path, *sizes) as running:
        profile = state_of(running)["profile"]
        assert profile["compute"]["per_request_s"] >= 0
        page_s = 16_384 / profile["h2d"]["bytes_per_s"]
        assert page_s == pytest.approx(1), "far more than a step takes"


@in_full_only
@pytest.mark.parametrize("policy", ["static:1", "orbitflow"])
def test_what_never_plans_measures_nothing_and_a_given_file_is_used(
    tmp_path: Path, policy: str
) -> None:
    folder = tmp_path / "cache"
    given = tmp_path / "given.json"
    given.write_bytes(PROFILE.dump())
    with server(folder, *SIZES, "--orbitflow-profile", str(given), policy=policy) as running:
        profile = state_of(running)["profile"]
        short, long = (running.generate([7] * tokens, 2).meta["orbitflow"] for tokens in (16, 3000))
    assert not folder.exists()
    if policy == "static:1":
        assert profile is None
    else:
        # Nobody gave targets: twice the prefill of that prompt, by what was given, 1 s at least.
        assert short["slo"]["ttft_s"] == 1
        assert long["slo"]["ttft_s"] == pytest.approx(2 * 3000 / PROFILE.prefill_tokens_per_s)
        assert short["slo"]["assumed"] and long["slo"]["assumed"]
        assert profile["source"] == "file"
        assert profile["compute"]["constant_s"] == PROFILE.compute.constant_s
        assert profile["prefill_tokens_per_s"] == PROFILE.prefill_tokens_per_s


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("compute", "layers", 12, "it is of a model with 12 layers, and this one has 8"),
        pytest.param(
            None, "page_bytes", 4096, "its pages have 4096 bytes, and here they have 16384",
            marks=in_full_only,
        ),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, part: str | None, name: str, value: int, reason: str
) -> None:
    given = orjson.loads(PROFILE.dump())
    (given if part is None else given[part])[name] = value
    path = tmp_path / "profile.json"
    path.write_bytes(orjson.dumps(given))
    running = server(tmp_path, *SIZES, "--orbitflow-profile", str(path))
    with pytest.raises(ServerFailed) as caught:
        running.start()
    assert f"--orbitflow-profile {path}: {reason}: give a profile" in str(caught.value)
    if part == "compute":
        assert "Traceback" not in running.log.read_text(), "known before any process starts"


@in_full_only
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with server(blocked, *SLOW_LINK) as running:
        assert state_of(running)["profile"]["source"] == "measured"
        assert "cannot keep its cost profile" in running.log.read_text()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32])
def test_what_is_measured_on_is_kv_also_where_that_has_8_bits(dtype: torch.dtype) -> None:
    """With numbers cast to bytes every eighth would be NaN, and so would all that a step does."""
    probe = object.__new__(importlib.import_module("orbitflow_sglang.engine.probe").Probe)
    stored = torch.uint8 if dtype.itemsize == 1 else dtype
    layout = KVLayout(2, 16, 1, head_dim=64, v_head_dim=64, dtype=stored)
    store = ResidencyStore(layout, Capacity(12, 2, 0, 5))
    pool = SimpleNamespace(get_kvcache=lambda: SimpleNamespace(dtype=dtype))
    probe._scheduler = SimpleNamespace(token_to_kv_pool_allocator=pool)
    rows = SimpleNamespace(written=lambda rows, tokens: None)
    pages = np.array([1, 3, 4])
    probe._runtime = SimpleNamespace(store=store, rows=rows, pages_of=lambda live: pages)
    kv = SimpleNamespace(req_pool_idx=0, kv_allocated_len=48)
    probe._fill(SimpleNamespace(reqs=[SimpleNamespace(rid="one", kv=kv)]))
    for layer, buffer in itertools.product(range(2), (store.arena.k, store.arena.v)):
        held = buffer[torch.from_numpy(store.table.device_page[layer, pages].astype(np.int64))]
        numbers = held.view(dtype).float()
        assert numbers.isfinite().all() and 0.8 < numbers.std() < 1.2
