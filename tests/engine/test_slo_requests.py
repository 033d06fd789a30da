"""SLO parameters of requests, paced delivery and the report of it, on one real server.

Nothing here bounds a duration from above. Pacing is seen from below: a token may leave only
so long after the first one, which itself left after the request was sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from servers import assert_nothing_is_left, orbitflow_args, run_python

from eval.client import Generation, metric_sum
from eval.server import Server

TPOT_MS = 300  # some thirty times what a step takes, so that the server gets ahead
RELEASE_S = 0.95 * TPOT_MS / 1e3
PROMPT = list(range(1, 40))
PACED = {"orbitflow": {"deposit": True}}
UNPACED: dict[str, Any] = {"orbitflow": {"deposit": False}}
BAD: dict[str, tuple[Any, str]] = {
    "unknown key": ({"tpot_ms": 50}, "custom_params.orbitflow.tpot_ms: no such key"),
    "text": ({"ttft_slo_ms": "800"}, "custom_params.orbitflow.ttft_slo_ms must be a number"),
    "bool": ({"tpot_slo_ms": True}, "custom_params.orbitflow.tpot_slo_ms must be a number"),
    "zero": ({"tbt_slo_ms": 0}, "custom_params.orbitflow.tbt_slo_ms must be a number"),
    "negative": ({"tpot_slo_ms": -1.5}, "custom_params.orbitflow.tpot_slo_ms must be a number"),
    "deposit": ({"deposit": 1}, "custom_params.orbitflow.deposit must be true or false"),
    "no object": ([50], "custom_params.orbitflow must be an object"),
}
MESSAGES = [{"role": "user", "content": "def f(x):"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ("--orbitflow-policy", "resident", "--orbitflow-arena-tokens", "8192")
    with Server(orbitflow_args("llama", *flags, "--orbitflow-tpot-slo-ms", str(TPOT_MS))) as server:
        yield server


def bodies(params: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """A request with these ``custom_params`` in every form that takes them."""
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    ours = sampling | {"custom_params": params}
    openai = {"model": "m", "max_tokens": 4, "temperature": 0, "custom_params": params}
    batch = {"input_ids": [PROMPT, PROMPT[:9]]}
    return {
        "one": ("/generate", {"input_ids": PROMPT, "sampling_params": ours}),
        "batch, shared": ("/generate", batch | {"sampling_params": ours}),
        "batch, second": ("/generate", batch | {"sampling_params": [sampling, ours]}),
        "completion": ("/v1/completions", openai | {"prompt": "def f(x):"}),
        "completions": ("/v1/completions", openai | {"prompt": ["def f(x):", "import"]}),
        "chat": ("/v1/chat/completions", openai | {"messages": MESSAGES}),
    }


FORMS = tuple(bodies({}))


def post(server: Server, form: str, params: dict[str, Any], stream: bool) -> requests.Response:
    path, body = bodies(params)[form]
    return requests.post(server.url + path, json=body | {"stream": stream}, timeout=600)


# --- what is refused, and what is not -----------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_bad_parameters_are_refused_with_400_and_the_field(
    server: Server, form: str, stream: bool
) -> None:
    for params, message in BAD.values():
        answer = post(server, form, {"orbitflow": params}, stream)
        assert answer.status_code == 400, answer.text
        assert answer.headers["content-type"].startswith("application/json")
        assert message in answer.text
        if form == "batch, second":
            assert f"sampling_params[1]: {message}" in answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(server: Server, number: str) -> None:
    for path, body in bodies({"orbitflow": {"tpot_slo_ms": "NUMBER"}}).values():
        text = json.dumps(body).replace('"NUMBER"', number)
        answer = requests.post(
            server.url + path, text, headers={"content-type": "application/json"}, timeout=60
        )
        assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_good_parameters_are_served(server: Server, form: str, stream: bool) -> None:
    own = {"ttft_slo_ms": 800, "tpot_slo_ms": 50.5, "tbt_slo_ms": 200, "deposit": True}
    for params in ({"orbitflow": own}, {"orbitflow": {}}, {}):
        answer = post(server, form, params, stream)
        assert answer.status_code == 200, answer.text
        assert '"error"' not in answer.text


# Runs without a server: what a Python engine calls first, and what crosses the processes.
WITHOUT_A_SERVER = """
import pickle
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.observability.req_time_stats import (
    APIServerReqTimeStats, DPControllerReqTimeStats, SchedulerReqTimeStats,
)
from sglang.srt.plugins.hook_registry import HookRegistry
from orbitflow_sglang.engine import hooks

