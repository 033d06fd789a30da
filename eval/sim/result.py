"""What a simulated run came to: metrics by ``eval.metrics``, the paper's own beside them, and
the checks that nothing was lost on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from eval import metrics
from eval.metrics import Generated, Served, percentile
from eval.sim.engine import Simulation
from eval.sim.job import Job
from orbitflow_sglang.slo import SLO

DIGITS = 9  # significant, of every number that is written
Metrics = dict[str, float | int | None]


class Unbalanced(AssertionError):
    """Something was lost or counted twice: a fault of the simulator."""


def check(simulation: Simulation) -> None:
    """Raise ``Unbalanced`` unless everything that went in came out."""
    memory = simulation.memory
    for job in simulation.jobs:
        refused = job in simulation.refused
        if refused == bool(job.token_s) or (not refused and len(job.token_s) != job.output_tokens):
            raise Unbalanced(f"{job.rid}: {len(job.token_s)} of {job.output_tokens} tokens")
        if any(later < earlier for earlier, later in pairwise(job.token_s)):
            raise Unbalanced(f"{job.rid}: tokens out of order")
        if not refused and job.computed != job.asked_tokens + job.recomputed:
            raise Unbalanced(
                f"{job.rid}: {job.computed} prompt tokens computed, {job.asked_tokens} asked and "
                f"{job.recomputed} thrown away"
            )
    if faults := memory.balance():
        raise Unbalanced("; ".join(faults))
    if simulation.steps["pauses"] != simulation.steps["resumes"]:
        raise Unbalanced(f"{simulation.steps}: pauses and resumes differ")


def served(simulation: Simulation, repeat: int = 0) -> list[Served]:
    """Every request as its client saw it; a refused one got nothing."""
    return [_served(job, repeat) for job in simulation.jobs]


def _served(job: Job, repeat: int) -> Served:
    view, times = job.view, job.view.times
    shown = delivered(job.token_s, view.slo) if view.slo.deposit else job.token_s
    generated = None
    if times.ttft_s is not None:
        generated = Generated(times.ttft_s, times.tpot_s, times.max_tbt_s)
    return Served(
        rid=job.rid,
        repeat=repeat,
        arrival_s=view.arrival_s,
        asked_tokens=job.output_tokens,
        slo=view.slo,
        token_s=tuple(at - view.arrival_s for at in shown),
        error=None if job.token_s else "refused",
        generated=generated,
    )


def delivered(token_s: Sequence[float], slo: SLO) -> list[float]:
    """When paced delivery lets go of each token: at its pace, or when it is there if later; at
    the end whatever is left."""
    if not token_s:
        return []
    first, last = token_s[0], token_s[-1]
    return [
        max(at, min(last, first + slo.release_s(number)))
        for number, at in enumerate(token_s, start=1)
    ]


def summary(simulation: Simulation) -> Metrics:
    """All metrics of a run; shares from 0 to 1, times in seconds."""
    ones = served(simulation)
    counted = metrics.metrics(ones)
    makespan = metrics.makespan_s(ones)
    page_gb = simulation.hardware.page_bytes / 1e9
    memory, jobs = simulation.memory, simulation.jobs
    good = [one for one in ones if metrics.good(one)]
    result: Metrics = {
        "requests": len(ones),
        "refused": len(simulation.refused),
        "good_requests": counted["good"],
        "good_requests_strict": counted["strict"],
        "good_requests_generated": counted["good_generated"],
        "good_requests_strict_generated": counted["strict_generated"],
        "tokens_on_time": counted["tokens_on_time"],
        "ttft_attainment": counted["ttft_ok"],
        "tpot_attainment": counted["tpot_ok"],
        "tbt_attainment": counted["gaps_ok"],
        "tbt_attainment_deposited": counted["gaps_ok_deposited"],
        "tbt_attainment_requests": counted["tbt_ok"],
        "tbt_attainment_requests_deposited": counted["tbt_ok_deposited"],
        "throughput_tokens_per_s": metrics.tokens_per_s(ones),
        "goodput_requests_per_s": len(good) / makespan,
        "goodput_tokens_per_s": sum(len(one.token_s) for one in good) / makespan,
        "makespan_s": makespan,
        "worst_gap_s": counted["worst_gap_s"],
    }
    result |= _percentiles(ones)
    decoded_s = sum(measured for _, measured in simulation.errors)
    result |= {
        "stall_share": simulation.stall_s / decoded_s if decoded_s else 0.0,
        "h2d_gb": memory.h2d_pages * page_gb,
        "d2h_gb": memory.d2h_pages * page_gb,
        "d2h_waited_for_gb": memory.forced_pages * page_gb,
        "pauses": simulation.steps["pauses"],
        "retractions": simulation.retractions,
        "recomputed_tokens": sum(job.recomputed for job in jobs),
        "prefill_steps": simulation.steps["prefill"],
        "decode_steps": simulation.steps["decode"],
        "plans": sum(simulation.worker.counts.values()) if simulation.worker else 0,
        "step_time_error_median": _median_error(simulation.errors),
    }
    result |= paper(jobs)
    return {name: rounded(value) for name, value in result.items()}


def _percentiles(ones: Sequence[Served]) -> Metrics:
    values = {
        "ttft": [one.ttft_s for one in ones],
        "tpot": [one.tpot_s for one in ones],
        "tbt": [gap for one in ones for gap in one.gaps_s],
    }
    found: Metrics = {}
    for name, times in values.items():
        times.sort()
        for percent in (50, 95, 99):
            found[f"p{percent}_{name}_s"] = percentile(times, percent)
    return found


def paper(jobs: Sequence[Job]) -> Metrics:
    """The metrics of the paper's scripts (method notes, k and m): a token takes the time of the
    engine step that made it, so that waits between steps are invisible, and a request's
    deposit covers what is late."""
    decoded = late = late_deposited = on_mean = 0
    ratios = []
    for job in jobs:
        target, steps = job.view.slo.tpot_s, job.step_s
        if target is None:
            continue
        decoded += max(0, job.output_tokens - 1)
        late += sum(step > target for step in steps) + job.output_tokens - 1 - len(steps)
        late_deposited += _late_deposited(steps, target) + job.output_tokens - 1 - len(steps)
        on_mean += not steps or sum(steps) <= target * len(steps)
        ratios += [step / target for step in steps]
    ratios.sort()
    return {
        "paper_tbt_attainment": (decoded - late) / decoded if decoded else None,
        "paper_tbt_attainment_deposited": (decoded - late_deposited) / decoded if decoded else None,
        "paper_tpot_attainment": on_mean / len(jobs) if jobs else None,
        "paper_p95_tbt_ratio": percentile(ratios, 95),
        "paper_p99_tbt_ratio": percentile(ratios, 99),
    }


def _late_deposited(steps: Sequence[float], target: float) -> int:
    """Tokens shown later than ``target`` behind the one before, where early ones are kept back."""
    late, shown = 0, 0.0
    for made in accumulate(steps):
        due = shown + target
        late += made > due
        shown = max(made, due)
    return late


def rows(simulation: Simulation) -> list[dict[str, Any]]:
    """One line for each request, in the order of arrival."""
    found = []
    for job, one in zip(simulation.jobs, served(simulation), strict=True):
        row = {
            "rid": job.rid,
            "arrival_s": one.arrival_s,
            "input_tokens": job.asked_tokens,
            "output_tokens": job.output_tokens,
            "ttft_s": one.ttft_s,
            "tpot_s": one.tpot_s,
            "worst_gap_s": one.worst_gap_s if one.token_s else None,
            "generated_worst_gap_s": job.view.times.max_tbt_s,
            "good": metrics.good(one),
            "strict": metrics.strict(one),
            "tokens_on_time": metrics.tokens_on_time(one),
            "pauses": job.view.pauses,
            "recomputed_tokens": job.recomputed,
        }
        found.append({name: rounded(value) for name, value in row.items()})
    return found


def _median_error(errors: Sequence[tuple[float, float]]) -> float | None:
    """Median of |measured / predicted - 1| over decode steps."""
    off = sorted(abs(measured / predicted - 1) for predicted, measured in errors if predicted)
    return off[len(off) // 2] if off else None


def rounded(value: Any) -> Any:
    """A number as it is written: ``DIGITS`` significant digits; None for what JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
