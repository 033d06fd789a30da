"""The worker as a real process, and what becomes of one that fails."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import orjson
import pytest
from problems import random_problem

from orbitflow_sglang.planner.problem import PlanningProblem, Unit
from orbitflow_sglang.planner.problem_file import problem_as_json
from orbitflow_sglang.planner.solver import solve
from orbitflow_sglang.planner.worker import (
    ANSWER_TIMEOUT_S,
    COMMAND,
    FIRST_ANSWER,
    Answer,
    PlannerWorker,
)

LIMIT_S = 300.0  # of a wait that ends with an error; a busy machine is slow
LONG_AGO_S = 2 * FIRST_ANSWER * ANSWER_TIMEOUT_S  # longer than any answer may take


@pytest.fixture
def one() -> PlanningProblem:
    return random_problem(np.random.default_rng(7), 6, 16)


@pytest.fixture
def start() -> Iterator[Callable[..., PlannerWorker]]:
    workers = []

    def started(script: str = "", **more: float) -> PlannerWorker:
        command = [sys.executable, "-c", script] if script else COMMAND
        workers.append(PlannerWorker(command, **more))
        return workers[-1]

    yield started
    for worker in workers:
        worker.close()


def wait_for(what: Callable[[], object]) -> object:
    deadline = time.monotonic() + LIMIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.005)
    return found


def answer(worker: PlannerWorker) -> Answer:
    found = wait_for(worker.poll)
    assert isinstance(found, Answer)
    return found


def test_the_plan_is_the_solvers(start: Callable[..., PlannerWorker], one: PlanningProblem) -> None:
    worker = start()
    worker.submit(one)
    got, expected = answer(worker), solve(one)
    assert got.outcome == "solved"
    assert got.plan.units == expected.units
    assert got.plan.step_time_s == expected.step_time_s
    assert worker.counts == {"solved": 1} and not worker.busy


def test_a_plan_in_force_is_known_by_its_number(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    worker = start()
    worker.submit(one)
    first = answer(worker)
    worker.submit(one, in_force=first.number)
    again = answer(worker)
    assert again.outcome in ("reused", "repaired") or first.plan.paused.any()
    worker.submit(one, in_force=999)
    assert answer(worker).outcome == "cached"


def growing(pages: int) -> PlanningProblem:
    units = tuple(Unit(f"r{n}", 100 + pages, growth_pages_per_layer=4 - pages) for n in range(6))
    return PlanningProblem(16, 8000, 1e-3, 1e-7, units)


def test_growth_within_the_window_keeps_the_plan_in_force(
    start: Callable[..., PlannerWorker],
) -> None:
    worker = start()
    worker.submit(growing(0))
    first = answer(worker)
    for steps in (8, 16):
        worker.submit(growing(2), in_force=first.number, steps=steps)
        again = answer(worker)
        assert (again.outcome, again.number) == ("reused", first.number)
        assert again.plan is first.plan
    worker.submit(growing(2), in_force=first.number, steps=32)
    assert answer(worker).outcome != "reused"
    assert worker.counts["invalid"] == 0


def test_a_range_beyond_a_unit_that_has_lost_pages_is_no_error(
    start: Callable[..., PlannerWorker],
) -> None:
    worker = start()
    worker.submit(PlanningProblem(8, 100, 1e-3, 1e-6, (Unit("a", 10, present="all@0-20"),)))
    assert answer(worker).outcome == "solved"


def test_a_problem_that_cannot_be_read_costs_no_process(
    start: Callable[..., PlannerWorker], one: PlanningProblem, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start()
    worker.submit(replace(one, layers=-3))
    wait_for(lambda: worker.poll() or worker.counts["invalid"])
    assert "no plan that can be used: ValueError" in caplog.text
    worker.submit(one)
    answer(worker)
    assert worker.counts == {"invalid": 1, "solved": 1}


def test_the_last_words_of_a_process_are_heard(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    script = (
        "import sys; from orbitflow_sglang.planner.worker import serve\n"
        "serve([sys.stdin.buffer.readline()], sys.stdout.buffer)"
    )
    worker = start(script)
    worker.submit(one)
    assert len(answer(worker).plan.units) == 6


def test_a_problem_that_waits_is_replaced_by_the_next(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    worker = start()
    other = random_problem(np.random.default_rng(8), 3, 16)
    worker.submit(one)
    worker.submit(one)
    worker.submit(other)
    assert worker.counts["late"] == 1
    assert len(answer(worker).plan.units) == 6
    assert len(answer(worker).plan.units) == 3


def test_a_large_problem_does_not_block_the_caller(start: Callable[..., PlannerWorker]) -> None:
    """More than a pipe holds, to a process that does not read."""
    worker = start("import time; time.sleep(60)")
    units = random_problem(np.random.default_rng(0), 3000, 8).units
    large = PlanningProblem(8, 10**6, 1e-3, 1e-6, units)
    assert len(orjson.dumps(problem_as_json(large))) > 1 << 16
    worker.submit(large)
    assert worker.poll() is None and worker.busy


def test_a_killed_worker_is_replaced(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    worker = start()
    worker.submit(one)
    answer(worker)
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    wait_for(lambda: worker.poll() or worker.counts["failed"])
    worker.submit(one)
    assert len(answer(worker).plan.units) == 6
    assert (worker.counts["failed"], worker.counts["restarts"]) == (1, 1)


def test_a_hung_worker_is_replaced(
    start: Callable[..., PlannerWorker], one: PlanningProblem, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start("import time; time.sleep(600)", answer_timeout_s=0.05)
    worker.submit(one)
    process = worker._process
    assert process is not None
    wait_for(lambda: worker.poll() or worker.counts["failed"])
    wait_for(lambda: worker.poll() or process.returncode is not None)
    assert not worker.busy
    assert "planner has not answered for 0.15 s: replaced in 0.5 s" in caplog.text


def test_a_worker_that_is_slow_to_start_does_not_hang(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    worker = start()
    worker.submit(one)
    assert worker._asked is not None
    worker._asked.moved_s -= 2 * ANSWER_TIMEOUT_S  # at its imports
    answer(worker)
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGSTOP)
    worker.submit(one)
    worker._asked.moved_s -= 2 * ANSWER_TIMEOUT_S
    wait_for(lambda: worker.poll() or worker.counts["failed"])
    assert worker.counts["failed"] == 1


def test_an_answer_that_nobody_looked_at_is_no_hang(
    start: Callable[..., PlannerWorker], one: PlanningProblem
) -> None:
    worker = start()
    worker.submit(one)
    assert worker._process is not None and worker._asked is not None
    select.select([worker._process.stdout], [], [], LIMIT_S)
    worker._asked.moved_s -= LONG_AGO_S  # all fitted the device, so nobody asked
    worker.submit(one)
    for _ in range(2):
        answer(worker)
    assert worker.counts["failed"] == 0 and not worker.busy


def test_a_worker_that_waits_for_the_rest_of_a_problem_does_not_hang(
    start: Callable[..., PlannerWorker],
) -> None:
    worker = start("import sys; sys.stdin.buffer.read()")
    units = random_problem(np.random.default_rng(0), 3000, 8).units
    worker.submit(PlanningProblem(8, 10**6, 1e-3, 1e-6, units))
    assert worker._process is not None and worker._asked is not None
    select.select([], [worker._process.stdin], [], LIMIT_S)  # it has taken what there was
    worker._asked.moved_s -= LONG_AGO_S
    assert worker._input and worker.poll() is None
    assert worker.counts["failed"] == 0 and worker.busy


def test_a_worker_that_cannot_start_is_tried_again_and_never_raises(one: PlanningProblem) -> None:
    worker = PlannerWorker(["/nowhere/python"])
    worker.submit(one)
    assert worker.poll() is None
    assert worker.counts["failed"] == 1 and worker.busy
    wait_for(lambda: worker.poll() or worker.counts["restarts"])
    assert worker.counts["failed"] == 2
    worker.close()


ECHO = "import sys, orjson\nfor line in sys.stdin.buffer:\n    q = orjson.loads(line)\n"
NONSENSE = {
    "no JSON": "print('HiGHS says hello', flush=True)",
    "another number": "print('{\"number\": -1}', flush=True)",
    "nothing in it": "print('{\"number\": %d}' % q['number'], flush=True)",
    "a list": "print('[1, 2]', flush=True)",
    "everything resident": (
        "p = q['problem']; u = len(p['units'])\n"
        "    z = '0' * (8 * u * p['layers'])\n"
        "    print(orjson.dumps({'number': q['number'], 'outcome': 'solved', 'offloaded': z,"
        " 'paused': [False] * u, 'status': 'optimal', 'step_time_s': 1, 'lower_bound_s': 1,"
        " 'never_fits': [], 'solve_s': 0}).decode(), flush=True)"
    ),
    "an outcome of its own": (
        'print(\'{"number": %d, "outcome": ["x"], "status": "optimal"}\' % q[\'number\'],'
        " flush=True)"
    ),
    "reused without a plan": (
        'print(\'{"number": %d, "outcome": "reused", "status": "optimal"}\' % q[\'number\'],'
        " flush=True)"
    ),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_nonsensical_answer_is_discarded(kind: str, start: Callable[..., PlannerWorker]) -> None:
    tight = random_problem(np.random.default_rng(7), 6, 16, tightness=(0.5, 0.6))
    worker = start(ECHO + "    " + NONSENSE[kind])
    worker.submit(tight)
    wait_for(lambda: worker.poll() or worker.counts["invalid"])
    assert worker.counts == {"invalid": 1} and not worker.busy


def test_the_process_ends_with_its_input(one: PlanningProblem) -> None:
    question = orjson.dumps({"number": 1, "problem": problem_as_json(one), "in_force": None})
    run = subprocess.run(
        COMMAND, input=question + b"\n", capture_output=True, timeout=LIMIT_S, check=True
    )
    (line,) = run.stdout.splitlines()
    assert orjson.loads(line)["number"] == 1


def test_planning_imports_neither_torch_nor_sglang() -> None:
    script = (
        "import sys, orbitflow_sglang.planner.worker\n"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LIMIT_S)
