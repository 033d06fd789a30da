"""SLO targets of requests, the tokens due and the deposit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbitflow_sglang.slo import PACE, SLO, SLOError, request_slo

pytestmark = pytest.mark.unit

seconds = st.floats(1e-4, 1e3)
targets = st.none() | seconds


@st.composite
def slos(draw: st.DrawFn) -> SLO:
    return SLO(draw(targets), draw(targets), draw(targets), draw(st.booleans()))


# --- parameters of a request --------------------------------------------------


@pytest.mark.parametrize("custom_params", [None, {}, {"other": 1}, "text", [1]])
def test_a_request_without_our_key_has_the_targets_of_the_server(custom_params: object) -> None:
    default = SLO(1.0, 0.1, 0.2, True)
    assert request_slo(custom_params, default) is default


def test_what_a_request_gives_wins_and_the_rest_is_the_servers() -> None:
    default = SLO(1.0, 0.1, None, True)
    own = {"tpot_slo_ms": 50, "tbt_slo_ms": 250.0, "deposit": False}
    assert request_slo({"orbitflow": own}, default) == SLO(1.0, 0.05, 0.25, False)


@pytest.mark.parametrize("key", ["ttft_slo_ms", "tpot_slo_ms", "tbt_slo_ms"])
@pytest.mark.parametrize(
    "value",
    [0, 1e-322, -1, 1e308, 10**400, float("nan"), float("inf"), True, "50", None, [50], {"ms": 50}],
)
def test_a_target_that_is_no_number_above_0_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(SLOError, match=rf"^custom_params\.orbitflow\.{key} must be a number"):
        request_slo({"orbitflow": {key: value}}, SLO())


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_deposit_that_is_neither_true_nor_false_is_refused(value: Any) -> None:
    with pytest.raises(SLOError, match=r"^custom_params\.orbitflow\.deposit must be true or"):
        request_slo({"orbitflow": {"deposit": value}}, SLO())


def test_an_unknown_key_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(SLOError, match=r"orbitflow\.tpot_ms: no such key; .*tpot_slo_ms.*deposit"):
        request_slo({"orbitflow": {"tpot_ms": 50}}, SLO())


@pytest.mark.parametrize("value", [None, 50, "fast", [{"tpot_slo_ms": 50}]])
def test_anything_but_an_object_is_refused(value: Any) -> None:
    with pytest.raises(SLOError, match=r"^custom_params\.orbitflow must be an object"):
        request_slo({"orbitflow": value}, SLO())


@given(slos(), st.dictionaries(st.sampled_from(("ttft", "tpot", "tbt")), seconds))
def test_each_target_is_read_from_its_own_key(default: SLO, given_s: dict[str, float]) -> None:
    own = {f"{name}_slo_ms": value * 1e3 for name, value in given_s.items()}
    slo = request_slo({"orbitflow": own}, default)
    for name in ("ttft", "tpot", "tbt"):
        expected = given_s.get(name, getattr(default, f"{name}_s"))
        assert getattr(slo, f"{name}_s") == pytest.approx(expected)
    assert slo.deposit == default.deposit


# --- tokens due and deposit ---------------------------------------------------


@given(slos())
def test_the_pace_is_the_smaller_of_the_tpot_and_tbt_targets(slo: SLO) -> None:
    given_s = [target for target in (slo.tpot_s, slo.tbt_s) if target is not None]
    assert slo.pace_s == (min(given_s) if given_s else None)


@given(slos(), st.integers(1, 10_000))
def test_at_the_time_a_token_is_due_that_many_are(slo: SLO, token: int) -> None:
    if slo.pace_s is None:
        assert slo.due_tokens(1e6) == 0
    else:
        assert slo.due_tokens((token - 1) * slo.pace_s) == pytest.approx(token)


@given(slos(), st.integers(1, 10_000), seconds, seconds)
def test_the_deposit_falls_with_time_and_grows_with_tokens(
    slo: SLO, generated: int, since_s: float, more_s: float
) -> None:
    deposit = slo.deposit_tokens(generated, since_s)
    assert slo.deposit_tokens(generated, since_s + more_s) <= deposit
    if slo.pace_s is not None:
        assert slo.deposit_tokens(generated + 1, since_s) == pytest.approx(deposit + 1)


def test_there_is_no_deposit_without_a_pace_or_before_the_first_token() -> None:
    assert SLO(ttft_s=1.0).deposit_tokens(10, 1.0) == 0
    assert SLO(tpot_s=1.0).deposit_tokens(0, 0.0) == 0
    assert SLO(tpot_s=1.0).deposit_tokens(1, 0.0) == 0
    assert SLO(tpot_s=1.0).deposit_tokens(1, 2.5) == -2.5


@given(slos(), st.integers(1, 10_000))
def test_tokens_are_released_before_they_are_due_and_in_order(slo: SLO, token: int) -> None:
    assert slo.release_s(1) == 0
    assert slo.release_s(token) <= slo.release_s(token + 1)
    if slo.pace_s is not None:
        assert slo.release_s(token) == pytest.approx((token - 1) * PACE * slo.pace_s)
        assert slo.release_s(token) <= (token - 1) * slo.pace_s
