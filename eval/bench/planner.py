"""``make bench-planner``: how fast and how good plans are, and what each idea brings.

Everything runs on one core, on problems drawn from seeds. ``given``: the caller says who
runs, as the controller does. ``alone``: the planner also chooses who pauses, from SLOs and
deposits. Step times come from the cyclic recurrence with the ring counted; the floor is
max(L t, D t_b) with the fewest pages D that memory allows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval import traces
from eval.bench.measure import results_folder, write_result
from orbitflow_sglang.planner.columns import Columns, solve_columns
from orbitflow_sglang.planner.evaluation import build_plan
from orbitflow_sglang.planner.greedy import fill
from orbitflow_sglang.planner.incremental import IncrementalPlanner, adopt, placed_as
from orbitflow_sglang.planner.paper import solve_paper
from orbitflow_sglang.planner.patterns import distance_mask, widest_distances
from orbitflow_sglang.planner.problem import IntArray, Plan, PlanningProblem, Unit
from orbitflow_sglang.planner.solver import greedy, objective, solve
from orbitflow_sglang.planner.worker import PlannerWorker

SIZES = ((2, 32), (8, 32), (16, 64), (32, 80), (64, 128))
HEADLINE = (32, 80)
AIMS = {"solve_p50_ms": 5.0, "solve_p99_ms": 50.0, "greedy_ms": 0.2, "scheduler_ms": 0.2}
PAGE_TOKENS = 16


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    result: dict[str, Any] = {"aims": AIMS}
    result["speed"] = speed(options.problems, options.seed)
    result["scheduler"] = scheduler_side(options.seed)
    result["ideas"] = ideas(max(4, options.problems // 8), options.seed)
    result["against_paper"] = against_paper(options.problems, options.seed)
    result["incremental"] = incremental(options.changes)
    write_result(options.output, argv, result)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench.planner", description=(__doc__ or "").replace("``", "")
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: few problems")
    parser.add_argument("--problems", type=int, help="for each size and use (200)")
    parser.add_argument("--changes", type=int, help="of the batch, incrementally (2000)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="(eval/results/cpu/planner.json)")
    options = parser.parse_args(argv)
    options.problems = options.problems or (10 if options.quick else 200)
    options.changes = options.changes or (100 if options.quick else 2000)
    options.output = options.output or results_folder(quick=options.quick) / "planner.json"
    return options


# --- problems -------------------------------------------------------------------


def draw(rng: np.random.Generator, units: int, layers: int, use: str) -> PlanningProblem:
    """Requests of 0.3k to 24k tokens over an arena from a third of their KV to all of it."""
    pages = rng.integers(20, 1500, units)
    t, t_b = float(rng.uniform(1e-4, 3e-3)), float(rng.uniform(5e-7, 1e-5))
    placed = tuple(range(4, layers + 1, 4)) if rng.random() < 0.5 else ()
    made = []
    for number in range(units):
        slo = float(layers * t * rng.choice([1.1, 1.5, 2, 3, 5])) if rng.random() < 0.7 else None
        ahead = slo is not None and rng.random() < 0.5
        unit = Unit(
            id=f"u{number:03d}",
            pages_per_layer=int(pages[number]),
            tpot_slo_s=slo,
            deposit_tokens=float(rng.uniform(0, 80)) if ahead else 0.0,
            growth_pages_per_layer=2,
            present=placed,
            age_s=float(rng.uniform(0, 60)),
        )
        made.append(unit)
    everything = layers * int(pages.sum() + 3 * units)
    arena = int(everything * rng.uniform(0.35, 1.02))
    budget = everything if use == "given" else None
    return PlanningProblem(layers, arena, t, t_b, tuple(made), stream_budget_pages=budget)


def drawn(count: int, seed: int, units: int, layers: int, use: str) -> list[PlanningProblem]:
    rng = np.random.default_rng([seed, units, layers, use == "given"])
    return [draw(rng, units, layers, use) for _ in range(count)]


# --- speed ----------------------------------------------------------------------


def speed(count: int, seed: int) -> list[dict[str, Any]]:
    say("units layers  use     solve ms p50 / p99 / max    greedy ms   gap p99 / max   paused")
    rows, both_ms = [], []
    for units, layers in SIZES:
        for use in ("given", "alone"):
            plans, solve_ms, greedy_ms = [], [], []
            for problem in drawn(count, seed, units, layers, use):
                solve_ms.append(_timed(lambda: plans.append(solve(_fresh(problem)))))  # noqa: B023
                greedy_ms.append(_timed(lambda: greedy(_fresh(problem))))  # noqa: B023
            gaps = [plan.gap for plan in plans]
            row = {
                "units": units,
                "layers": layers,
                "use": use,
                "problems": count,
                "solve_p50_ms": _percentile(solve_ms, 50),
                "solve_p99_ms": _percentile(solve_ms, 99),
                "solve_max_ms": max(solve_ms),
                "greedy_p50_ms": _percentile(greedy_ms, 50),
                "greedy_p99_ms": _percentile(greedy_ms, 99),
                "gap_p99": _percentile(gaps, 99),
                "gap_max": max(gaps),
                "paused": sum(bool(plan.paused.any()) for plan in plans),
            }
            rows.append(row)
            both_ms += solve_ms
            say(
                f"{units:5d} {layers:6d}  {use}  {row['solve_p50_ms']:8.2f} "
                f"{row['solve_p99_ms']:8.2f} {row['solve_max_ms']:8.2f}   "
                f"{row['greedy_p50_ms']:7.3f}     {row['gap_p99']:7.2%} {row['gap_max']:7.2%}  "
                f"{row['paused']:5d}"
            )
    say(f"all together: p50 {_percentile(both_ms, 50):.2f}, p99 {_percentile(both_ms, 99):.2f} ms")
    return rows


def scheduler_side(seed: int) -> dict[str, float]:
    """What a step costs the scheduler when it hands over a problem and takes an answer."""
    units, layers = HEADLINE
    worker = PlannerWorker()
    submits, polls, adoptions, last = [], [], [], None
    for problem in drawn(60, seed, units, layers, "given"):
        one = _fresh(problem)
        submits.append(_timed(lambda: worker.submit(one)))  # noqa: B023
        answer = None
        while answer is None:
            time.sleep(0.002)
            begun = time.perf_counter()
            answer = worker.poll()
            if not worker.busy and answer is None:
                raise RuntimeError(f"the worker gave no usable plan: {worker.counts}")
            if answer is not None:
                polls.append(1e3 * (time.perf_counter() - begun))
        adoptions.append(_timed(lambda: adopt(one, answer.plan, last)))  # noqa: B023
        last = answer.plan
    worker.close()
    found = {
        "submit_ms": statistics.median(submits[1:]),
        "poll_and_check_ms": statistics.median(polls[1:]),
        "adopt_ms": statistics.median(adoptions[1:]),
    }
    say(
        f"\nscheduler's side, {units} units x {layers} layers: hand over {found['submit_ms']:.3f}, "
        f"take and check {found['poll_and_check_ms']:.3f}, adopt {found['adopt_ms']:.3f} ms"
    )
    return found


# --- what each idea brings ----------------------------------------------------------


def ideas(count: int, seed: int) -> list[dict[str, Any]]:
    """One idea after another added to the authors' choice of distances."""
    ladder: list[tuple[str, Callable[[PlanningProblem], IntArray | None]]] = [
        ("authors' plan: distances, cold pass, no ring", lambda p: solve_paper(p).offloaded),
        ("+ ring counted", lambda p: _by_columns(p, cyclic=False)),
        ("+ cyclic pipeline", lambda p: _by_columns(p)),
        ("+ resident and all", lambda p: _by_columns(p, ends=True)),
        ("+ phases", lambda p: _by_columns(p, ends=True, phases=True)),
        ("+ irregular layer sets", lambda p: _by_columns(p, ends=True, phases=True, more=True)),
        ("+ page ranges", lambda p: _filled(p, page_ranges=True)),
    ]
    problems = [
        replace(p, units=tuple(replace(u, present=(), growth_pages_per_layer=0) for u in p.units))
        for p in drawn(3 * count, seed, 8, 32, "given")
    ]
    # Where memory is short but half of the layers can stay, so that each idea has a plan.
    problems = [p for p in problems if 0.6 < p.arena_pages / (32 * p.pages.sum()) < 0.95][:count]
    say(f"\nstep time / floor, {len(problems)} problems of 8 units x 32 layers: median, p90, fit")
    rows = []
    for name, place in ladder:
        ratios = []
        for problem in problems:
            offloaded = place(problem)
            if offloaded is None:
                continue
            plan = build_plan(problem, offloaded, np.zeros(len(problem.units), dtype=bool))
            if plan.fits:
                ratios.append(plan.step_time_s / plan.lower_bound_s)
        median = statistics.median(ratios) if ratios else None
        p90 = _percentile(ratios, 90) if ratios else None
        rows.append({"idea": name, "median": median, "p90": p90, "fit": len(ratios)})
        shown = f"{median:.4f}  {p90:.4f}" if ratios else "     -       -"
        say(f"  {name:46s} {shown}  {len(ratios):4d}/{len(problems)}")
    return rows


