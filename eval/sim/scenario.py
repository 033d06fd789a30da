"""One run by its parameters: workload, load, SLOs, machine, policy, seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from eval.sim import hardware, policies, result
from eval.sim.engine import Setup, Simulation
from eval.workload import mixes, trace_file
from eval.workload.overflow import LEVELS, arena_for
from eval.workload.requests import TraceRequest, at_once, at_rate, with_slo
from orbitflow_sglang.slo import SLO

PREFILL_FACTOR = 5.0  # TTFT target: so many unloaded prefills, where that is longer
DRAINS_KEPT = 64


@dataclass(frozen=True)
class Scenario:
    """What a run depends on, and nothing else: equal scenarios have equal results.

    Either ``trace`` or ``mix`` says who comes. ``load`` (a multiple of what SGLang alone drains),
    ``rate`` (requests a second) or ``speed`` (a divisor of arrival times) says when; with none,
    as the trace has it.
    """

    profile: str
    policy: str
    seed: int = 0
    trace: str | None = None
    mix: str | None = None
    arrivals: str = "lognormal:4"
    requests: int | None = None  # the first so many; of a mix: 200
    skip: int = 0  # rows of the trace before these
    load: float | None = None
    rate: float | None = None
    speed: float | None = None
    slo_scale: float = 2.0  # TPOT target, in decode steps of a full arena
    ttft_slo_s: float | None = None  # None: of the profile
    paced: bool = False
    known_lengths: bool = False
    mixed: bool = False
    arena_gb: float | None = None
    overflow: str | None = None  # the arena in which the trace has that level: vl, lo, ... hi
    link_gb_per_s: float | None = None
    max_running: int | None = None
    oversize: bool = False  # also those larger than the arena, as far as the host holds them
    planner_latency_s: float | None = 0.005
    link_jitter: float = 0.0
    cold: bool = False
    ring_counted: bool = True

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be run."""
        hardware.find(self.profile)
        policies.find(self.policy)
        if (self.trace is None) == (self.mix is None):
            raise ValueError("give either a trace or a mix")
        if self.mix is not None:
            mixes.find(self.mix)
        if self.overflow is not None:
            if self.overflow not in LEVELS:
                raise ValueError(f"unknown overflow {self.overflow!r}: use {', '.join(LEVELS)}")
            if self.arena_gb is not None or self.load is not None:
                raise ValueError("an overflow level sets the arena, and needs a rate, not a load")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @property
    def machine(self) -> hardware.Hardware:
        """The profile, resized as asked."""
        found = hardware.find(self.profile)
        changes: dict[str, Any] = {}
        if self.arena_gb is not None:
            changes["arena_gb"] = self.arena_gb
        if self.link_gb_per_s is not None:
            changes |= {"h2d_gb_per_s": self.link_gb_per_s, "d2h_gb_per_s": self.link_gb_per_s}
        if self.max_running is not None:
            changes["max_running"] = self.max_running
        return found.resized(**changes) if changes else found

    @property
    def setup(self) -> Setup:
        """What is the same whatever the policy."""
        return Setup(
            hardware=self.machine,
            known_lengths=self.known_lengths,
            mixed=self.mixed,
            planner_latency_s=self.planner_latency_s,
            link_jitter=self.link_jitter,
            cold=self.cold,
            ring_counted=self.ring_counted,
        )


@dataclass(frozen=True)
class Run:
    """A finished run."""

    scenario: Scenario
    simulation: Simulation
    dropped: int  # rows of the trace that this machine could not hold
    load_1_requests_per_s: float | None

    def as_dict(self) -> dict[str, Any]:
        """Metrics and rows as JSON values; the same for the same scenario, byte for byte."""
        return {
            "scenario": self.scenario.as_dict(),
            "load_1_requests_per_s": result.rounded(self.load_1_requests_per_s),
            "dropped_rows": self.dropped,
            "metrics": result.summary(self.simulation),
            "rows": result.rows(self.simulation),
        }