hooks.register((*hooks.LAUNCHER, *hooks.CONTROLLER))
HookRegistry.apply_hooks()
hooks.verify(hooks.LAUNCHER)
bad = {"custom_params": {"orbitflow": {"tpot_slo_ms": 0}}}
for params in (bad, [{}, bad]):
    try:
        GenerateReqInput(text=["a", "b"], sampling_params=params).normalize_batch_and_arguments()
    except ValueError as error:
        print("REFUSED", error)
for metrics in (False, True):
    stats = SchedulerReqTimeStats(enable_metrics=metrics)
    assert not hasattr(pickle.loads(pickle.dumps(stats)), "orbitflow")
    stats.orbitflow = {"pauses": 3}
    assert pickle.loads(pickle.dumps(stats)).orbitflow == {"pauses": 3}
print("CROSSED")
at_the_door = APIServerReqTimeStats(created_time=123.5)
with_replicas = DPControllerReqTimeStats.new_from_obj(pickle.loads(pickle.dumps(at_the_door)))
for stats in (at_the_door, with_replicas):
    seen = SchedulerReqTimeStats.new_from_obj(pickle.loads(pickle.dumps(stats)))
    assert abs(seen.created_time - 123.5) < 1e-2, seen.created_time  # clocks of two processes
print("ARRIVED")
"""


def test_an_engine_refuses_and_our_parts_cross_processes() -> None:
    run = run_python("-c", WITHOUT_A_SERVER)
    assert run.returncode == 0, run.stderr[-2000:]
    field = "custom_params.orbitflow.tpot_slo_ms"
    message = f"{field} must be a number of milliseconds from 0.001 to 1e+09, got 0"
    refused = [line for line in run.stdout.splitlines() if line.startswith("REFUSED")]
    assert refused == [f"REFUSED {message}", f"REFUSED sampling_params[1]: {message}"]
    assert "CROSSED" in run.stdout and "ARRIVED" in run.stdout


# --- the report ---------------------------------------------------------------


def test_the_last_chunk_and_only_that_reports_the_delivery(server: Server) -> None:
    params = {"orbitflow": {"ttft_slo_ms": 5e5, "tbt_slo_ms": 1e-3}}
    events = list(server.stream(PROMPT, 8, custom_params=params))
    assert ["orbitflow" in event.meta for event in events] == [False] * (len(events) - 1) + [True]
    report = events[-1].meta["orbitflow"]
    assert set(report) == {"slo", "generated", "delivered", "pauses", "deposit_tokens"}
    assert report["slo"] == {
        "ttft_s": 500.0, "tpot_s": TPOT_MS / 1e3, "tbt_s": 1e-6, "assumed": False
    }  # fmt: skip
    for view in (report["generated"], report["delivered"]):
        assert set(view) == {"ttft_s", "tpot_s", "max_tbt_s", "violations"}
        assert view["ttft_s"] > 0
        assert 0 < view["tpot_s"] <= view["max_tbt_s"]
        assert view["violations"] >= 1  # no gap is that short
    assert report["delivered"]["ttft_s"] >= report["generated"]["ttft_s"]


def test_an_answer_that_does_not_stream_reports_too(server: Server) -> None:
    report = server.generate(PROMPT, 8).meta["orbitflow"]
    assert set(report) == {"slo", "generated", "delivered", "pauses", "deposit_tokens"}
    assert report["slo"]["tpot_s"] == TPOT_MS / 1e3
    assert report["delivered"] == report["generated"]


def test_finished_streams_are_counted_by_the_targets_they_met(server: Server) -> None:
    def counts() -> list[float]:
        names = ("requests", "ttft_met", "tpot_met", "tbt_met", "good", "strict")
        series = server.metrics()
        return [
            metric_sum(series, f"sglang:orbitflow_slo_{name}_total", kind="delivered")
            for name in names
        ]

    easy = {"ttft_slo_ms": 5e5, "tpot_slo_ms": 5e5, "tbt_slo_ms": 5e5}
    list(server.stream(PROMPT, 8, custom_params={"orbitflow": easy}))
    before = counts()
    list(server.stream(PROMPT, 8, custom_params={"orbitflow": easy}))
    after = counts()
    assert [new - old for old, new in zip(before, after, strict=True)][:5] == [1, 1, 1, 1, 1]
    list(server.stream(PROMPT, 8, custom_params={"orbitflow": easy | {"ttft_slo_ms": 1e-3}}))
    missed = [new - old for old, new in zip(after, counts(), strict=True)]
    assert missed == [1, 0, 1, 1, 0, 0]


# --- paced delivery -----------------------------------------------------------


def paced_events(server: Server, tokens: int) -> list[tuple[float, Generation]]:
    """Seconds since the request was sent, and what had come by then."""
    sent_s = time.monotonic()
    stream = server.stream(PROMPT, tokens, custom_params=PACED)
    return [(time.monotonic() - sent_s, event) for event in stream]


def assert_prefixes(lengths: list[int], whole: Any, parts: list[Any]) -> None:
    assert all(part == whole[:length] for length, part in zip(lengths, parts, strict=True))


def test_a_paced_stream_holds_tokens_back_and_ends_with_the_same_answer(server: Server) -> None:
    unpaced = list(server.stream(PROMPT, 200, custom_params=UNPACED))[-1]
    events = paced_events(server, 200)
    got = [event for _, event in events]
    lengths = [len(event.output_ids) for event in got]
    assert lengths == sorted(set(lengths))  # strictly increasing
    assert (got[-1].output_ids, got[-1].text) == (unpaced.output_ids, unpaced.text)
    assert_prefixes(lengths, got[-1].output_ids, [event.output_ids for event in got])
    assert_prefixes(lengths, got[-1].logprobs, [event.logprobs for event in got])
    assert_prefixes([len(event.text) for event in got], got[-1].text, [event.text for event in got])
    # An event may hold several tokens that left the scheduler together: its first is due.
    for before, (at_s, _) in zip([0, *lengths], events[:-1], strict=False):
        assert at_s >= before * RELEASE_S
    # The scheduler was done while most tokens were still held, and then all left.
    assert lengths[-1] - lengths[-2] > 1
    assert got[-1].meta["orbitflow"]["deposit_tokens"] > 1


def test_each_request_of_a_paced_batch_has_its_own_pace(server: Server) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
    body = {
        "input_ids": [PROMPT, PROMPT[:20]],
        "stream": True,
        "sampling_params": [sampling | {"custom_params": params} for params in (PACED, UNPACED)],
    }
    lengths: dict[int, list[int]] = {0: [], 1: []}
    last: dict[int, Any] = {}
    sent_s = time.monotonic()
    for event in sse(server, "/generate", body):
        ids = event["output_ids"]
        before = last.get(event["index"], {"output_ids": []})["output_ids"]
        assert ids[: len(before)] == before
        lengths[event["index"]].append(len(ids))
        last[event["index"]] = event
        if event["index"] == 0 and event["meta_info"]["finish_reason"] is None:
            assert time.monotonic() - sent_s >= len(before) * RELEASE_S
    assert [len(last[index]["output_ids"]) for index in (0, 1)] == [150, 150]
    assert all("orbitflow" in event["meta_info"] for event in last.values())
    assert len(lengths[0]) < len(lengths[1])


def sse(server: Server, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with server.post(path, body, stream=True) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_paced_openai_streams_come_to_the_same_text(server: Server, form: str) -> None:
    path, body = bodies(PACED)[form]
    body |= {"max_tokens": 120, "ignore_eos": True, "stream": True}

    def text(body: dict[str, Any]) -> tuple[str, int]:
        parts = []
        for event in sse(server, path, body):
            for choice in event["choices"]:
                parts.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        return "".join(parts), len(parts)

    paced, few = text(body)
    unpaced, many = text(body | {"custom_params": UNPACED})
    assert paced == unpaced
    assert paced
    assert few < many


def test_a_client_that_hangs_up_on_a_paced_stream_leaves_nothing(server: Server) -> None:
    # What comes before is not ours: SGLang's warm-up logs a traceback when it is quicker
    # than its own web server.
    before = len(server.log.read_text())
    streams = [server.stream(PROMPT, 4000, custom_params=PACED) for _ in range(3)]
    for stream in streams:
        next(stream)
        stream.close()
    assert_nothing_is_left(server)
    assert "Traceback" not in server.log.read_text()[before:]


def test_an_abort_ends_a_paced_stream_with_what_was_generated(server: Server) -> None:
    stream = server.stream(PROMPT, 4000, rid="to-abort", custom_params=PACED)
    first = next(stream)
    server.abort("to-abort")
    last = list(stream)[-1]
    assert last.finish_reason == "abort"
    assert last.output_ids[: len(first.output_ids)] == first.output_ids
    assert "orbitflow" in last.meta
    assert_nothing_is_left(server)