def _by_columns(
    problem: PlanningProblem,
    *,
    cyclic: bool = True,
    ends: bool = False,
    phases: bool = False,
    more: bool = False,
) -> IntArray | None:
    layers, groups = problem.layers, []
    masks = [distance_mask(d, layers) for d in widest_distances(layers)]
    if phases:
        for d in widest_distances(layers)[:5]:
            masks += [np.arange(layers) % (d + 1) == phase for phase in range(d)]
    if ends:
        masks += [np.zeros(layers, bool), np.ones(layers, bool)]
    if more:  # every number of layers, spread evenly, from either end
        for number in range(1, layers):
            even = np.arange(1, layers + 1) * number // layers
            masks += [np.diff(even, prepend=0) > 0, np.diff(even, prepend=0)[::-1] > 0]
    for row, pages in enumerate(problem.pages.tolist()):
        loads = np.array(masks).astype(np.int64) * pages
        groups.append(Columns((row,), loads, layers * pages - loads.sum(axis=1)))
    choice = solve_columns(
        groups,
        layer_compute_s=problem.layer_compute_s,
        page_transfer_s=problem.page_transfer_s,
        arena_pages=problem.arena_pages - layers * len(problem.units),
        ring_per_peak=2.0,
        cyclic=cyclic,
        gap=1e-3,
        time_limit_s=5.0,
    )
    if choice is None:
        return None
    return np.stack([group.offloaded[choice.columns[row]] for row, group in enumerate(groups)])


