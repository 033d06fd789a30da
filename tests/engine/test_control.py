"""The controller on a real server: pauses, plans, chunks and paced delivery change no token.

Every cell compares with unmodified SGLang on the same requests. Penalties are compared
without overlapped scheduling on both sides: with it, SGLang itself counts a token for a
penalty one step late, and loses one whenever a prefill comes between two decode steps.
Seeds are not compared: SGLang reads them under --enable-deterministic-inference alone, which
needs a GPU attention backend. Rows of the samplers' tensors are told apart by top_k = 1: a
request that got a neighbour's row would draw at random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from servers import (
    CONCURRENCY,
    CORE_A_RANK,
    FULL,
    LEAK_CHECKS,
    NO_OVERLAP,
    Stock,
    asked_of_stock,
    asks_stock,
    assert_nothing_is_left,
    orbitflow_args,
    orbitflow_states,
    same_tables,
    set_internal_state,
)

from eval.client import Client, Generation, Request
from eval.identity import Comparison, compare, mixed_requests
from eval.server import Server
from orbitflow_sglang.control.line import KEPT, NEXT

pytestmark = pytest.mark.engine

STYLE = "llama"
WORKLOAD = asked_of_stock(
    STYLE,
    mixed_requests(
        96 if FULL else 16,
        seed=11,
        longest=1000,
        max_new_tokens=48 if FULL else 32,
        shared_fraction=0.4,
    ),
)
# In each of two replicas too more than a step looks at.
CROWD = mixed_requests(3 * (KEPT + NEXT), seed=13, shortest=8, longest=40, max_new_tokens=4)
ARENA = ("--orbitflow-arena-tokens", "2048", "--orbitflow-host-memory-gb", "0.2")
TEST_CONTROL = {"ORBITFLOW_TEST_CONTROL": "resident", **LEAK_CHECKS}
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    }
)
# How a request samples, by its number: greedy ones between those with state of their own.
SAMPLING: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.8, "presence_penalty": 0.4},
    {"temperature": 0.9, "top_k": 1, "logit_bias": {"77": 4.0, "78": -4.0}},
    {"temperature": 0, "json_schema": SCHEMA, "ignore_eos": False},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "min_new_tokens": 8, "ignore_eos": False},
)


@dataclass(frozen=True)
class Setting:
    """One server, and how its requests are sent."""

    name: str
    flags: tuple[str, ...] = ()
    sampled: bool = False
    logprobs: bool = True
    pauses: int = 1
    deposit: bool = False
    mixed_steps: int = 0  # at least so many prefill steps that decoded too
    ranks: tuple[str, ...] = ()


PACE = ("--orbitflow-tpot-slo-ms", "30")
# In `make test` these servers stand in for those of test_parallel.py as well.
DP, TP = ((), ()) if FULL else (("--dp-size", "2"), ("--tp-size", "2"))
SETTINGS = (
    Setting("sampled", (*NO_OVERLAP, *PACE), sampled=True, pauses=2, deposit=True, ranks=DP),
    Setting(
        "mixed",
        # No target that prompts could cost anybody: newcomers would wait, and not mix.
        (
            *("--enable-mixed-chunk", "--chunked-prefill-size", "64"),
            *("--orbitflow-tpot-slo-ms", "5000"),
            *("--max-running-requests", "6"),  # fewer than costs are measured with elsewhere
        ),
        logprobs=False,
        mixed_steps=100 if FULL else 20,
        ranks=TP,
    ),
)
if FULL:
    SETTINGS += (
        Setting("alternating"),
        Setting("deposit", PACE, deposit=True),
        Setting("paper", ("--orbitflow-policy", "paper")),
        Setting("swap", ("--orbitflow-policy", "swap+order")),
        Setting("slices", ("--orbitflow-policy", "time-sliced-swap"), deposit=True),
        Setting("no overlap", NO_OVERLAP, pauses=3),
    )


def sampling_of(setting: Setting, index: int) -> dict[str, Any]:
    params = dict(SAMPLING[index % len(SAMPLING)]) if setting.sampled else {}
    if setting.deposit:
        params["custom_params"] = {"orbitflow": {"deposit": True}}
    return params


def ask_all(client: Client, setting: Setting, wanted: Sequence[Request]) -> list[Generation]:
    def one(index: int) -> Generation:
        request = wanted[index]
        options: dict[str, Any] = {
            "rid": request.rid,
            "logprobs": setting.logprobs,
            **sampling_of(setting, index),
        }
        if setting.deposit:
            *_, last = client.stream(request.input_ids, request.max_new_tokens, **options)
            return last
        return client.generate(request.input_ids, request.max_new_tokens, **options)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(one, range(len(wanted))))


@asks_stock(STYLE)
def with_sampling(server: Client) -> list[Generation]:
    return ask_all(server, Setting("stock", sampled=True), WORKLOAD)


@asks_stock(STYLE)
def crowd(server: Client) -> list[Generation]:
    return server.generate_batch(CROWD)


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda setting: setting.name)
def cell(request: pytest.FixtureRequest) -> Iterator[tuple[Setting, Server]]:
    setting: Setting = request.param
    args = orbitflow_args(STYLE, *ARENA, *setting.flags, *setting.ranks)
    with Server(args, env=TEST_CONTROL | (CORE_A_RANK if setting.ranks else {})) as server:
        yield setting, server


def test_tokens_are_those_of_stock_sglang(
    cell: tuple[Setting, Server],
    stock: Stock,
    identity_cells: dict[str, Comparison],
) -> None:
    setting, server = cell
    set_internal_state(server, "orbitflow_pause", setting.pauses)
    found = ask_all(server, setting, WORKLOAD)
    expected = stock.answers(STYLE, with_sampling if setting.sampled else WORKLOAD)
    result = compare(expected, found, ids_only=not setting.logprobs)
    identity_cells[f"control {setting.name}"] = result
    assert not result.failures, result
    pauses = [generation.meta["orbitflow"]["pauses"] for generation in found]
    assert min(pauses) >= 1, pauses
    states = orbitflow_states(server)
    assert len(states) == (2 if "--dp-size" in setting.ranks else 1)
    controls = [state["control"] for state in states]
    assert all(control["retractions"] == 0 for control in controls), controls
    assert sum(control["pauses"] for control in controls) >= len(WORKLOAD)
    assert all(state["tiered_steps"] > 0 for state in states)
    assert sum(control["mixed_steps"] for control in controls) >= setting.mixed_steps, controls
    if "--tp-size" in setting.ranks:
        assert same_tables(server)
    assert_nothing_is_left(server)


def test_a_line_longer_than_a_step_looks_at_gets_the_tokens_of_stock_sglang(
    cell: tuple[Setting, Server], stock: Stock
) -> None:
    setting, server = cell
    if setting.mixed_steps and not FULL:
        pytest.skip("takes a minute and a half where 6 decode together: in make test-full")
    set_internal_state(server, "orbitflow_pause", 0)
    found = crowd(server)
    longest = max(state["control"]["longest_line"] for state in orbitflow_states(server))
    assert longest > KEPT + NEXT
    result = compare(stock.answers(STYLE, crowd), found)
    assert not result.failures, result
    assert_nothing_is_left(server)
