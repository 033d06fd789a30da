"""The process that plans one step ahead, and the scheduler's end of it.

A process of its own: neither the interpreter's lock nor a crash of the solver touches the
scheduler. Requests and answers are lines of JSON over a pipe; the process ends when its
input does, so it never outlives the scheduler. Nothing here blocks the scheduler, and no
answer is believed before ``plan_faults`` has passed it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, get_args

import numpy as np
import orjson

from orbitflow_sglang.planner.evaluation import Memory, plan_faults
from orbitflow_sglang.planner.incremental import IncrementalPlanner, Outcome
from orbitflow_sglang.planner.problem import Plan, PlanningProblem, Status
from orbitflow_sglang.planner.problem_file import parse_problem, problem_as_json

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "orbitflow_sglang.planner.worker")
ANSWER_TIMEOUT_S = 5.0  # then the worker hangs, and is replaced
FIRST_ANSWER = 3  # times as long: on a busy machine its imports take seconds
FIRST_RESTART_S, LAST_RESTART_S = 0.5, 60.0  # pause before a restart: doubled each time
READ_BYTES = 1 << 16
MAX_ANSWER_BYTES = 1 << 26
REMEMBERED_PLANS = 16  # of which one may be in force
ROUNDING = 1e-9  # a step at its bound may come out below it
NICENESS = 5  # below the scheduler, which must not wait for a core


@dataclass(frozen=True)
class Answer:
    """A plan from the worker that fits the problem it was made for.

    ``reused``: it is the plan in force, with that plan's number.
    """

    number: int  # names the plan to the worker
    plan: Plan
    outcome: Outcome


class PlannerWorker:
    """The scheduler's end. Calls return at once; ``counts`` has what came of them: answers by
    outcome, ``late`` (a problem that the next one replaced before the worker was free),
    ``failed`` (a process that ended or hung), ``invalid`` answers, and ``restarts``."""

    def __init__(
        self, command: Sequence[str] = COMMAND, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._command = list(command)
        self._timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._has_answered = False
        self._restart_s, self._restart_at = FIRST_RESTART_S, 0.0
        self._number = 0
        self._waiting: _Question | None = None  # not sent yet: the worker is busy
        self._asked: _Question | None = None
        self._input, self._output = bytearray(), bytearray()
        self._plans: OrderedDict[int, Plan] = OrderedDict()  # the last ones, by number
        self._ended: list[subprocess.Popen[bytes]] = []  # killed, to be reaped
        self._closed = False
        self._start()

    def submit(self, problem: PlanningProblem, in_force: int | None = None, steps: int = 1) -> None:
        """Ask for a plan. A problem that still waits for the worker is replaced by this one.

        ``in_force`` is the number of the answer that the engine runs with, when it does, and
        for how many ``steps``: the worker then changes that plan as little as can be.
        """
        if self._waiting is not None:
            self.counts["late"] += 1
        self._number += 1
        self._waiting = _Question(self._number, problem, in_force, steps)
        self._move()

    def poll(self) -> Answer | None:
        """The answer that has come, if any. Also looks after the process."""
        answer = self._receive() if self._process is not None else None
        self._move()
        # Only here, behind a look for its answer: while all fits the device, nobody looks.
        patience_s = self._timeout_s * (1 if self._has_answered else FIRST_ANSWER)
        if self._asked is not None and time.monotonic() - self._asked.moved_s > patience_s:
            self._failed(f"has not answered for {patience_s:g} s")
        return answer

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding or a problem waits."""
        return self._asked is not None or self._waiting is not None

    def close(self) -> None:
        """End the process, and wait until it has ended."""
        self._closed = True
        self._stop()
        for process in self._ended:
            process.wait()

    # --- the process ------------------------------------------------------------

    def _start(self) -> None:
        self._input.clear()
        self._output.clear()
        self._asked = None
        self._has_answered = False
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            self._failed(f"cannot start ({error})")
            return
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._ended.append(process)
        self._reap()

    def _reap(self) -> None:
        self._ended = [process for process in self._ended if process.poll() is None]

    def _failed(self, what: str) -> None:
        """The process is of no use any more: replace it, after a pause."""
        self.counts["failed"] += 1
        logger.warning(
            "OrbitFlow's planner %s: replaced in %.1f s; plans are simpler ones until then",
            what, self._restart_s,
        )  # fmt: skip
        self._stop()
        self._asked = None
        self._restart_at = time.monotonic() + self._restart_s
        self._restart_s = min(2 * self._restart_s, LAST_RESTART_S)

    # --- moving bytes -----------------------------------------------------------

    def _move(self) -> None:
        self._reap()
        if self._process is None:
            if self._closed or time.monotonic() < self._restart_at:
                return
            self.counts["restarts"] += 1
            self._start()
            if self._process is None:
                return
        if self._asked is None and self._waiting is not None:
            self._asked, self._waiting = self._waiting, None
            self._asked.moved_s = time.monotonic()
            self._input += self._asked.line()
        if self._input:
            self._send(self._process)

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        try:
            sent = os.write(process.stdin.fileno(), self._input)
        except BlockingIOError:
            return
        except OSError as error:
            self._failed(f"takes no question ({error})")
            return
        del self._input[:sent]
        if self._asked is not None:
            self._asked.moved_s = time.monotonic()

    def _receive(self) -> Answer | None:
        assert self._process is not None and self._process.stdout is not None
        ended = False
        while not ended:
            try:
                read = os.read(self._process.stdout.fileno(), READ_BYTES)
            except BlockingIOError:
                break
            self._output += read
            ended = not read or len(self._output) > MAX_ANSWER_BYTES
        *lines, rest = self._output.split(b"\n")
        self._output = bytearray(rest)
        answer = None
        for line in lines:
            answer = self._answer(bytes(line)) or answer
        if ended:
            self._failed("has ended")
        return answer

    def _answer(self, line: bytes) -> Answer | None:
        if self._asked is None:
            self.counts["invalid"] += 1
            return None
        asked, self._asked = self._asked, None
        self._has_answered = True
        try:
            answer = _read_answer(line, asked, self._plans)
        except (ValueError, KeyError, TypeError) as error:
            self.counts["invalid"] += 1
            logger.warning("OrbitFlow's planner gave no plan that can be used: %r", error)
            return None
        self.counts[answer.outcome] += 1
        self._restart_s = FIRST_RESTART_S
        _remember(self._plans, answer.number, answer.plan)
        return answer