def run(scenario: Scenario, load_1: float | None = None) -> Run:
    """Simulate ``scenario`` and check its books. Raises ``ValueError`` for a bad one.

    ``load_1``: where ``drained(unloaded(scenario))`` is known already.
    """
    scenario.check()
    asked, scenario = scenario, _sized(scenario)
    if load_1 is None and scenario.load is not None:
        load_1 = drained(unloaded(scenario))
    simulation = simulation_of(scenario, load_1)
    simulation.run()
    result.check(simulation)
    return Run(asked, simulation, _requests(scenario)[1], load_1)


def simulation_of(
    scenario: Scenario, load_1: float | None = None, kind: type[Simulation] = Simulation
) -> Simulation:
    """``scenario`` before its first step. Raises ``ValueError`` for a bad one."""
    scenario.check()
    trace = _timed(scenario, load_1)
    return kind(scenario.setup, scenario.policy, _promised(scenario, trace), scenario.seed)


def _timed(scenario: Scenario, load_1: float | None = None) -> list[TraceRequest]:
    """Who comes, and when."""
    trace, _ = _requests(scenario)
    if scenario.load is not None:
        return at_rate(trace, scenario.load * (load_1 or drained(unloaded(scenario))))
    if scenario.rate is not None:
        return at_rate(trace, scenario.rate)
    speed = scenario.speed or 1.0
    return [replace(one, arrival_s=one.arrival_s / speed) for one in trace]


def _sized(scenario: Scenario) -> Scenario:
    """With the arena that its overflow level asks for."""
    if scenario.overflow is None:
        return scenario
    whole = replace(scenario, overflow=None, oversize=True)
    trace, machine = _timed(whole), whole.machine
    mean = sum(one.input_tokens + one.output_tokens / 2 for one in trace) / max(1, len(trace))
    tokens = arena_for(trace, machine.resident_step_s(mean), LEVELS[scenario.overflow])
    return replace(whole, arena_gb=tokens * machine.kv_bytes_per_token / hardware.GB)


def _requests(scenario: Scenario) -> tuple[list[TraceRequest], int]:
    """Who comes, and how many rows are too large for this machine."""
    if scenario.mix is not None:
        mix = mixes.find(scenario.mix)
        drawn = mixes.draw(mix, scenario.requests or 200, scenario.arrivals, scenario.seed)
    else:
        rows = trace_file.load(scenario.trace or "")[scenario.skip :]
        drawn = rows[: scenario.requests]
    machine = scenario.machine
    most = machine.arena_tokens * 9 // 10
    if scenario.oversize:
        most += machine.host_pages // machine.layers * machine.page_size
    return trace_file.fitting(drawn, most)


def _promised(scenario: Scenario, trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """The trace with the targets of each request."""
    machine = scenario.machine
    mean = sum(one.input_tokens + one.output_tokens / 2 for one in trace) / max(1, len(trace))
    tpot = scenario.slo_scale * machine.resident_step_s(mean)
    floor = machine.ttft_slo_s if scenario.ttft_slo_s is None else scenario.ttft_slo_s

    def targets(input_tokens: int) -> SLO:
        ttft = max(floor, PREFILL_FACTOR * machine.prefill_s(input_tokens))
        return SLO(ttft, tpot, deposit=scenario.paced)

    return with_slo(trace, targets)


@lru_cache(DRAINS_KEPT)
def drained(scenario: Scenario) -> float:
    """Load 1: requests a second at which SGLang's own admission, told the output lengths, drains
    the whole trace offered at time 0."""
    trace, _ = _requests(scenario)
    simulation = Simulation(scenario.setup, scenario.policy, at_once(trace))
    simulation.run()
    return len(trace) / simulation.now


def unloaded(scenario: Scenario) -> Scenario:
    """What load 1 depends on: workload and machine, not policy, load or SLOs."""
    return Scenario(
        profile=scenario.profile,
        policy="retract",
        seed=scenario.seed,
        trace=scenario.trace,
        mix=scenario.mix,
        arrivals=scenario.arrivals,
        requests=scenario.requests,
        skip=scenario.skip,
        arena_gb=scenario.arena_gb,
        link_gb_per_s=scenario.link_gb_per_s,
        max_running=scenario.max_running,
        oversize=scenario.oversize,
        known_lengths=True,
    )
