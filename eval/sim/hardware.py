"""What steps and transfers take on a machine: data in ``profiles.json``, formulas here.

    roofline   max(weights / HBM, FLOPs) + KV read / HBM + attention of the prompt + overhead
    linear     constant + per context token (+ per request) + per prompt token and pair

A page that crosses the link is written to HBM and then read: with a roofline it costs HBM
twice, and the second time is in the KV that the step reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from orbitflow_sglang.planner.cost_model import (
    ComputeModel,
    DecodeSample,
    Profile,
    TransferModel,
    fit_compute,
)

PROFILES = Path(__file__).with_name("profiles.json")
GB = 1e9
SAMPLED_BATCHES = (1, 2, 4, 8, 16)  # of the steps that the controller's profile is fitted to
SAMPLED_FILLS = (0.25, 0.5, 1.0)  # of the arena


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens of one request in one step, behind ``context_tokens`` others."""

    tokens: int
    context_tokens: int

    @property
    def pairs(self) -> float:
        """Of a token and one that it attends to."""
        return self.tokens * (self.context_tokens + (self.tokens + 1) / 2)


@dataclass(slots=True)
class Work:
    """What one step computes and moves."""

    batch: int  # requests that decode
    context_tokens: int  # of these
    prompt_tokens: int
    pairs: float
    read_bytes: float  # KV
    staged_bytes: float  # that crossed the link
    link_s: float  # for which the link was busy


@dataclass(frozen=True)
class Roofline:
    """A step bound by HBM or by arithmetic. GB: 10^9 bytes; FLOPs count multiply and add."""

    weights_gb: float
    hbm_gb_per_s: float  # as reached
    tflops: float  # as reached
    gflop_per_token: float
    kflop_per_token_pair: float
    overhead_s: float

    def step_s(self, work: Work) -> float:
        """Compute of a step, seconds."""
        weights = self.weights_gb / self.hbm_gb_per_s
        tokens = work.batch + work.prompt_tokens
        arithmetic = tokens * self.gflop_per_token / (self.tflops * 1e3)
        attention = work.pairs * self.kflop_per_token_pair / (self.tflops * GB)
        kv = (work.read_bytes + work.staged_bytes) / (self.hbm_gb_per_s * GB)
        return max(weights, arithmetic) + attention + kv + self.overhead_s


@dataclass(frozen=True)
class Linear:
    """A fit to measured steps. Seconds."""

    constant_s: float
    per_token_s: float  # of context
    prefill_per_token_s: float
    prefill_per_pair_s: float = 0.0
    per_request_s: float = 0.0
    prefill_constant_s: float = 0.0
    copy_slowdown: float = 0.0  # share that a step takes longer with the link busy throughout
    tiered_s: float = 0.0  # of a step for which pages crossed the link

    def step_s(self, work: Work) -> float:
        """Compute of a step, seconds."""
        bare = 0.0
        if work.batch:
            bare += self.constant_s + self.per_request_s * work.batch
            bare += self.per_token_s * work.context_tokens
        elif work.prompt_tokens:
            bare += self.prefill_constant_s
        bare += self.prefill_per_token_s * work.prompt_tokens
        bare += self.prefill_per_pair_s * work.pairs
        if not work.staged_bytes or not bare:
            return bare
        return bare * (1 + self.copy_slowdown * min(1.0, work.link_s / bare)) + self.tiered_s


