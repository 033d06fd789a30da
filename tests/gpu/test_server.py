"""Tokens of a server with OrbitFlow on a GPU, against stock SGLang on the same kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eval.client import Generation
from eval.identity import compare, first_drift, mixed_requests
from eval.live.contestants import EAGER
from eval.server import GPU_ENV, GPU_START_S, Server
from eval.tiny_model import TinyModel, build

MODEL = TinyModel("llama", layers=8, heads=8)
COMMON = ("--dtype", "bfloat16", "--skip-server-warmup", *EAGER)
WANTED = mixed_requests(32, seed=0, longest=900, max_new_tokens=48, shared_fraction=0.5)
POLICIES = ("resident", "static:1", "all-host", "random:1")
GRAPHS = (
    *("--cuda-graph-backend-decode", "breakable", "--cuda-graph-bs-decode", "1", "4", "8"),
    *("--decode-log-interval", "4"),
)


def server(*extra: str) -> Server:
    args = ["--model-path", str(build(MODEL)), *COMMON, *extra]
    return Server(args, base_env=GPU_ENV, start_timeout_s=GPU_START_S)


@pytest.fixture(scope="module")
def stock() -> Iterator[tuple[list[Generation], float]]:
    """What stock SGLang says, and how far its logprobs are off where batches are others.

    Rounding in 16 bits depends on who is in a batch, so stock against itself is the measure.
    """
    with server("--attention-backend", "flashinfer", "--max-total-tokens", "65536") as one:
        expected = one.generate_many(WANTED, 8)
        one.flush_cache()
        again = one.generate_many(WANTED, 1)
    yield expected, first_drift(expected, again)


@pytest.mark.parametrize("graphs", [(), GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_stock_sglang(
    policy: str, graphs: tuple[str, ...], stock: tuple[list[Generation], float]
) -> None:
    expected, drift = stock
    with server(
        "--enable-orbitflow", "--orbitflow-policy", policy, "--orbitflow-arena-tokens", "1024",
        "--orbitflow-host-memory-gb", "2", *graphs,
    ) as ours:  # fmt: skip
        answers = ours.generate_many(WANTED, 8)
        ours.wait_idle()
        (state,) = ours.orbitflow()
        log = ours.log.read_text(errors="replace")
    assert ("cuda graph: True" in log) is bool(graphs)
    # Two tokens change places when each is off by half their distance.
    result = compare(expected, answers, tolerance=max(1e-4, 4 * drift))
    assert result.tokens and not result.failures, result
    assert state is not None and state["idle_checks"] > 0 and state["failed_idle_checks"] == 0
    assert policy == "resident" or state["h2d"]["bytes"] > 0


def test_the_controller_serves_more_than_fits() -> None:
    with server("--enable-orbitflow", "--orbitflow-arena-tokens", "4096") as ours:
        answers = ours.generate_many(WANTED, 32)
        ours.wait_idle()
        (state,) = ours.orbitflow()
    assert all(answer.finish_reason == "length" for answer in answers)
    assert state is not None and state["failed_idle_checks"] == 0
    assert state["profile"]["prefill_tokens_per_s"] > 0