@dataclass
class _Question:
    number: int
    problem: PlanningProblem
    in_force: int | None
    steps: int
    moved_s: float = 0.0  # when the worker last took some of it

    def line(self) -> bytes:
        values = {
            "number": self.number,
            "problem": problem_as_json(self.problem),
            "in_force": self.in_force,
            "steps": self.steps,
        }
        return orjson.dumps(values) + b"\n"


def _remember(plans: OrderedDict[int, Plan], number: int, plan: Plan) -> None:
    plans[number] = plan
    plans.move_to_end(number)
    if len(plans) > REMEMBERED_PLANS:
        plans.popitem(last=False)


def _read_answer(line: bytes, asked: _Question, plans: OrderedDict[int, Plan]) -> Answer:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything but a usable plan.

    What follows from the placement is computed here, not believed.
    """
    values, problem = orjson.loads(line), asked.problem
    if values["number"] != asked.number:
        raise ValueError("an answer to another question")
    if "error" in values:
        raise ValueError(values["error"])
    outcome, status = values["outcome"], values["status"]
    if outcome not in get_args(Outcome) or status not in get_args(Status):
        raise ValueError(f"{outcome}, {status}")
    if outcome == "reused":
        if asked.in_force is None:
            raise ValueError("no plan is in force")
        return Answer(asked.in_force, plans[asked.in_force], outcome)
    shape = (len(problem.units), problem.layers)
    placement = np.frombuffer(bytes.fromhex(values["offloaded"]), dtype="<i4").reshape(shape)
    placement = placement.astype(np.int64)
    paused = np.array(values["paused"], dtype=bool)
    if faults := plan_faults(problem, placement, paused):
        raise ValueError(faults[0])
    step, bound = float(values["step_time_s"]), float(values["lower_bound_s"])
    if not 0 <= bound <= step * (1 + ROUNDING) < np.inf:
        raise ValueError(f"a step of {step} s above a bound of {bound}")
    memory = Memory.of(problem, ~paused)
    loads = placement[~paused].sum(axis=0)
    plan = Plan(
        problem=problem,
        offloaded=placement,
        paused=paused,
        fits=True,
        status=status,
        step_time_s=step,
        lower_bound_s=bound,
        arena_pages_used=memory.total + memory.tails - int(loads.sum()),
        ring_pages=memory.ring(loads) if problem.ring_pages is None else problem.ring_pages,
        never_fits=tuple(values["never_fits"]),
        solve_s=float(values["solve_s"]),
    )
    return Answer(asked.number, plan, outcome)


def _written_answer(number: int, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    return {
        "number": number,
        "outcome": outcome,
        "status": plan.status,
        "offloaded": plan.offloaded.astype("<i4").tobytes().hex(),  # faster than a list
        "paused": plan.paused.tolist(),
        "step_time_s": plan.step_time_s,
        "lower_bound_s": plan.lower_bound_s,
        "never_fits": plan.never_fits,
        "solve_s": plan.solve_s,
    }


def serve(requests: Iterable[bytes], answers: BinaryIO) -> None:
    """Answer requests until there are no more; one that cannot be answered gets its error."""
    planner = IncrementalPlanner()
    answered: OrderedDict[int, Plan] = OrderedDict()
    for line in requests:
        request = orjson.loads(line)
        try:
            answer = _answer(planner, answered, request)
        except Exception as error:  # the next request may be a better one
            answer = {"number": request["number"], "error": repr(error)}
        answers.write(orjson.dumps(answer) + b"\n")
        answers.flush()


def _answer(
    planner: IncrementalPlanner, answered: OrderedDict[int, Plan], request: dict[str, Any]
) -> dict[str, Any]:
    problem = parse_problem(request["problem"], clip=True)
    planner.plan, planner.steps = answered.get(request["in_force"]), 0
    plan, outcome = planner.update(problem, request["steps"])
    if outcome != "reused":
        _remember(answered, request["number"], plan)
    return _written_answer(request["number"], plan, outcome)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    # HiGHS now and then prints to file descriptor 1, which is the pipe of answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
