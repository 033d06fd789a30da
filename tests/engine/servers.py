"""Servers shared by the tests of one configuration, and stock SGLang's answers to compare with.

A start costs 25 s, so a server lives as long as its configuration has tests, policies
are switched while it runs, and stock SGLang is asked once for each model.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from eval.client import Client, Generation, Request
from eval.identity import Comparison, compare, mixed_requests
from eval.server import CPU_ENV, ROOT, Server, stock_args
from eval.tiny_model import TinyModel, build
from orbitflow_sglang.config import CONFIG_ENV

FULL = os.environ.get("ORBITFLOW_TEST_FULL") == "1"
POLICIES = (
    "resident",
    "static:1",
    "static:2",
    "static:3",
    "all-host",
    "random:1",
    "random:2",
    "random:3",
)
# What does not fit the time of `make test`.
in_full_only = pytest.mark.skipif(not FULL, reason="takes servers of its own: in make test-full")
CONCURRENCY = 8
MODELS = {
    "llama": TinyModel("llama", layers=8),
    "qwen2": TinyModel("qwen2", layers=4),
    "qwen3": TinyModel("qwen3", layers=12),
}
NO_OVERLAP = ("--disable-overlap-schedule",)
# SGLang gives a rank a NUMA node, and stops where there are too few.
CORE_A_RANK = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
# With it ``--attention-backend orbitflow_flashinfer`` is served on a CPU.
FAKE_FLASHINFER = {"PYTHONPATH": str(Path(__file__).parents[1] / "fake_flashinfer")}
# SGLang's own search for leaks, behind every step: it ends the server where it finds one.
LEAK_CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
TEST_CONTROL = {"ORBITFLOW_TEST_CONTROL": ",".join(POLICIES), **LEAK_CHECKS}


def workload(style: str) -> list[Request]:
    """Requests of mixed lengths, half of which share a prefix with others."""
    return mixed_requests(
        64 if FULL else 16,
        seed=sorted(MODELS).index(style),
        longest=2300 if FULL else 1200,
        max_new_tokens=64 if FULL else 32,
        shared_fraction=0.5,
    )


def orbitflow_args(style: str, *extra: str) -> list[str]:
    return stock_args(build(MODELS[style]), "--enable-orbitflow", *extra)


def run_python(
    *args: str, timeout_s: float = 240, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``python ARGS`` in a process of its own, on the CPU platform; the caller judges it."""
    cleaned = {k: v for k, v in os.environ.items() if k != CONFIG_ENV}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=cleaned | dict(CPU_ENV) | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


Ask = Callable[[Client], list[Generation]]  # a module's function, as it is the key of its answers
Key = tuple[Request, ...] | Ask
_ASKED: dict[str, list[Key]] = {}


def asked_of_stock(style: str, wanted: Sequence[Request]) -> tuple[Request, ...]:
    """``wanted``, for which stock SGLang is asked in its one start for this model.

    Called on import, so that it is known before the first test starts it.
    """
    _ASKED.setdefault(style, []).append(tuple(wanted))
    return tuple(wanted)


def asks_stock(style: str) -> Callable[[Ask], Ask]:
    """The same for a function that asks in its own way."""

    def register(ask: Ask) -> Ask:
        _ASKED.setdefault(style, []).append(ask)
        return ask

    return register


WANTED = asked_of_stock(
    "llama",
    (
        Request("short", tuple(range(100, 130)), max_new_tokens=24),
        Request("longer", tuple(range(1, 400)), max_new_tokens=24),
    ),
)


class Stock:
    """What unmodified SGLang answers, with its own ``torch_native`` attention.

    llama without overlapped scheduling, which greedy tokens do not depend on and penalties do.
    """

    def __init__(self, folder: Path) -> None:
        """``folder`` keeps the answers for all processes of one test run."""
        self._folder = folder

    def answers(self, style: str, wanted: Sequence[Request] | Ask) -> list[Generation]:
        key = wanted if callable(wanted) else tuple(wanted)
        kept = self._folder / f"stock-{style}.pickle"
        with FileLock(kept.with_suffix(".lock")):
            known = pickle.loads(kept.read_bytes()) if kept.exists() else {}
            if key not in known:
                asked = dict.fromkeys([key, *_ASKED.get(style, ())])
                known |= _answers_of_stock(style, [each for each in asked if each not in known])
                kept.write_bytes(pickle.dumps(known))
        found: list[Generation] = known[key]
        return found


