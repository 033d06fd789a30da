"""What is measured fits the room there is, tells enough, and takes bounded time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded

from orbitflow_sglang.planner.cost_model import DecodeSample, fit_compute
from orbitflow_sglang.planner.measuring import (
    STEPS,
    DecodePoint,
    Room,
    decode_points,
    prefill_tokens,
    transfer_counts,
)

ROOM = Room(
    extents=112, tokens=8000, page_size=16, context_tokens=65_536, requests=64, most_tokens=16_384
)
rooms = st.builds(
    Room,
    extents=st.integers(1, 5000),
    tokens=st.integers(1, 100_000),
    page_size=st.sampled_from([1, 2, 16, 64]),
    context_tokens=st.integers(1, 70_000),
    requests=st.integers(1, 64),
    most_tokens=st.sampled_from([1 << 14, 1 << 18]),
)


@seeded(300)
@given(rooms)
def test_every_point_fits_the_room(room: Room) -> None:
    points = decode_points(room)
    assert len(set(points)) == len(points)
    for point in points:
        end = point.context + STEPS
        assert point.batch <= room.requests
        assert end <= room.context_tokens
        assert point.batch * point.context <= room.most_tokens
        assert point.batch * (end + room.page_size) <= room.tokens
        # All pages of each request; the one being written counts twice; one is kept free.
        pages = -(-end // room.page_size)
        assert point.batch * (pages + 2) <= room.extents


@seeded(200)
@given(rooms)
def test_a_prefill_fits_where_a_decode_step_does(room: Room) -> None:
    tokens = prefill_tokens(room, 512)
    assert tokens <= 512
    assert (tokens > 0) == bool(decode_points(room))
    assert tokens == 0 or tokens <= max(p.context for p in decode_points(room) if p.batch == 1)


def test_points_span_batches_and_contexts_and_the_first_ones_suffice() -> None:
    points = decode_points(ROOM)
    assert {point.batch for point in points} == {1, 2, 4, 8}
    assert points[0] == DecodePoint(1, 1024)
    assert {point.batch for point in points[:4]} == {1, 8}
    samples = [
        DecodeSample(p.batch, p.batch * p.context, 8 * (1e-3 + 1e-4 * p.batch + 1e-7 * p.context))
        for p in points[:4]
    ]
    assert fit_compute(samples, 8).constant_s == pytest.approx(1e-3, rel=0.1)


def test_a_slightly_larger_arena_is_measured_at_the_same_points() -> None:
    larger = replace(ROOM, extents=115, tokens=8200)
    assert decode_points(larger) == decode_points(ROOM)


def test_a_small_arena_has_three_points_and_one_without_room_has_none() -> None:
    assert len(decode_points(replace(ROOM, extents=5))) >= 3
    assert decode_points(replace(ROOM, extents=2)) == []


@seeded(200)
@given(st.integers(0, 10_000), st.integers(1024, 1 << 20), st.none() | st.floats(1e5, 1e11))
def test_transfers_fit_and_are_of_two_sizes_at_least(
    pages: int, page_bytes: int, link: float | None
) -> None:
    counts = transfer_counts(pages, page_bytes, link)
    if pages < 2:
        assert counts == []
        return
    assert len(counts) >= 2 and counts == sorted(set(counts))
    assert counts[-1] <= pages
    assert counts[-1] <= 4 or counts[-1] * page_bytes <= 1 << 26


def test_a_slow_link_is_not_timed_with_long_transfers() -> None:
    fast = transfer_counts(10_000, 16_384, None)
    slow = transfer_counts(10_000, 16_384, 0.05e9)
    assert fast[-1] * 16_384 == 1 << 26
    assert slow[-1] * 16_384 / 0.05e9 <= 0.04
