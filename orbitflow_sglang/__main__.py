"""``python -m orbitflow_sglang COMMAND``: tools that need no server."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from orbitflow_sglang.planner.modes import make_plan
from orbitflow_sglang.planner.problem import Plan
from orbitflow_sglang.planner.problem_file import ProblemError, load_problem, plan_as_json

MALFORMED = 2  # exit status, as argparse has it for a wrong command line


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m orbitflow_sglang")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="which layers of which request would stay on the device",
        description="Plan a batch described in a JSON file; docs/planner.md has its format.",
    )
    plan.add_argument("file", metavar="FILE", help="the problem; - reads standard input")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument("--picture", type=Path, metavar="OUT.svg", help="draw the plan as well")
    plan.set_defaults(run=plan_command)
    options = parser.parse_args(argv)
    status: int = options.run(options)
    return status


def plan_command(options: argparse.Namespace) -> int:
    """Exit status 0 for any well-formed problem, whether or not its plan is feasible."""
    try:
        text = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        problem = load_problem(text)
    except (OSError, ProblemError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(f"{options.file}: {reason}", file=sys.stderr)
        return MALFORMED
    with stdout_kept_clean():
        plan = make_plan(problem)
    if options.picture is not None:
        from orbitflow_sglang.planner.picture import draw

        try:
            options.picture.write_text(draw(plan), encoding="utf-8")
        except OSError as error:
            print(f"--picture {options.picture}: {error.strerror}", file=sys.stderr)
            return MALFORMED
    if options.json:
        sys.stdout.write(orjson.dumps(plan_as_json(plan), option=orjson.OPT_INDENT_2).decode())
        sys.stdout.write("\n")
    else:
        print(as_table(plan))
    return 0


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """HiGHS now and then prints to file descriptor 1: what it says goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def as_table(plan: Plan) -> str:
    """The plan for people: what a step costs, then a line for each unit."""
    problem = plan.problem
    step, bound = plan.step_time_s * 1e3, plan.lower_bound_s * 1e3
    free = problem.arena_pages - plan.arena_pages_used - plan.ring_pages
    lines = [
        f"{problem.mode}: {plan.status}, solved in {plan.solve_s * 1e3:.1f} ms",
        f"step     {step:.2f} ms: compute {problem.resident_step_s * 1e3:.2f}, stall "
        f"{plan.stall_s * 1e3:.2f}; {plan.gap:.1%} above the bound of any plan, {bound:.2f}",
        f"arena    {problem.arena_pages} pages: {plan.arena_pages_used} used, ring "
        f"{plan.ring_pages}, {free} free",
        f"link     {plan.streamed_pages} pages a step; {plan.migration_pages} move to adopt the "
        "plan",
        "",
    ]
    rows = [("unit", "pages a layer", "on the host", "runs", "SLO")]
    for unit, planned in zip(problem.units, plan.units, strict=True):
        slo = "-" if unit.tpot_slo_s is None else f"{unit.tpot_slo_s * 1e3:.1f} ms "
        met = "" if unit.tpot_slo_s is None else "met" if planned.slo_met else "missed"
        runs = "paused" if planned.paused else "yes"
        rows.append((unit.id, str(unit.pages_at_end), planned.pattern, runs, slo + met))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    if plan.never_fits:
        lines += ["", f"arena and host together never hold: {', '.join(plan.never_fits)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
