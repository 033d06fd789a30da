"""Planning problems for tests, and slow answers in plain code to compare with."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from orbitflow_sglang.planner.problem import PlanningProblem, Unit


def problem(
    pages: Sequence[int],
    *,
    layers: int = 8,
    arena: int = 100,
    t: float = 1e-3,
    t_b: float = 1e-4,
    slo: Sequence[float | None] = (),
    deposit: Sequence[float] = (),
    **more: object,
) -> PlanningProblem:
    """Units "a", "b", … of so many pages a layer."""
    units = tuple(
        Unit(
            id=chr(ord("a") + number),
            pages_per_layer=count,
            tpot_slo_s=slo[number] if slo else None,
            deposit_tokens=deposit[number] if deposit else 0.0,
        )
        for number, count in enumerate(pages)
    )
    return PlanningProblem(layers, arena, t, t_b, units, **more)  # type: ignore[arg-type]


def random_problem(
    rng: np.random.Generator,
    units: int,
    layers: int,
    *,
    tightness: tuple[float, float] = (0.35, 1.02),
    with_slo: bool = True,
    with_present: bool = False,
    largest: int = 1500,
) -> PlanningProblem:
    """Mixed lengths, SLOs and deposits over an arena that holds that share of the KV."""
    pages = rng.integers(1, largest + 1, units)
    t, t_b = rng.uniform(1e-4, 3e-3), rng.uniform(5e-7, 1e-5)
    everything = layers * int(pages.sum() + units)
    made = []
    for number in range(units):
        tight = with_slo and rng.random() < 0.7
        made.append(
            Unit(
                id=f"u{number:03d}",
                pages_per_layer=int(pages[number]),
                tpot_slo_s=float(layers * t * rng.choice([1.1, 1.5, 2, 3, 5])) if tight else None,
                deposit_tokens=float(rng.uniform(0, 80)) if tight and rng.random() < 0.5 else 0.0,
                age_s=float(rng.uniform(0, 60)),
                present=tuple(range(4, layers + 1, 4)) if with_present else (),
            )
        )
    arena = max(2 * layers, int(everything * rng.uniform(*tightness)))
    return PlanningProblem(layers, arena, t, t_b, tuple(made))


@st.composite
def problems(draw: st.DrawFn) -> PlanningProblem:
    """Small problems of every kind: prefixes, growth, rings, budgets, hosts that are too small."""
    layers = draw(st.integers(1, 12))
    count = draw(st.integers(1, 6))
    requests = []
    for number in range(count):
        slo = draw(st.none() | st.floats(1e-3, 0.5))
        requests.append(
            Unit(
                id=f"r{number}",
                pages_per_layer=draw(st.integers(0, 40)),
                tpot_slo_s=slo,
                deposit_tokens=0.0 if slo is None else draw(st.floats(-20, 100)),
                growth_pages_per_layer=draw(st.integers(0, 3)),
                present=tuple(sorted(draw(st.sets(st.integers(1, layers))))),
                age_s=draw(st.floats(0, 100)),
            )
        )
    prefixes = []
    if count > 1 and draw(st.booleans()):
        users = draw(st.sets(st.sampled_from([unit.id for unit in requests]), min_size=1))
        prefixes.append(Unit("p", draw(st.integers(0, 40)), shared_by=tuple(sorted(users))))
    everything = layers * sum(unit.pages_at_end + 1 for unit in (*requests, *prefixes))
    return PlanningProblem(
        layers=layers,
        arena_pages=max(1, int(everything * draw(st.floats(0.02, 1.2)))),
        layer_compute_s=draw(st.floats(1e-5, 1e-2)),
        page_transfer_s=draw(st.floats(1e-7, 1e-3)),
        units=tuple(draw(st.permutations((*requests, *prefixes)))),
        ring_pages=draw(st.none() | st.integers(2, 60)),
        transfer_setup_s=draw(st.sampled_from([0.0, 1e-5])),
        host_pages=draw(st.none() | st.integers(0, everything)),
        stream_budget_pages=draw(st.none() | st.integers(0, everything)),
        window_steps=draw(st.integers(1, 64)),
    )


def page_by_page(
    pages: Sequence[int],
    t: float,
    t_b: float,
    ring: int,
    *,
    setup: Sequence[float] | None = None,
    steps: int = 1,
    lead: float = 0.0,
) -> list[float]:
    """When each step ends, one page after another: the recurrence in its plainest form."""
    half = max(1, ring // 2)
    slots = deque([-np.inf] * ring)  # when each comes free, in the order of use
    link, computed, ends = -lead, 0.0, []
    for _ in range(steps):
        for layer, count in enumerate(pages):
            link += setup[layer] if setup else 0.0
            pieces = [count]
            if count > half:
                pieces = [half] * (count // half) + ([count % half] if count % half else [])
            for size in pieces:
                for _page in range(size):
                    link = max(link, slots.popleft()) + t_b
                arrived = link if size else computed
                computed = max(computed, arrived) + t * (size / count if count else 1.0)
                slots.extend([computed] * size)
        ends.append(computed)
    return ends


def paper_by_trying(problem: PlanningProblem) -> float | None:
    """The authors' optimum by trying every choice of distances; None: memory has none."""
    layers, best = problem.layers, None
    distances = sorted({max(d for d in range(1, layers) if layers // (d + 1) == n)
                        for n in {layers // (d + 1) for d in range(1, layers)}})  # fmt: skip
    counts = [unit.pages_per_layer for unit in problem.units]
    for chosen in itertools.product(distances, repeat=len(counts)):
        resident = sum(
            (layers - layers // (d + 1)) * c for d, c in zip(chosen, counts, strict=True)
        )
        if resident > problem.arena_pages:
            continue
        stall = 0.0
        for j in range(1, layers + 1):
            due = sum(c * (j // (d + 1)) for d, c in zip(chosen, counts, strict=True))
            late = due * problem.page_transfer_s - (j - 1) * problem.layer_compute_s
            stall = max(stall, late)
        step = layers * problem.layer_compute_s + stall
        best = step if best is None else min(best, step)
    return best


def seeded(examples: int) -> settings:
    """Hypothesis settings beside those of every test (tests/conftest.py)."""
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
