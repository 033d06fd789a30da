"""Many requests at once, of which some are given up in every way that clients have."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from servers import FULL, Stock, give_up_midway, set_internal_state

from eval.client import Client, Generation, Request, RequestFailed
from eval.identity import Comparison, compare, mixed_requests

STYLE = "llama"
DEPOSIT = {"custom_params": {"orbitflow": {"deposit": True}}}


def storm_requests() -> list[Request]:
    """Short ones and longer ones, a part with a prefix in common.

    No id is the beginning of another: SGLang aborts by prefix.
    """
    chance = random.Random(3)
    made = mixed_requests(
        200 if FULL else 64,
        seed=21,
        shortest=30,
        longest=500,
        max_new_tokens=48,
        shared_fraction=0.3,
    )
    return [
        replace(request, rid=f"storm-{index:03}", max_new_tokens=chance.randint(8, 48))
        for index, request in enumerate(made)
    ]


STORM = storm_requests()
# 8 that grow together from 1,600 tokens to 2,560.
GROWING = mixed_requests(8, seed=22, shortest=200, longest=200, max_new_tokens=120)
# Never held, and long enough to outgrow whatever the short ones leave of 1,900 tokens.
(FREE,) = mixed_requests(1, seed=23, shortest=200, longest=200, max_new_tokens=400)
FREE = replace(FREE, rid="free")
FILLING = mixed_requests(24, seed=24, shortest=72, longest=72, max_new_tokens=8)
# Those that grow and long prompts, for several times the memory of test_faults.py.
GROWN = mixed_requests(8, seed=25, shortest=32, longest=32, max_new_tokens=280)
LONG = mixed_requests(3, seed=26, shortest=500, longest=600, max_new_tokens=8)
ALL = [*STORM, *GROWING, FREE, *FILLING, *GROWN, *LONG]


_runs = count(1)


@dataclass
class Calm:
    """What is left of a storm."""

    generations: dict[str, Generation] = field(default_factory=dict)
    cut_short: set[str] = field(default_factory=set)
    refused: dict[str, RequestFailed] = field(default_factory=dict)

    def compared(self, stock: Sequence[Generation]) -> Comparison:
        """With stock SGLang's answers; what was cut short as far as it came."""
        expected = [one for one in stock if one.rid in self.generations]
        found = [self.generations[one.rid] for one in expected]
        return compare(expected, found, cut_short=self.cut_short)

    @property
    def endings(self) -> Counter[str | None]:
        return Counter(one.finish_reason for one in self.generations.values())


def run_storm(client: Client, wanted: Sequence[Request], seed: int, give_up: bool = True) -> Calm:
    """Sends all at once; with ``give_up`` a third is aborted or hung up on, by their number."""
    calm, lock, run = Calm(), threading.Lock(), next(_runs)

    def one(index: int, request: Request) -> None:
        chance = random.Random(f"{seed}-{request.rid}")
        fate = index % 9 if give_up else 3 + index % 3
        if fate in (0, 1, 2):
            with lock:
                calm.cut_short.add(request.rid)
        # SGLang aborts the id of a stream once more 2 s after its end, so none is used twice.
        sent = replace(request, rid=f"{run}-{request.rid}")
        try:
            found = replace(_fated(client, sent, fate, chance), rid=request.rid)
        except RequestFailed as refusal:
            with lock:
                calm.refused[request.rid] = refusal
            return
        with lock:
            calm.generations[request.rid] = found

    with ThreadPoolExecutor(len(wanted)) as pool:
        for future in [pool.submit(one, i, request) for i, request in enumerate(wanted)]:
            future.result()
    return calm


def _fated(client: Client, request: Request, fate: int, chance: random.Random) -> Generation:
    options: dict[str, Any] = {"rid": request.rid}
    if fate in (0, 1):
        return give_up_midway(client, request, disconnect=fate == 1)
    if fate == 2:  # aborted at some time, most often before its turn
        timer = threading.Timer(chance.uniform(0.2, 4.0), client.abort, [request.rid])
        timer.start()
        try:
            return client.generate(request.input_ids, request.max_new_tokens, **options)
        finally:
            timer.join()
    if fate in (3, 4):
        options |= DEPOSIT if fate == 3 else {}
        *_, last = client.stream(request.input_ids, request.max_new_tokens, **options)
        return last
    return client.generate(request.input_ids, request.max_new_tokens, **options)


def control_of(client: Client) -> dict[str, Any]:
    """What the controller says of itself."""
    (state,) = client.orbitflow()
    assert state is not None
    control: dict[str, Any] = state["control"]
    return control


def wait_until_paused(client: Client, number: int) -> None:
    """Returns when at least so many requests are paused."""
    deadline = time.monotonic() + 120
    while control_of(client)["paused"] < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {number} paused: {control_of(client)}")
        time.sleep(0.05)


class Held:
    """Requests that stay paused until they are let go."""

    def __init__(
        self, server: Client, wanted: Sequence[Request], at_least: int | None = None
    ) -> None:
        self.server, self.wanted = server, wanted
        self._at_least = len(wanted) if at_least is None else at_least
        self._pool = ThreadPoolExecutor(len(wanted))
        self.answers: dict[str, Future[Generation]] = {}

    def __enter__(self) -> Held:
        set_internal_state(self.server, "orbitflow_hold", 1)
        for request in self.wanted:
            self.answers[request.rid] = self._pool.submit(
                self.server.generate, request.input_ids, request.max_new_tokens, rid=request.rid
            )
        try:
            wait_until_paused(self.server, self._at_least)
        except TimeoutError:
            self.__exit__()
            raise
        return self

    def let_go(self) -> None:
        set_internal_state(self.server, "orbitflow_hold", 0)

    def __exit__(self, *args: object) -> None:
        self.let_go()
        self.server.post("/continue_generation", {})
        self._pool.shutdown()

    def assert_answered(self, stock: Stock, besides: str | None = None) -> None:
        wanted = [request.rid for request in self.wanted if request.rid != besides]
        expected = {one.rid: one for one in stock.answers(STYLE, ALL)}
        found = [self.answers[rid].result() for rid in wanted]
        result = compare([expected[rid] for rid in wanted], found)
        assert not result.failures, result