@dataclass(frozen=True)
class Hardware:
    """One model on one machine; all its GPUs together."""

    name: str
    about: str
    source: str
    measured: bool  # whether its costs were measured, not derived from datasheets
    layers: int
    page_size: int
    kv_bytes_per_token: int  # of all layers
    arena_gb: float
    host_gb: float
    h2d_gb_per_s: float
    d2h_gb_per_s: float
    chunk_tokens: int  # most prompt tokens of a step
    max_running: int
    ttft_slo_s: float  # least target of the evaluation
    costs: Roofline | Linear

    @property
    def page_bytes(self) -> float:
        """K and V of one page of one layer."""
        return self.kv_bytes_per_token * self.page_size / self.layers

    @property
    def arena_pages(self) -> int:
        """Pages of one layer that the device holds: the same number for every layer."""
        return int(self.arena_gb * GB / self.kv_bytes_per_token) // self.page_size * self.layers

    @property
    def arena_tokens(self) -> int:
        """Tokens that the device holds in every layer."""
        return self.arena_pages // self.layers * self.page_size

    @property
    def host_pages(self) -> int:
        """Pages of one layer that the host holds."""
        return int(self.host_gb * GB / self.page_bytes)

    @cached_property
    def h2d_page_s(self) -> float:
        """Time on the link of one page of one layer, seconds."""
        return self.page_bytes / (self.h2d_gb_per_s * GB)

    @cached_property
    def d2h_page_s(self) -> float:
        """The same to the host."""
        return self.page_bytes / (self.d2h_gb_per_s * GB)

    def step_s(
        self,
        batch: int,
        context_tokens: int,
        chunks: tuple[Chunk, ...] = (),
        moved_pages: int = 0,
    ) -> float:
        """Compute of a step, seconds: ``batch`` requests decode, prompts go on by ``chunks``,
        and ``moved_pages`` cross the link meanwhile. Waiting for pages comes on top."""
        read = context_tokens + sum(chunk.context_tokens for chunk in chunks)
        return self.costs.step_s(
            Work(
                batch=batch,
                context_tokens=context_tokens,
                prompt_tokens=sum(chunk.tokens for chunk in chunks),
                pairs=sum(chunk.pairs for chunk in chunks),
                read_bytes=read * self.kv_bytes_per_token,
                staged_bytes=moved_pages * self.page_bytes,
                link_s=moved_pages * self.h2d_page_s,
            )
        )

    def prefill_s(self, tokens: int) -> float:
        """An unloaded prefill of a prompt in chunks, seconds."""
        total, done = 0.0, 0
        while done < tokens:
            chunk = Chunk(min(self.chunk_tokens, tokens - done), done)
            total += self.step_s(0, 0, (chunk,))
            done += chunk.tokens
        return total

    def resident_step_s(self, mean_tokens: float) -> float:
        """A decode step of a batch of requests of that size that fills the arena, seconds."""
        batch = max(1, min(self.max_running, int(self.arena_tokens / mean_tokens)))
        return self.step_s(batch, min(self.arena_tokens, int(batch * mean_tokens)))

    @cached_property
    def profile(self) -> Profile:
        """What calibration would find: the cost profile that the controller begins with."""
        samples = []
        for fill in SAMPLED_FILLS:
            for batch in SAMPLED_BATCHES:
                tokens = int(fill * self.arena_tokens)
                samples.append(DecodeSample(batch, tokens, self.step_s(batch, tokens)))
        compute: ComputeModel = fit_compute(samples, self.layers)
        tokens = min(self.chunk_tokens, self.arena_tokens)
        return Profile(
            model=self.name,
            device="simulated",
            page_bytes=int(self.page_bytes),
            compute=compute,
            h2d=TransferModel(0.0, self.h2d_page_s, 1.0),
            d2h=TransferModel(0.0, self.d2h_page_s, 1.0),
            prefill_tokens_per_s=tokens / self.step_s(0, 0, (Chunk(tokens, 0),)),
        )

    def resized(self, **changes: Any) -> Hardware:
        """The same machine with other sizes or rates."""
        return replace(self, **changes)


def names() -> tuple[str, ...]:
    """The profiles that there are."""
    return tuple(_table())


def find(name: str) -> Hardware:
    """The profile of that name. Raises ``ValueError`` that says which there are."""
    if name not in _table():
        raise ValueError(f"unknown profile {name!r}: there are {', '.join(names())}")
    return parse(name, _table()[name])


def parse(name: str, values: Mapping[str, Any]) -> Hardware:
    """A profile from its JSON object. Raises ``ValueError`` that names the key."""
    given = dict(values)
    kinds: dict[str, type[Roofline] | type[Linear]] = {"roofline": Roofline, "linear": Linear}
    found = [kind for kind in kinds if kind in given]
    if len(found) != 1:
        raise ValueError(f"{name}: needs exactly one of {', '.join(kinds)}")
    costs = _build(kinds[found[0]], given.pop(found[0]), f"{name}.{found[0]}")
    hardware: Hardware = _build(Hardware, given | {"name": name, "costs": costs}, name)
    return hardware


def _build(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: no such key: {', '.join(unknown)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


@cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(PROFILES.read_text(encoding="utf-8"))
    return table