def _filled(problem: PlanningProblem, *, page_ranges: bool) -> IntArray:
    everyone = np.ones(len(problem.units), dtype=bool)
    nothing = np.zeros((len(problem.units), problem.layers), dtype=np.int64)
    return fill(problem, everyone, nothing, page_ranges=page_ranges)


def against_paper(count: int, seed: int) -> dict[str, Any]:
    """Our plan and the authors' on the same problem, both replayed with the ring counted.

    Theirs mostly fills the arena, so that a ring has no room beside it; it is then planned
    again for an arena smaller by what was missing, until it fits. With SLOs late tokens
    mostly decide; without, step times can be compared.
    """
    return {
        use: _against_paper(
            drawn(count // 4, seed + 1, 2, 32, use)
            + drawn(count // 4, seed + 1, 8, 32, use)
            + drawn(count // 4, seed + 1, 32, 80, use),
            use,
        )
        for use in ("alone", "given")
    }


def _against_paper(problems: Sequence[PlanningProblem], use: str) -> dict[str, Any]:
    gains: list[float] = []
    outcome: Counter[str] = Counter()
    for problem in problems:
        replayed = theirs = _authors(problem, problem.arena_pages)
        arena = problem.arena_pages
        while not replayed.fits and arena > problem.layers:
            used = replayed.arena_pages_used + replayed.ring_pages
            arena -= max(used - problem.arena_pages, problem.layers)
            replayed = _authors(problem, arena)
        outcome["of the authors' plans fit beside their ring"] += theirs.fits
        if not replayed.fits or (use == "given" and replayed.paused.any()):
            outcome["theirs never fits, or not without a pause"] += 1
            continue
        ours = solve(problem)
        late, reference = objective(ours)[1], objective(replayed)[1]
        if late < reference - 1e-6:
            outcome["ours has fewer late tokens"] += 1
        elif late > reference + 1e-6 or ours.step_time_s > 1.01 * replayed.step_time_s:
            outcome["ours is worse"] += 1
        else:
            outcome["equally late: step times compared"] += 1
            gains.append(replayed.step_time_s / ours.step_time_s)
    found: dict[str, Any] = {"outcome": dict(outcome)}
    say(
        f"\nagainst the authors' plan ({use}): "
        + ", ".join(f"{n} {what}" for what, n in outcome.items())
    )
    if gains:
        quantiles = {str(q): _percentile(gains, q) for q in (0, 10, 25, 50, 75, 90, 100)}
        found["their_step_over_ours"] = quantiles
        shown = ", ".join(f"p{q} {ratio:.3f}" for q, ratio in quantiles.items())
        say(f"their step time / ours where compared: {shown}")
    return found


def _authors(problem: PlanningProblem, arena_pages: int) -> Plan:
    """The authors' plan for such an arena, in ours."""
    plan = solve_paper(replace(problem, arena_pages=arena_pages, time_limit_s=2.0))
    return build_plan(problem, plan.offloaded, plan.paused)


# --- incremental ------------------------------------------------------------------


def batches(changes: int) -> Iterator[tuple[PlanningProblem, int]]:
    """The batch behind each of so many arrivals, finishes and ends of a window, and the steps
    since the one before.

    Requests of the Mooncake trace decode together, up to 16 and up to 1.6 arenas of KV, in
    steps of 50 ms: an 8B model whose arena holds 38k tokens in 32 layers.
    """
    layers, arena, step_s, window = 32, 32 * 2400, 0.05, 64
    waiting = [a for a in traces.load("mooncake_fast25_conversation") if a.input_tokens < 30_000]
    running: dict[str, list[int]] = {}  # tokens now, tokens in the end
    now, number, since = 0.0, 0, 0

    def problem() -> PlanningProblem:
        units = tuple(
            Unit(name, tokens // PAGE_TOKENS, growth_pages_per_layer=-(-window // PAGE_TOKENS))
            for name, (tokens, _) in running.items()
        )
        return PlanningProblem(
            layers, arena, 1.4e-3, 2.7e-6, units, window_steps=window, stream_budget_pages=10**9
        )

    while changes:
        changed = False
        for name in [name for name, (tokens, end) in running.items() if tokens >= end]:
            del running[name]
            changed = True
        while len(running) < 16 and number < len(waiting):
            one = waiting[number]
            held = sum(end for _, end in running.values())
            total = one.input_tokens + one.output_tokens
            # A fiftieth of the trace's rate, which is that of a fleet.
            if one.arrival_s * 50 > now or (held + total) * layers > 1.6 * arena * PAGE_TOKENS:
                break
            running[f"r{number}"] = [one.input_tokens, total]
            number += 1
            changed = True
        since += 1
        if running and (changed or since >= window):
            changes -= 1
            yield problem(), since
            since = 0
        for tokens in running.values():
            tokens[0] += 1
        now += step_s


def incremental(changes: int) -> dict[str, Any]:
    planner, knowing, afresh = IncrementalPlanner(), _Total(), _Total()
    moved, updates_ms = 0, []
    for problem, steps in batches(changes):
        before = planner.plan
        begun = time.perf_counter()
        plan, outcome = planner.update(problem, steps)
        updates_ms.append(1e3 * (time.perf_counter() - begun))
        if outcome != "reused" and before is not None:
            moved += build_plan(
                placed_as(problem, before), plan.offloaded, plan.paused
            ).migration_pages
        knowing.add(problem, solve(placed_as(problem, knowing.plan)))
        afresh.add(problem, solve(problem))
    shares = {name: n / changes for name, n in planner.outcomes.items()}
    found = {
        "changes": changes,
        "outcomes": shares,
        "update_p50_ms": _percentile(updates_ms, 50),
        "update_p99_ms": _percentile(updates_ms, 99),
        "migration_pages": moved,
        "solved_each_time_from_present": knowing.moved,
        "solved_each_time_afresh": afresh.moved,
    }
    say(
        f"\n{changes} batch changes: "
        + ", ".join(f"{share:.1%} {name}" for name, share in shares.items())
        + f"; {found['update_p50_ms']:.2f} ms p50, {found['update_p99_ms']:.2f} p99"
        + f"\npages moved: {moved}; solved each time from present {knowing.moved}, "
        f"afresh {afresh.moved} (incremental / afresh {moved / max(1, afresh.moved):.2f})"
    )
    return found


class _Total:
    """Pages moved by adopting one plan after another."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.moved = 0

    def add(self, problem: PlanningProblem, plan: Plan) -> None:
        if self.plan is not None:
            placed = placed_as(problem, self.plan)
            self.moved += build_plan(placed, plan.offloaded, plan.paused).migration_pages
        self.plan = plan


# --- inside -----------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def _fresh(problem: PlanningProblem) -> PlanningProblem:
    """A copy that has computed nothing yet."""
    return replace(problem)


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def _percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))


if __name__ == "__main__":
    # HiGHS now and then prints to file descriptor 1: that goes to standard error.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(sys.argv[1:]))
