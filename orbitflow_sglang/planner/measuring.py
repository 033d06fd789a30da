"""Which batches and transfers are worth timing for a cost profile, within the room there is.

The points depend on sizes only, never on times: every rank of a server then measures the
same ones in the same order. Sizes are powers of two, so that a profile kept from an earlier
start still fits when the arena came out a little larger or smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCHES = (1, 8, 2, 4)  # the ends first: measuring may be cut short
CONTEXT_RATIO = 16  # between the contexts that are measured with one batch
CONTEXTS_PER_BATCH = 3
ROUNDS = 2  # visits to each point
STEPS = 4  # of each visit, the first one not counted
TRANSFER_RATIO = 4
MAX_TRANSFER_BYTES = 1 << 26
EMULATED_TRANSFER_S = 0.04  # a slow link is known by its rate: no long transfer is needed


@dataclass(frozen=True)
class Room:
    """What the measured requests may take."""

    extents: int  # pages that can be resident in every layer
    tokens: int  # token slots
    page_size: int
    context_tokens: int  # of one request
    requests: int
    most_tokens: int  # of all requests, to bound the time it takes


@dataclass(frozen=True)
class DecodePoint:
    """Decode steps of ``batch`` requests that begin with ``context`` tokens each."""

    batch: int
    context: int


def decode_points(room: Room) -> list[DecodePoint]:
    """The points to measure, those that tell most first; empty without room for any."""
    by_batch = []
    for batch in BATCHES:
        largest = _largest_context(room, batch)
        if largest < 1:
            continue
        # A small arena leaves room for small steps only; three points are the least to fit.
        ratio = CONTEXT_RATIO if largest >= CONTEXT_RATIO**2 else 2
        contexts = [largest // ratio**power for power in range(CONTEXTS_PER_BATCH)]
        by_batch.append([DecodePoint(batch, context) for context in contexts if context])
    ends = [point for points in by_batch[:2] for point in (points[0], points[-1])]
    rest = [point for points in by_batch for point in points]
    return list(dict.fromkeys([*ends, *rest]))


def _largest_context(room: Room, batch: int) -> int:
    """The power of two that ``batch`` requests can each begin with; 0 when there is none."""
    if batch > room.requests:
        return 0
    # Placement counts the page being written twice, and keeps one more free for each request.
    pages = (room.extents - 1) // batch - 2
    tokens = min(
        pages * room.page_size - STEPS,
        room.tokens // batch - 2 * room.page_size - STEPS,
        room.context_tokens - STEPS,
        room.most_tokens // batch,
    )
    return 1 << (tokens.bit_length() - 1) if tokens > 0 else 0


def prefill_tokens(room: Room, chunk: int) -> int:
    """The chunk of a prompt to time: at most ``chunk``, a power of two; 0 without room."""
    largest = _largest_context(room, 1)
    tokens = min(chunk, largest)
    return 1 << (tokens.bit_length() - 1) if tokens > 0 else 0


def transfer_counts(pages: int, page_bytes: int, link_bytes_per_s: float | None) -> list[int]:
    """Pages of the transfers to time, ascending, where ``pages`` are free on both sides."""
    most_bytes = float(MAX_TRANSFER_BYTES)
    if link_bytes_per_s is not None:
        most_bytes = min(most_bytes, EMULATED_TRANSFER_S * link_bytes_per_s)
    most = min(pages, max(TRANSFER_RATIO, int(most_bytes // page_bytes)))
    counts = [1]
    while counts[-1] * TRANSFER_RATIO <= most:
        counts.append(counts[-1] * TRANSFER_RATIO)
    if most > counts[-1]:
        counts.append(most)
    return counts if pages >= 2 else []