def _answers_of_stock(style: str, keys: Sequence[Key]) -> dict[Key, list[Generation]]:
    flags = NO_OVERLAP if style == "llama" else ()
    args = stock_args(build(MODELS[style]), "--max-total-tokens", "65536", *flags)
    answers = {}
    with Server(args) as server:
        for key in keys:
            answers[key] = key(server) if callable(key) else server.generate_many(key, CONCURRENCY)
            server.flush_cache()
    return answers


@dataclass
class Outcome:
    """Answers in the order of the requests, and which were cut short on purpose."""

    generations: list[Generation] = field(default_factory=list)
    aborted: set[str] = field(default_factory=set)


def run_with_aborts(client: Client, wanted: Sequence[Request]) -> Outcome:
    """Sends all, 8 at a time; every third is given up midway, by turns in one of two ways."""
    outcome = Outcome()

    def one(index: int, request: Request) -> Generation:
        if index % 3:
            return client.generate(request.input_ids, request.max_new_tokens, rid=request.rid)
        outcome.aborted.add(request.rid)
        return give_up_midway(client, request, disconnect=index % 2 == 0)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        futures = [pool.submit(one, i, request) for i, request in enumerate(wanted)]
        outcome.generations = [future.result() for future in futures]
    return outcome


def give_up_midway(client: Client, request: Request, *, disconnect: bool) -> Generation:
    """Reads a third of the tokens, then hangs up or asks for the request to be aborted."""
    stream = client.stream(request.input_ids, request.max_new_tokens, rid=request.rid)
    last = next(stream)
    while last.finish_reason is None and len(last.output_ids) < request.max_new_tokens // 3:
        last = next(stream)
    if disconnect:
        stream.close()
        return last
    client.abort(request.rid)
    for event in stream:
        last = event
    return last


def orbitflow_states(server: Client) -> list[dict[str, Any]]:
    """OrbitFlow's section of each DP rank."""
    found = [state for state in server.orbitflow() if state is not None]
    assert len(found) == len(server.orbitflow())
    return found


def same_tables(server: Client) -> bool:
    """Whether all ranks have their pages in the same places, and had at every step since this
    was first asked."""
    body = {"server_args": {"orbitflow_tables": 1}}
    return all(server.post("/set_internal_state", body).json())


def use_policy(client: Client, name: str) -> None:
    """Switches the policy of a server started with ``TEST_CONTROL``."""
    set_internal_state(client, "orbitflow_policy", POLICIES.index(name))
    (state,) = client.orbitflow()
    assert state is not None and state["policy"] == name


def set_internal_state(client: Client, key: str, value: int) -> None:
    answer = client.post("/set_internal_state", {"server_args": {key: value}}).json()
    assert answer and all(answer), answer


def assert_identical_to_stock(server: Client, result: Comparison) -> None:
    """Some requests were given up: same tokens, KV on the host, nothing left."""
    assert not result.failures, result
    (state,) = server.orbitflow()
    assert state is not None and state["h2d"]["bytes"] > 0, "nothing was ever on the host"
    assert_nothing_is_left(server)


def assert_corruption_is_noticed(server: Client, stock: Stock, style: str) -> None:
    """The test of the test: one page changed on the host must show in the tokens.

    All requests run to their end, so whoever has that page reads it again.
    """
    use_policy(server, "all-host")
    set_internal_state(server, "orbitflow_corrupt", 8)
    wanted = workload(style)
    assert compare(stock.answers(style, wanted), server.generate_many(wanted, CONCURRENCY)).failures
    set_internal_state(server, "orbitflow_corrupt", 0)
    assert_nothing_is_left(server)


def compare_with_stock(
    server: Client, stock: Stock, style: str, policy: str | None = None
) -> Comparison:
    """The answers to the workload, under ``policy`` where one is given."""
    if policy is not None:
        use_policy(server, policy)
    wanted = workload(style)
    outcome = run_with_aborts(server, wanted)
    expected = stock.answers(style, wanted)
    return compare(expected, outcome.generations, cut_short=outcome.aborted)


def assert_nothing_is_left(client: Client) -> None:
    """The idle check has run and passed; after a flush arena, ring and host are wholly free.

    In every replica.
    """
    client.wait_idle()
    for state in client.orbitflow():
        assert state is not None
        assert state["idle_checks"] > 0
        assert state["failed_idle_checks"] == 0
        assert state["num_requests"] == 0
        if (control := state["control"]) is not None:
            # Who left: finished in a step under way, was aborted, or gave up its KV.
            assert control["pauses"] == control["resumes"] + control["left_paused"], control
    client.flush_cache()
    for state in client.orbitflow():
        assert state is not None
        for place in ("arena", "ring", "host"):
            assert state[place]["free"] == state[place]["pages"], (place, state)
