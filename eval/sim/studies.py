"""What is compared: every run of the evaluation, by study.

A method is a policy and what its clients ask for:

    POLICY[@paced][~lengths]     ~lengths: it is told how long each answer will be

Rules were tuned with ``TUNING_SEEDS``; what is reported has others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from eval.sim.scenario import Scenario
from orbitflow_sglang.control.policies import RULES

TUNING_SEEDS = (1, 2, 3)
SEEDS = tuple(range(101, 111))
FEW_SEEDS = SEEDS[:4]
MORE_SEEDS = tuple(range(111, 136))
PACED, LENGTHS = "@paced", "~lengths"

OURS = ("orbitflow@paced", "orbitflow")
USERS = (  # what somebody would really do
    *("queue", "retract", "retract+order", "swap", "swap+order"),
    *("time-sliced-swap@paced", "time-sliced-swap"),
    *("queue~lengths", "retract~lengths", "queue+order~lengths"),
)
PAPERS = (
    *("next-layer", "static:1", "static:2", "static:4", "static:8", "flexgen", "select-n"),
    *("distn-single", "paper-uniform", "paper"),
)
REQUEST_WISE = "paper-request-wise"
PAPER_RATE = 0.0162  # its 0.97 requests a minute
PAPER_STEP_RATE = 0.0056  # 2.93e-4 requests a step (method notes, k), of 52 ms
MAIN = (*OURS, *USERS, "static:8", "flexgen", "paper")
SHORT_OF_MEMORY = {  # mixes whose requests are large enough for memory to be the bottleneck
    "a5000-8b": "MIX",
    "a6000-8b": "MIX*4",
    "a6000x4-70b": "MIX*2",
    "h200-8b": "MIX*8",
    "h200-8b-cap8": "MIX",
    "gh200-8b-cap8": "MIX",
}


def method(scenario: Scenario, name: str) -> Scenario:
    """``scenario`` under the method ``name``."""
    policy = name.removesuffix(LENGTHS)
    return replace(
        scenario,
        policy=policy.removesuffix(PACED),
        paced=policy.endswith(PACED),
        known_lengths=name.endswith(LENGTHS),
    )


def method_name(scenario: Scenario) -> str:
    """The inverse of ``method``."""
    return scenario.policy + PACED * scenario.paced + LENGTHS * scenario.known_lengths


def _each(
    base: Scenario, methods: Sequence[str], loads: Sequence[float], seeds: Sequence[int]
) -> Iterator[Scenario]:
    for seed, load, name in product(seeds, loads, methods):
        yield method(replace(base, seed=seed, load=load), name)


def mixes() -> Iterator[Scenario]:
    """Mixes and loads on the card where streaming has most to gain."""
    for mix in ("MIX", "SL", "LS", "LL"):
        base = Scenario("a5000-8b", "", mix=mix)
        yield from _each(base, MAIN, (0.9, 1.2, 2.0), SEEDS)
    yield from _each(Scenario("a5000-8b", "", mix="MIX", arrivals="poisson"), MAIN, (0.9,), SEEDS)


def close() -> Iterator[Scenario]:
    """Where ten seeds do not tell ours from swap in turns: more of them."""
    methods = (*OURS, "time-sliced-swap@paced", "time-sliced-swap")
    for mix in ("MIX", "LS"):
        yield from _each(Scenario("a5000-8b", "", mix=mix), methods, (0.9, 1.2, 2.0), MORE_SEEDS)


def machines() -> Iterator[Scenario]:
    """Other machines, with requests large enough to be short of memory, and an SLO less lax."""
    for profile, mix in SHORT_OF_MEMORY.items():
        if profile != "a5000-8b":
            base = Scenario(profile, "", mix=mix)
            yield from _each(base, MAIN, (0.9, 1.2), SEEDS)


def traces() -> Iterator[Scenario]:
    """Real arrivals and lengths, ten windows of 200 requests each; the last is the control."""
    for trace, profile in (
        ("mooncake_fast25_conversation", "a6000-8b"),
        ("servegen_deepseek_r1_20min", "a5000-8b"),
        ("azure_llm_2023_conv", "a5000-8b"),
    ):
        for window in range(len(SEEDS)):
            base = Scenario(profile, "", trace=trace, requests=200, skip=200 * window)
            yield from _each(base, MAIN, (0.7, 0.9, 1.2), (window,))


def ablation() -> Iterator[Scenario]:
    """Our policy without each of its rules."""
    methods = [
        *OURS,
        *(f"orbitflow:no-{rule}@paced" for rule in RULES),
        *(f"orbitflow:no-{rule}" for rule in RULES if rule not in ("deposit",)),
    ]
    for mix in ("MIX", "LL"):
        yield from _each(Scenario("a5000-8b", "", mix=mix), methods, (0.9, 1.2), SEEDS)


def modelling() -> Iterator[Scenario]:
    """What the machine could do worse: no look-ahead across steps, late plans, a jittery link,
    prompt chunks mixed into decode steps, and a ring that costs nothing."""
    base = Scenario("a5000-8b", "", mix="MIX")
    for changed in (
        base,
        replace(base, cold=True),
        replace(base, ring_counted=False),
        replace(base, planner_latency_s=0.5),
        replace(base, link_jitter=0.3),
        replace(base, mixed=True),
    ):
        methods = (*OURS, "retract", "swap+order", "time-sliced-swap@paced", "paper")
        yield from _each(changed, methods, (1.2,), FEW_SEEDS)


def paper() -> Iterator[Scenario]:
    """The paper's setting: its fits, batches of 4, an arena of 9,776 tokens, requests of up to
    16,384 tokens; SLO scales and rates as in its figures, and its rate of arrivals as its driver
    has it: a request for as many engine steps as an answer has tokens, on average."""
    for profile in ("a5000-8b-published", "a5000-8b-published-link"):
        base = Scenario(
            profile, "", mix="MIX:full", requests=52, oversize=True, slo_scale=1.5, rate=PAPER_RATE
        )
        methods = (*PAPERS, "swap+order", *OURS)
        for scale in (1.0, 1.5, 2.5):
            step = (REQUEST_WISE,) if scale == 1.0 else ()  # of the ablation; plans at every page
            for seed, name in product(FEW_SEEDS, (*methods, *step)):
                yield method(replace(base, slo_scale=scale, seed=seed), name)
        for times in (2, 4):
            for seed, name in product(FEW_SEEDS, methods):
                yield method(replace(base, rate=PAPER_RATE * times, seed=seed), name)
        for seed, name in product(FEW_SEEDS, (*methods, REQUEST_WISE)):
            yield method(replace(base, slo_scale=1.0, rate=PAPER_STEP_RATE, seed=seed), name)


def contexts() -> Iterator[Scenario]:
    """The same machine with ever longer requests."""
    methods = (*OURS, "retract", "swap+order", "time-sliced-swap@paced", "paper", "static:8")
    for factor in (0.5, 1, 2, 4):
        base = Scenario("a5000-8b", "", mix=f"MIX*{factor}", arena_gb=5 * max(1, factor / 2))
        yield from _each(base, methods, (0.9,), FEW_SEEDS)


def crossover() -> Iterator[Scenario]:
    """Where it helps: the link, the SLO, and decode against prefill."""
    methods = (*OURS, "retract", "swap+order", "time-sliced-swap@paced", "static:8",
               "orbitflow:no-streaming@paced", "orbitflow:no-streaming")  # fmt: skip
    base = Scenario("a5000-8b", "", mix="MIX")
    for link in (6.0, 12.0, 24.0, 48.0, 100.0, 200.0):
        for scale in (1.25, 2.0, 4.0):
            changed = replace(base, link_gb_per_s=link, slo_scale=scale)
            yield from _each(changed, methods, (1.2,), FEW_SEEDS[:3])
    for mix in ("SL", "SL:1+LL:1", "MIX", "LS:1+LL:1", "LS"):
        yield from _each(replace(base, mix=mix), methods, (0.9,), FEW_SEEDS[:3])


STUDIES = {
    "mixes": mixes,
    "close": close,
    "machines": machines,
    "traces": traces,
    "ablation": ablation,
    "modelling": modelling,
    "paper": paper,
    "contexts": contexts,
    "crossover": crossover,
}


def quick() -> Iterator[Scenario]:
    """A smoke run of under a minute: two seeds, few requests, the main methods."""
    base = Scenario("a5000-8b", "", mix="MIX", requests=40)
    methods = (*OURS, "retract", "swap+order", "time-sliced-swap@paced", "paper")
    yield from _each(base, methods, (1.2,), TUNING_SEEDS[:2])
