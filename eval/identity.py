"""Token identity: does a server say what stock SGLang says, and on what requests we ask.

Greedy decoding in float32 is deterministic up to rounding, which depends on how requests
are batched. Two runs are identical when all token ids are equal and all logprobs are
within 1e-4 of each other; stock SGLang against itself stays within 5e-5. One difference
is innocent: where the reference's own two best tokens lie closer than that tolerance,
rounding decides between them, and what follows is another text. Such ties are counted,
the rest of that request is not compared, and more than 1 % of them is a failure.
"""

from __future__ import annotations

import json
import math
import platform
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path

from eval.client import Generation, Request

LOGPROB_TOLERANCE = 1e-4
MAX_TIE_FRACTION = 0.01  # of the compared requests
FIRST_ORDINARY_TOKEN = 3  # below are the tiny model's three special tokens


@dataclass(frozen=True)
class Comparison:
    """The outcome for a list of requests; ``+`` adds up several lists."""

    requests: int = 0
    tokens: int = 0  # compared, those at and after a tie not included
    ties: int = 0  # requests whose comparison a tie ended
    max_drift: float = 0.0  # largest logprob difference of equal tokens
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Something was compared, nothing differed, and ties are at most 1 % of requests."""
        return self.tokens > 0 and not self.failures and not self.too_many_ties

    @property
    def too_many_ties(self) -> bool:
        return self.ties > MAX_TIE_FRACTION * self.requests

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            requests=self.requests + other.requests,
            tokens=self.tokens + other.tokens,
            ties=self.ties + other.ties,
            max_drift=max(self.max_drift, other.max_drift),
            failures=self.failures + other.failures,
        )

    def __str__(self) -> str:
        summary = (
            f"{self.requests} requests, {self.tokens} tokens, {self.ties} ties, "
            f"largest logprob difference {self.max_drift:.1e}, {len(self.failures)} failures"
        )
        return "\n  ".join([summary, *self.failures])


def compare(
    reference: Sequence[Generation],
    candidate: Sequence[Generation],
    *,
    tolerance: float = LOGPROB_TOLERANCE,
    cut_short: Collection[str] = (),
    ids_only: bool = False,
) -> Comparison:
    """Compares pairwise, in order.

    ``cut_short`` names the requests that were aborted on purpose: of these the tokens that
    the candidate has are compared, however few. Both sides need logprobs, the reference
    its top-2 gaps too; with ``ids_only`` the candidate needs none.
    """
    if [one.rid for one in reference] != [one.rid for one in candidate]:
        raise ValueError("reference and candidate are not the same requests in the same order")
    total = Comparison()
    for expected, got in zip(reference, candidate, strict=True):
        if ids_only:
            count = len(got.output_ids)
            got = replace(got, logprobs=(*expected.logprobs, *[math.nan] * count)[:count])
        total += _compare_one(expected, got, tolerance, got.rid in cut_short)
    return total


def assert_identical(
    reference: Sequence[Generation],
    candidate: Sequence[Generation],
    *,
    tolerance: float = LOGPROB_TOLERANCE,
    cut_short: Collection[str] = (),
) -> Comparison:
    """``compare``, with an ``AssertionError`` that tells what differs."""
    result = compare(reference, candidate, tolerance=tolerance, cut_short=cut_short)
    if not result.ok:
        raise AssertionError(f"not identical: {result}")
    return result


def first_drift(one: Sequence[Generation], other: Sequence[Generation]) -> float:
    """Largest logprob difference before two texts of a request part."""
    drift = 0.0
    for a, b in zip(one, other, strict=True):
        tokens = zip_longest(a.output_ids, b.output_ids)
        same = next((i for i, (x, y) in enumerate(tokens) if x != y), len(a.output_ids))
        pairs = zip(a.logprobs[:same], b.logprobs[:same], strict=True)
        drift = max([drift, *(abs(x - y) for x, y in pairs)])
    return drift


def _compare_one(
    expected: Generation, got: Generation, tolerance: float, cut_short: bool
) -> Comparison:
    for one, needed in ((expected, (expected.logprobs, expected.gaps)), (got, (got.logprobs,))):
        if any(len(values) != len(one.output_ids) for values in needed):
            raise ValueError(f"{one.rid}: a logprob (and gap) for each output token is needed")
    drift = 0.0
    for at, (want, have) in enumerate(zip(expected.output_ids, got.output_ids, strict=False)):
        difference = abs(expected.logprobs[at] - got.logprobs[at])
        if want != have:
            # At a true tie the other token is as likely, so its logprob is as close as two
            # tolerances: the gap, and rounding. Anything else only happens to be at a tie.
            if expected.gaps[at] < tolerance and difference <= 2 * tolerance:
                return Comparison(1, at, ties=1, max_drift=drift)
            failure = (
                f"{got.rid}: token {at} is {have} instead of {want}; gap of the reference's "
                f"two best {expected.gaps[at]:.1e}, logprobs differ by {difference:.1e}"
            )
            return Comparison(1, at, max_drift=drift, failures=(failure,))
        drift = max(drift, difference) if not math.isnan(difference) else math.inf
        if not difference <= tolerance:  # NaN is no agreement
            failure = f"{got.rid}: logprob of token {at} differs by {difference:.1e}"
            return Comparison(1, at, max_drift=drift, failures=(failure,))
    tokens = min(len(expected.output_ids), len(got.output_ids))
    failure = _ending_differs(expected, got, cut_short)
    return Comparison(1, tokens, max_drift=drift, failures=(failure,) if failure else ())


def _ending_differs(expected: Generation, got: Generation, cut_short: bool) -> str:
    wanted, had = len(expected.output_ids), len(got.output_ids)
    if cut_short and had <= wanted:
        return ""
    if had != wanted:
        return f"{got.rid}: {had} tokens instead of {wanted} ({got.finish_reason})"
    if got.finish_reason != expected.finish_reason:
        return f"{got.rid}: ended by {got.finish_reason} instead of {expected.finish_reason}"
    return ""


def mixed_requests(
    n: int,
    seed: int,
    *,
    shortest: int = 4,
    longest: int = 2300,
    max_new_tokens: int = 64,
    vocab: int = 2048,
    shared_fraction: float = 0.0,
    shared_prefixes: int = 2,
    shared_tokens: int | None = None,
) -> list[Request]:
    """Seeded prompts of ``shortest`` to ``longest`` random tokens, lengths log-uniform.

    ``shared_fraction`` of them (rounded) begin with one of ``shared_prefixes`` common
    prefixes of ``shared_tokens`` (default: half of ``longest``), so that they hit the radix
    cache; a prompt too short for the prefix takes a part of it and one token of its own.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"need 1 <= shortest <= longest, got {shortest} and {longest}")
    chance = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(FIRST_ORDINARY_TOKEN, vocab) for _ in range(count)]

    prefixes = [tokens(shared_tokens or longest // 2) for _ in range(shared_prefixes)]
    sharing = set(chance.sample(range(n), round(n * shared_fraction)))
    requests = []
    for index in range(n):
        length = round(math.exp(chance.uniform(math.log(shortest), math.log(longest))))
        head = chance.choice(prefixes)[: length - 1] if index in sharing else []
        prompt = tuple(chain(head, tokens(length - len(head))))
        requests.append(Request(f"s{seed}-{index}", prompt, max_new_tokens))
    return requests


def write_summary(path: Path, cells: Mapping[str, Comparison], command: str) -> None:
    """Writes what was compared, cell by cell, with how to repeat it, as JSON."""
    total = sum(cells.values(), Comparison())
    summary = {
        "command": command,
        "machine": {"processor": _processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("orbitflow-sglang", "sglang", "torch")},
        "tolerance": LOGPROB_TOLERANCE,
        "total": _row(total),
        "cells": {name: _row(cell) for name, cell in sorted(cells.items())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _row(cell: Comparison) -> dict[str, int | float | bool]:
    return {
        "requests": cell.requests,
        "tokens": cell.tokens,
        "ties": cell.ties,
        "max_drift": float(f"{cell.max_drift:.1e}"),
        "failures": len(cell.failures),
        "ok": cell.ok,
    }


def _processor() -> str:
    """The processor's model where Linux tells it; ``platform`` only knows the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
