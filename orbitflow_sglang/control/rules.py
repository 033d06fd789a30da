"""The rules, one pure function each; a policy is a choice of them.

Why these and not others: ``docs/control.md``. Words: h, the pages that a step's compute
hides on the link; rho = h / arena; mu = decode seconds / prefill seconds at the memory limit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

HIDDEN_SHARE = 0.9  # of h: beyond 1.2 h everybody slows down
PACE_SHARE = 0.7  # of what prompts leave of the strictest pace, that steps may take that stream
LEAST_RHO = 0.03  # below, streaming admits nobody worth its trouble
LEAST_MU = 1.0  # below, prefill is the bottleneck and memory is not
URGENT_STEPS = 6  # so many steps before a deadline a request is urgent
GROWTH_STEPS = 8  # that an admission leaves room for
RELOAD_MARGIN = 2.0  # a pause has to cover so many reloads
COMMITTED_MARGIN = 1.5  # taking turns is not perfect: reloads, and turns that come late
AGEING_SHARE = 32  # one admission in so many goes to who has waited longest
MIN_CHUNK_TOKENS = 64
MAX_STEPS_BETWEEN_CHUNKS = 8
CHUNK_FLOORS = 1.25  # a chunk below so many times the least a forward pass takes is mostly wasted
PROMPTS_MU = 2.0  # below, prompts hold each other up more than memory does
PREFILL_SLOWDOWN = 1.4  # of prompts by the decode steps between their chunks
CHUNK_SHARE = 0.95  # of the gap that a chunk may take
RECOVERY_TOKENS = 64  # within so many a request may make up for a chunk, where it decodes faster


# --- streaming ------------------------------------------------------------------


def streaming_budget(hidden_pages: float, in_pace: float = math.inf, *, aside: bool = False) -> int:
    """Pages that a step streams so that more requests decode: what compute hides, never more,
    and only as many as leave those that decode their pace.

    An SLO with time to spare buys nothing here: a longer step slows down all that decode.
    """
    return 0 if aside else int(min(HIDDEN_SHARE * hidden_pages, in_pace))


def pages_in_pace(pace_s: float, mu: float, full_s: float, page_s: float) -> float:
    """Pages that a step may stream and leave the strictest pace, ``pace_s``, time for prompts.

    Prompts are 1 / (1 + ``mu``) of the work. ``full_s`` is the compute of a step with the arena
    full, ``page_s`` what a page adds to it. The GPU's memory sees a streamed page twice: written,
    and read.
    """
    spare_s = max(0.0, PACE_SHARE * (1 - 1 / (1 + mu)) * pace_s - full_s)
    return spare_s / (2 * page_s) if page_s > 0 else math.inf


def stands_aside(rho: float, mu: float) -> tuple[bool, bool]:
    """Whether not to stream to admit more, and whether not to pause for newcomers either.

    The more decode together, the more each chunk of a prompt holds up: where prompts are much
    of the work, admitting more costs as many as it gains.
    """
    return rho < LEAST_RHO or mu < PROMPTS_MU, mu < LEAST_MU


# --- pausing --------------------------------------------------------------------


class Candidate(NamedTuple):
    """A decoding request that could be paused."""

    rid: str
    pace_s: float  # its SLO; infinite: none
    deposit_s: float  # how long the client can be served without it
    late: bool  # its SLO is lost already
    paced: bool  # the client gets tokens at the SLO's pace
    reload_s: float
    arrival_s: float
    tokens: int


def ahead(
    candidates: Sequence[Candidate], step_s: float, pace_s: float, slack_s: float
) -> Candidate | None:
    """Whom to pause for an urgent request of pace ``pace_s`` that has ``slack_s`` left.

    Somebody already late, else who is furthest ahead; only with paced delivery, only no
    stricter than the urgent one, and only who stays ahead of its client and of the urgent
    one by twice its reload and some steps.
    """
    able = [c for c in candidates if c.paced and c.pace_s >= pace_s]
    late = [c for c in able if c.late]
    if late:
        return max(late, key=lambda c: (c.pace_s, -c.deposit_s, c.arrival_s))
    best = max(able, key=lambda c: (c.deposit_s, c.arrival_s), default=None)
    if best is None:
        return None
    needed = RELOAD_MARGIN * best.reload_s + URGENT_STEPS * step_s
    if best.deposit_s <= needed or best.deposit_s - max(0.0, slack_s) <= needed:
        return None
    return best


def overflowing(candidates: Sequence[Candidate], victim: str) -> Candidate | None:
    """Whom to pause when those that decode have outgrown memory.

    ``ahead``: a loose request before a strict one, the late, then the furthest ahead;
    ``newest``; ``longest``: the authors' choice.
    """
    keys = {
        "ahead": lambda c: (math.isinf(c.pace_s), c.late, c.deposit_s, c.arrival_s),
        "newest": lambda c: c.arrival_s,
        "longest": lambda c: (c.tokens, c.arrival_s),
    }
    return max(candidates, key=keys[victim], default=None)


# --- ordering -------------------------------------------------------------------


class Candidacy(NamedTuple):
    """A request that wants to decode: waiting for its prefill, or paused."""

    rid: str
    since_s: float  # waiting or paused
    arrival_s: float
    slack_s: float  # deadline minus what it takes to get going; infinite: no deadline
    pages: int  # of all layers, once it decodes
    paused: bool
    owed: bool  # set aside although its client sees the stall: comes before newcomers
    read: int = 0  # pages that it adds to what a step reads


def to_go_on(able: Candidate) -> tuple[float, bool]:
    """Slack of somebody whose client has tokens already, and whether it is owed the next."""
    if able.late:
        return -1.0, False
    if able.paced:
        return able.deposit_s - able.reload_s, False
    return (math.inf, False) if math.isinf(able.pace_s) else (0.0, True)


def by_slack(wanting: Sequence[Candidacy], grants: int) -> list[Candidacy]:
    """Least slack first; who is late anyway comes last; nobody waits for ever.

    ``grants`` counts those started so far: every ``AGEING_SHARE``-th place goes to who has
    waited longest.
    """

    def key(c: Candidacy) -> tuple[int, float, float]:
        if c.owed:
            return 1, c.since_s, c.arrival_s
        return (3, c.arrival_s, 0.0) if c.slack_s < 0 else (2, c.slack_s, c.arrival_s)

    ordered = sorted(wanting, key=key)
    if ordered and grants % AGEING_SHARE == AGEING_SHARE - 1:
        oldest = min(ordered, key=lambda c: c.since_s)
        ordered.remove(oldest)
        ordered.insert(0, oldest)
    return ordered


def by_arrival(wanting: Sequence[Candidacy]) -> list[Candidacy]:
    """First come, first served; who is paused was served first."""
    return sorted(wanting, key=lambda c: (not c.paused, c.arrival_s))


class Prompt(NamedTuple):
    """One that waits for its prefill. Times in seconds."""

    rid: str
    due_s: float  # from now
    prefill_s: float


def late_in_line(prompts: Sequence[Prompt], busy_s: float) -> set[str]:
    """Who will be late when prompts are computed one behind the other, ``busy_s`` from now.

    As few as can be (Moore and Hodgson): by their deadlines, and where one would be late the
    longest so far gives way.
    """
    late: set[str] = set()
    taken: list[tuple[float, str]] = []
    ends = busy_s
    for prompt in sorted(prompts, key=lambda p: (p.due_s, p.rid)):
        takes = PREFILL_SLOWDOWN * prompt.prefill_s
        heapq.heappush(taken, (-takes, prompt.rid))
        ends += takes
        if ends > prompt.due_s:
            longest, rid = heapq.heappop(taken)
            ends += longest
            late.add(rid)
    return late


# --- admission ------------------------------------------------------------------


def committed_share(step_s: float, pace_s: float, paced: bool) -> float:
    """The share of the time that a request has to be in memory to meet its SLO."""
    return min(1.0, COMMITTED_MARGIN * step_s / pace_s) if paced and pace_s > 0 else 1.0


def sustained(
    pace_s: float, alone_s: float, another_s: float, prompt_s: float, waiting: int
) -> float:
    """How many may decode together and keep their pace while others come and go.

    A token of one takes a step, ``alone_s`` and ``another_s`` for each beside it, and its share
    of the prompts computed meanwhile: whoever ends is replaced by who waits, so each of ``n``,
    or of those ``waiting`` where they are fewer, costs every other ``prompt_s`` a token, the
    seconds of a prompt over the tokens of an output.
    """
    spare_s = pace_s - alone_s + another_s
    if another_s > 0 and spare_s >= (another_s + prompt_s) * waiting:
        return (spare_s - waiting * prompt_s) / another_s
    each_s = another_s + prompt_s
    return max(1.0, spare_s / each_s) if each_s > 0 else math.inf


def fits(used: float, wanted: int, room: float) -> bool:
    """Whether ``wanted`` pages fit beside those ``used``, or beside what on-time requests will
    need of memory in turns."""
    return used + wanted <= room


# --- chunks ---------------------------------------------------------------------


class Chunk(NamedTuple):
    """The next prefill step: at most ``tokens``, after ``every`` decode steps."""

    tokens: int
    every: int


def least_chunk(floor_s: float, token_s: float, page_size: int, max_tokens: int) -> int:
    """Tokens of the smallest chunk worth a forward pass, which takes ``floor_s`` at least."""
    worth = CHUNK_FLOORS * floor_s / token_s if token_s > 0 else 0.0
    least = max(MIN_CHUNK_TOKENS, math.ceil(worth))
    return min(max_tokens, -(-least // page_size) * page_size)


def chunk(
    gap_s: float,
    step_s: float,
    token_s: float,
    page_size: int,
    least: int,
    max_tokens: int,
    made_late: int,
    waiting: int,
) -> Chunk:
    """The largest chunk that fits the tightest gap left to those decoding.

    Behind the chunk comes a decode step, which has to fit as well. Where not even the ``least``
    does, one such chunk every few steps: the more requests it makes late (``made_late``) for
    each that waits (``waiting``), the more.
    """
    if math.isinf(gap_s):
        return Chunk(max_tokens, 1)
    fitting = int((CHUNK_SHARE * gap_s - step_s) / token_s) if token_s > 0 else max_tokens
    if fitting >= least:
        return Chunk(max(least, min(max_tokens, fitting // page_size * page_size)), 1)
    every = round(1 + made_late / max(1, waiting))
    return Chunk(least, max(1, min(MAX_STEPS_BETWEEN_CHUNKS, every)))


def sustained_chunk(
    spare_s: float,
    gap_s: float,
    floor_s: float,
    token_s: float,
    page_size: int,
    least: int,
    max_tokens: int,
) -> Chunk:
    """A chunk of prompts that are late anyway: those decoding stay on time for good.

    ``spare_s`` is what they can give away at every step, ``gap_s`` at once. Rather ``least``
    tokens less often than fewer: a forward pass takes ``floor_s`` at least.
    """
    now_s = min(spare_s, gap_s)
    if math.isinf(now_s):
        return Chunk(max_tokens, 1)
    fitting = int(now_s / token_s) // page_size * page_size if now_s >= floor_s else 0
    if fitting >= least:
        return Chunk(min(max_tokens, fitting), 1)
    takes_s = max(floor_s, least * token_s)
    every = math.ceil(takes_s / spare_s) if spare_s > 0 else MAX_STEPS_BETWEEN_CHUNKS
    return Chunk(least, min(MAX_STEPS_BETWEEN_CHUNKS, every))
