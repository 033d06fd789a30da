"""Estimates follow what is measured, outliers do not count, and drift is reported once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orbitflow_sglang.control.feedback import (
    CLIP,
    DRIFT_STEPS,
    ENOUGH_LINK_S,
    PREFILL_FLOORS,
    STEP_WEIGHT,
    Feedback,
)
from orbitflow_sglang.planner.cost_model import ComputeModel, Profile, TransferModel

pytestmark = pytest.mark.unit

LAYERS = 8
PROFILE = Profile(
    model="m",
    device="d",
    page_bytes=16_384,
    compute=ComputeModel(LAYERS, 1e-3, 1e-4, 1e-7, 1.0),
    h2d=TransferModel(1e-5, 1e-5, 1.0),
    d2h=TransferModel(1e-5, 2e-5, 1.0),
    prefill_tokens_per_s=4000.0,
)
STEP_S = PROFILE.compute.step_s(4, 10_000)
factors = st.floats(0.05, 20)


def decode(feedback: Feedback, factor: float, steps: int = 1, stall_s: float = 0.0) -> None:
    for _ in range(steps):
        feedback.decode_step(4, 10_000, factor * STEP_S + stall_s, stall_s)


# --- estimates ----------------------------------------------------------------


def test_before_anything_was_measured_the_profile_holds() -> None:
    feedback = Feedback(PROFILE)
    assert feedback.compute_scale == 1
    assert feedback.compute_s(4, 10_000) == pytest.approx(STEP_S)
    assert feedback.page_transfer_s == PROFILE.h2d.per_page_s
    assert feedback.h2d_bytes_per_s == pytest.approx(16_384 / 1e-5)
    assert feedback.prefill_s(2000) == pytest.approx(0.5)
    assert feedback.prefill_s(2000, 50_000) == pytest.approx(0.5)
    assert not feedback.take_drift()


def test_a_step_beside_copies_can_only_lower_the_estimate() -> None:
    feedback = Feedback(PROFILE)
    for factor in [2.0] * 6 * DRIFT_STEPS:
        feedback.decode_step(4, 10_000, factor * STEP_S, beside_copies=True)
    assert feedback.compute_scale == 1 and not feedback.take_drift()
    assert feedback.step_s(4, 10_000) == pytest.approx(2 * STEP_S, rel=0.1)  # what is to come
    feedback.decode_step(4, 10_000, 0.5 * STEP_S, beside_copies=True)
    assert feedback.compute_scale < 1


@given(factors)
def test_a_lasting_change_is_followed_to_its_end(factor: float) -> None:
    feedback = Feedback(PROFILE)
    decode(feedback, factor, 150)
    assert feedback.compute_scale == pytest.approx(factor, rel=0.01)
    # Of every batch, not only of the one that was measured.
    expected = factor * PROFILE.compute.step_s(1, 500)
    assert feedback.compute_s(1, 500) == pytest.approx(expected, rel=0.01)


@given(factors, st.floats(0, 1))
def test_time_spent_waiting_for_pages_is_not_compute(factor: float, stall_s: float) -> None:
    feedback, without = Feedback(PROFILE), Feedback(PROFILE)
    decode(feedback, factor, 5, stall_s)
    decode(without, factor, 5)
    assert feedback.compute_scale == pytest.approx(without.compute_scale, rel=1e-6)


@given(st.floats(1e-4, 1e4))
def test_one_outlier_moves_the_estimate_by_a_bounded_factor(factor: float) -> None:
    feedback = Feedback(PROFILE)
    decode(feedback, factor)
    most = CLIP**STEP_WEIGHT
    assert 1 / most - 1e-9 <= feedback.compute_scale <= most + 1e-9


@settings(max_examples=60)
@given(st.lists(factors, min_size=1, max_size=60))
def test_an_estimate_stays_within_what_it_has_seen(seen: list[float]) -> None:
    feedback = Feedback(PROFILE)
    for factor in seen:
        decode(feedback, factor)
    assert min(1, *seen) * (1 - 1e-9) <= feedback.compute_scale <= max(1, *seen) * (1 + 1e-9)


@settings(max_examples=40)
@given(st.lists(st.floats(0.8, 1.25), min_size=50, max_size=100), st.integers(5, 20))
def test_hiccups_now_and_then_hardly_count(noise: list[float], every: int) -> None:
    calm, disturbed = Feedback(PROFILE), Feedback(PROFILE)
    for number, factor in enumerate(noise):
        decode(calm, factor)
        decode(disturbed, 100 * factor if number % every == 0 else factor)
    # At most the sum of a falling series of clipped samples.
    most = CLIP ** (1.6 * STEP_WEIGHT / (1 - (1 - STEP_WEIGHT) ** every))
    assert disturbed.compute_scale <= calm.compute_scale * most


@given(st.floats(1e-7, 1e-2), st.integers(1, 500))
def test_the_link_follows_time_busy_for_pages_moved(page_s: float, pages: int) -> None:
    feedback = Feedback(PROFILE)
    updates = math.ceil(120 * max(1, ENOUGH_LINK_S / (page_s * pages)))
    for _ in range(min(updates, 20_000)):
        feedback.transfers(pages, pages * page_s)
    if updates <= 20_000:
        assert feedback.page_transfer_s == pytest.approx(page_s, rel=0.01)
        assert feedback.h2d_bytes_per_s == pytest.approx(16_384 / page_s, rel=0.01)


def test_little_that_was_moved_is_added_up_before_it_counts() -> None:
    feedback = Feedback(PROFILE)
    feedback.transfers(10, ENOUGH_LINK_S * 0.6)
    assert feedback.page_transfer_s == PROFILE.h2d.per_page_s
    feedback.transfers(10, ENOUGH_LINK_S * 0.6)
    assert feedback.page_transfer_s > PROFILE.h2d.per_page_s


LEAST_S = PREFILL_FLOORS * PROFILE.compute.step_s(1, 0)


@given(st.floats(LEAST_S, 100), st.integers(64, 4096), st.integers(0, 100_000))
def test_prefill_follows_chunks(seconds: float, tokens: int, context: int) -> None:
    feedback = Feedback(PROFILE)
    for _ in range(120):
        feedback.prefill_chunk(tokens, seconds, context)
    assert feedback.prefill_s(tokens, context) == pytest.approx(seconds, rel=0.01)


def test_a_chunk_that_any_forward_pass_takes_as_long_as_says_nothing() -> None:
    feedback = Feedback(PROFILE)
    before = feedback.prefill_s(1000)
    for _ in range(60):
        feedback.prefill_chunk(160, 1.9 * feedback.compute_s(1, 0))
        feedback.prefill_chunk(1, 10.0)  # a health check, and a hiccup
    assert feedback.prefill_s(1000) == before


def test_prefill_behind_a_long_context_has_an_estimate_of_its_own() -> None:
    feedback = Feedback(PROFILE)
    for _ in range(40):
        feedback.prefill_chunk(512, 512 / 4000, 0)
        feedback.prefill_chunk(512, 512 / 400, 40_000)
    assert feedback.prefill_s(512) == pytest.approx(512 / 4000, rel=0.01)
    assert feedback.prefill_s(512, 41_000) == pytest.approx(512 / 400, rel=0.01)
    assert feedback.prefill_s(512, 60_000) == pytest.approx(512 / 400, rel=0.01), "the nearest"
    assert feedback.prefill_s(512, 2000) == pytest.approx(512 / 4000, rel=0.01)


def test_without_a_known_prefill_rate_the_first_chunk_gives_it() -> None:
    feedback = Feedback(Profile("m", "d", 1, PROFILE.compute, PROFILE.h2d, PROFILE.d2h))
    assert feedback.prefill_s(100) == pytest.approx(100 * feedback.compute_s(1, 50))
    feedback.prefill_chunk(100, 2.0)
    assert feedback.prefill_s(50) == pytest.approx(1.0)


def test_a_profile_without_times_does_not_divide_by_zero() -> None:
    nothing = TransferModel(0.0, 0.0, 1.0)
    feedback = Feedback(
        Profile("m", "d", 64, ComputeModel(8, 0.0, 0.0, 0.0, 1.0), nothing, nothing, 0.0)
    )
    decode(feedback, 1.0, 20)
    assert feedback.compute_s(4, 100) == 0
    assert feedback.page_transfer_s == 0 and feedback.h2d_bytes_per_s is None
    assert feedback.prefill_s(10) == 0
    feedback.transfers(10, 0.01)
    assert feedback.page_transfer_s == pytest.approx(0.001)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_senseless_samples_are_left_out(seconds: float) -> None:
    feedback = Feedback(PROFILE)
    for _ in range(20):
        feedback.decode_step(4, 10_000, seconds)
        feedback.decode_step(4, 10_000, 0.1, stall_s=0.2)
        feedback.transfers(100, seconds)
        feedback.transfers(0, 1.0)
        feedback.prefill_chunk(100, seconds)
        feedback.prefill_chunk(0, 1.0)
    assert feedback.compute_scale == 1
    assert feedback.page_transfer_s == PROFILE.h2d.per_page_s
    assert feedback.prefill_s(4000) == pytest.approx(1)
    assert feedback.drifts == 0


def test_switched_off_everything_stays_as_profiled() -> None:
    feedback = Feedback(PROFILE, enabled=False)
    decode(feedback, 3.0, 50)
    for _ in range(50):
        feedback.transfers(100, 1.0)
        feedback.prefill_chunk(100, 1.0)
    assert feedback.compute_scale == 1
    assert feedback.compute_s(4, 10_000) == pytest.approx(STEP_S)
    assert feedback.page_transfer_s == PROFILE.h2d.per_page_s
    assert feedback.prefill_s(4000) == pytest.approx(1)
    assert not feedback.take_drift() and feedback.drifts == 0


# --- drift --------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.3, 5.0, 0.7, 0.1])
def test_steps_that_stay_off_are_reported_once(factor: float) -> None:
    feedback = Feedback(PROFILE)
    decode(feedback, factor, DRIFT_STEPS - 1)
    assert not feedback.take_drift()
    decode(feedback, factor)
    assert feedback.take_drift()
    assert not feedback.take_drift()


def test_after_a_drift_its_estimates_are_what_later_steps_are_held_against() -> None:
    feedback = Feedback(PROFILE)
    decode(feedback, 1.5, 200)
    while feedback.take_drift():
        pass
    before = feedback.drifts
    assert before >= 1
    decode(feedback, 1.5, 50)
    assert feedback.drifts == before, "1.5 is what is expected by now"
    decode(feedback, 1.0, DRIFT_STEPS)
    assert feedback.take_drift(), "and it would be noticed again"


@settings(max_examples=60)
@given(st.lists(st.sampled_from([1.0, 1.15, 0.85, 1.6, 0.5]), max_size=60))
def test_drift_means_so_many_steps_off_in_a_row_in_one_direction(seen: list[float]) -> None:
    feedback = Feedback(PROFILE)
    longest = run = 0
    for factor in seen:
        sign = (factor > 1.2) - (factor < 0.8)
        run = run + sign if run * sign > 0 else sign
        longest = max(longest, abs(run))
        decode(feedback, factor)
        if longest < DRIFT_STEPS:
            assert not feedback.take_drift()
    if longest >= DRIFT_STEPS:
        assert feedback.drifts >= 1


def test_a_step_as_expected_in_between_starts_the_count_again() -> None:
    feedback = Feedback(PROFILE)
    for _ in range(10):
        decode(feedback, 1.5, DRIFT_STEPS - 1)
        decode(feedback, 1.0)
    assert feedback.drifts == 0


@pytest.mark.parametrize("settle", [lambda f: f.planned(), lambda f: f.take_drift()])
def test_a_new_plan_takes_the_present_estimates_for_granted(
    settle: Callable[[Feedback], object],
) -> None:
    feedback = Feedback(PROFILE)
    decode(feedback, 1.4, DRIFT_STEPS)
    settle(feedback)
    assert not feedback.take_drift()
    decode(feedback, 1.4, 60)
    feedback.planned()
    drifts = feedback.drifts
    decode(feedback, 1.4, 60)
    assert feedback.drifts == drifts
