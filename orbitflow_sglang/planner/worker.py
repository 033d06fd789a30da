"""The process that plans one step ahead, and the scheduler's end of it.

A process of its own: neither the interpreter's lock nor a crash of the solver touches the
scheduler. Requests and answers are lines of JSON over a pipe; the process ends when its
input does, so it never outlives the scheduler. Nothing here blocks the scheduler, and no
answer is believed before ``plan_faults`` has passed it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import orjson

from orbitflow_sglang.planner.evaluation import plan_faults
from orbitflow_sglang.planner.incremental import IncrementalPlanner, Outcome
from orbitflow_sglang.planner.problem import Plan, PlanningProblem
from orbitflow_sglang.planner.problem_file import parse_problem, problem_as_json

COMMAND = (sys.executable, "-m", "orbitflow_sglang.planner.worker")
ANSWER_TIMEOUT_S = 5.0  # then the worker hangs, and is replaced
FIRST_RESTART_S, LAST_RESTART_S = 0.5, 60.0  # pause before a restart: doubled each time
READ_BYTES = 1 << 16
MAX_ANSWER_BYTES = 1 << 26
REMEMBERED_PLANS = 16  # of which one may be in force
NICENESS = 5  # below the scheduler, which must not wait for a core


@dataclass(frozen=True)
class Answer:
    """A plan from the worker that fits the problem it was made for."""

    number: int  # names the plan to the worker
    plan: Plan
    outcome: Outcome


class PlannerWorker:
    """The scheduler's end. Calls return at once; ``counts`` has what came of them:
    answers by outcome, and ``late``, ``failed``, ``invalid``, ``restarts``."""

    def __init__(
        self, command: Sequence[str] = COMMAND, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._command = list(command)
        self._timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._restart_s, self._restart_at = FIRST_RESTART_S, 0.0
        self._number = 0
        self._waiting: _Question | None = None  # not sent yet: the worker is busy
        self._asked: _Question | None = None
        self._input, self._output = bytearray(), bytearray()
        self._closed = False
        self._start()

    def submit(self, problem: PlanningProblem, in_force: int | None = None) -> None:
        """Ask for a plan. A problem that still waits for the worker is replaced by this one.

        ``in_force`` is the number of the answer that the engine runs with, when it does:
        the worker then changes that plan as little as can be.
        """
        if self._waiting is not None:
            self.counts["late"] += 1
        self._number += 1
        self._waiting = _Question(self._number, problem, in_force)
        self._move()

    def poll(self) -> Answer | None:
        """The answer that has come, if any. Also looks after the process."""
        answer = self._receive() if self._process is not None else None
        self._move()
        return answer

    @property
    def busy(self) -> bool:
        """Whether an answer is outstanding or a problem waits."""
        return self._asked is not None or self._waiting is not None

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._stop()

    # --- the process ------------------------------------------------------------

    def _start(self) -> None:
        self._input.clear()
        self._output.clear()
        self._asked = None
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError:
            self._failed()
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
        process.wait()

    def _failed(self) -> None:
        """The process is of no use any more: replace it, after a pause."""
        self.counts["failed"] += 1
        self._stop()
        self._asked = None
        self._restart_at = time.monotonic() + self._restart_s
        self._restart_s = min(2 * self._restart_s, LAST_RESTART_S)

    # --- moving bytes -----------------------------------------------------------

    def _move(self) -> None:
        if self._process is None:
            if self._closed or time.monotonic() < self._restart_at:
                return
            self.counts["restarts"] += 1
            self._start()
            if self._process is None:
                return
        if self._asked is not None and time.monotonic() - self._asked.sent_s > self._timeout_s:
            self._failed()
            return
        if self._asked is None and self._waiting is not None:
            self._asked, self._waiting = self._waiting, None
            self._asked.sent_s = time.monotonic()
            self._input += self._asked.line()
        if self._input:
            self._send(self._process)

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        try:
            sent = os.write(process.stdin.fileno(), self._input)
        except BlockingIOError:
            return
        except OSError:
            self._failed()
            return
        del self._input[:sent]

    def _receive(self) -> Answer | None:
        assert self._process is not None and self._process.stdout is not None
        while True:
            try:
                read = os.read(self._process.stdout.fileno(), READ_BYTES)
            except BlockingIOError:
                break
            if not read or len(self._output) > MAX_ANSWER_BYTES:
                self._failed()
                return None
            self._output += read
        *lines, rest = self._output.split(b"\n")
        self._output = bytearray(rest)
        answer = None
        for line in lines:
            answer = self._answer(bytes(line)) or answer
        return answer

    def _answer(self, line: bytes) -> Answer | None:
        if self._asked is None:
            self.counts["invalid"] += 1
            return None
        asked, self._asked = self._asked, None
        try:
            answer = _read_answer(line, asked)
        except (ValueError, KeyError, TypeError):
            self.counts["invalid"] += 1
            return None
        self.counts[answer.outcome] += 1
        self._restart_s = FIRST_RESTART_S
        return answer


@dataclass
class _Question:
    number: int
    problem: PlanningProblem
    in_force: int | None
    sent_s: float = 0.0

    def line(self) -> bytes:
        problem = problem_as_json(self.problem)
        values = {"number": self.number, "problem": problem, "in_force": self.in_force}
        return orjson.dumps(values) + b"\n"


def _read_answer(line: bytes, asked: _Question) -> Answer:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` for anything but a usable plan."""
    values, problem = orjson.loads(line), asked.problem
    if values["number"] != asked.number:
        raise ValueError("an answer to another question")
    shape = (len(problem.units), problem.layers)
    offloaded = np.frombuffer(bytes.fromhex(values["offloaded"]), dtype="<i4").reshape(shape)
    paused = np.array(values["paused"], dtype=bool)
    placement = offloaded.astype(np.int64)
    if faults := plan_faults(problem, placement, paused):
        raise ValueError(faults[0])
    plan = Plan(
        problem=problem,
        offloaded=placement,
        paused=paused,
        fits=values["fits"] is True,
        status=values["status"],
        step_time_s=float(values["step_time_s"]),
        lower_bound_s=float(values["lower_bound_s"]),
        arena_pages_used=int(values["arena_pages_used"]),
        ring_pages=int(values["ring_pages"]),
        never_fits=tuple(values["never_fits"]),
        solve_s=float(values["solve_s"]),
    )
    return Answer(asked.number, plan, values["outcome"])


def _written_answer(number: int, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    return {
        "number": number,
        "outcome": outcome,
        "offloaded": plan.offloaded.astype("<i4").tobytes().hex(),  # faster than a list
        "paused": plan.paused.tolist(),
        "fits": plan.fits,
        "status": plan.status,
        "step_time_s": plan.step_time_s,
        "lower_bound_s": plan.lower_bound_s,
        "arena_pages_used": plan.arena_pages_used,
        "ring_pages": plan.ring_pages,
        "never_fits": plan.never_fits,
        "solve_s": plan.solve_s,
    }


def serve(requests: Iterable[bytes], answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    planner = IncrementalPlanner()
    answered: OrderedDict[int, Plan] = OrderedDict()
    for line in requests:
        request = orjson.loads(line)
        problem = parse_problem(request["problem"])
        planner.plan = answered.get(request["in_force"])
        plan, outcome = planner.update(problem)
        answered[request["number"]] = plan
        if len(answered) > REMEMBERED_PLANS:
            answered.popitem(last=False)
        answers.write(orjson.dumps(_written_answer(request["number"], plan, outcome)) + b"\n")
        answers.flush()


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
