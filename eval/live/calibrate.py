"""Measures what loads and SLOs are multiples of, on one server of the policy ``queue``.

t is a decode step of a batch that fills the arena, prefill an unloaded prompt, and load 1
the rate at which the whole trace, offered at time 0, is drained.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.bench.measure import Batch, random_prompts
from eval.client import Client
from eval.live.contestants import Setup, server
from eval.live.machine import OthersLoad
from eval.live.replay import replay
from eval.live.workload import Mix, prompts
from eval.workload.requests import Targets, TraceRequest, at_once

TTFT_FLOOR_S = 3.0
TPOT_FACTOR = 2.0  # of an all-resident step
FILL = 0.9  # of the arena in the batch that is timed
REPETITIONS = 3
DECODE_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """All that was measured, in seconds, tokens and requests."""

    contestant: str
    step_s: float  # t
    step_requests: int  # in the batch that filled the arena
    prefill_s: float  # of a prompt of no tokens
    prefill_s_per_token: float
    load_1_requests_per_s: float
    drain_s: float
    drain_errors: int
    others_cores: float  # what others took of the machine meanwhile

    def targets(self, ttft_s: float | None = None, tpot_s: float | None = None) -> Targets:
        """The SLOs; what is given wins over what was measured."""
        return Targets(
            ttft_s=ttft_s or TTFT_FLOOR_S,
            tpot_s=tpot_s or TPOT_FACTOR * self.step_s,
            prefill_factor=0.0 if ttft_s else Targets.prefill_factor,
            prefill_s=self.prefill_s,
            prefill_s_per_token=self.prefill_s_per_token,
        )

    def numbers(self, setup: Setup, mix: Mix) -> dict[str, float]:
        """What decides who can help: t, s and mu, with an emulated link also h and rho, as the
        papers' models have them."""
        context = mix.mean_input + mix.mean_output / 2
        at_limit = setup.arena_tokens / context
        prefill = self.prefill_s + self.prefill_s_per_token * mix.mean_input
        hidden = {}
        if setup.link_gb_per_s is not None:
            h = setup.link_gb_per_s * 1e9 * self.step_s
            hidden = {"h_bytes": h, "rho": h / setup.arena_bytes}
        return {
            "t_s": self.step_s,
            **hidden,
            "s": self.targets().tpot_s / self.step_s,
            "mu": mix.mean_output * self.step_s / (prefill * at_limit),
            "requests_at_the_limit": at_limit,
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    contestant: str, setup: Setup, mix: Mix, trace: list[TraceRequest], seed: int
) -> Calibration:
    """Starts a server and measures; takes about as long as a run at load 1."""
    with server(contestant, setup) as running:
        warm_up(running, setup)
        others = OthersLoad()
        requests, step_s = _step(running, setup, mix)
        base_s, per_token_s = _prefill(running, mix)
        began = time.perf_counter()
        answers = replay(running.url, at_once(trace), prompts(trace, seed))
        drain_s = time.perf_counter() - began
        others_cores = others.cores()
    return Calibration(
        contestant=contestant,
        step_s=step_s,
        step_requests=requests,
        prefill_s=base_s,
        prefill_s_per_token=per_token_s,
        load_1_requests_per_s=len(trace) / drain_s,
        drain_s=drain_s,
        drain_errors=sum(one.error is not None for one in answers),
        others_cores=others_cores,
    )


def warm_up(client: Client, setup: Setup) -> None:
    """Prefill and decode of more than the arena holds; nothing of it stays cached."""
    requests = 6
    tokens = setup.arena_tokens // (requests - 1)
    trace = [TraceRequest(0.0, tokens, 48, f"warm-up-{i}") for i in range(requests)]
    failed = [one.error for one in replay(client.url, trace, prompts(trace, seed=-1)) if one.error]
    if failed:
        raise RuntimeError(f"the warm-up failed: {failed[0]}")
    client.flush_cache()


def _step(client: Client, setup: Setup, mix: Mix) -> tuple[int, float]:
    """Requests of mean size that fill the arena, and the median of their decode step."""
    context = mix.mean_input + mix.mean_output / 2
    room = FILL * setup.arena_tokens
    requests = max(1, round(room / context))
    prompt = max(1, round(room / requests) - DECODE_TOKENS)
    batch = Batch(requests, prompt, DECODE_TOKENS, stream_interval=1)  # as the replay streams
    steps = [batch.measure(client, seed).step_s for seed in range(REPETITIONS)]
    return requests, statistics.median(steps)


def _prefill(client: Client, mix: Mix) -> tuple[float, float]:
    """Seconds of a prompt: a constant and per token, the line through three lengths."""
    lengths = mix.short_input[0], mix.short_input[1], mix.long_input[1]
    medians = [
        statistics.median(_prefill_once(client, tokens, seed) for seed in range(REPETITIONS))
        for tokens in lengths
    ]
    slope, base = np.polyfit(lengths, medians, 1)
    return max(0.0, float(base)), max(0.0, float(slope))


def _prefill_once(client: Client, tokens: int, seed: int) -> float:
    (prompt,) = random_prompts(1, tokens, seed=10_000 + 100 * tokens + seed)
    began = time.perf_counter()
    client.generate(prompt, 1, logprobs=False)
    return time.perf_counter() - began
