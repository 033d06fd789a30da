from __future__ import annotations

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded

from orbitflow_sglang.planner.cost_model import (
    ComputeModel,
    DecodeSample,
    Profile,
    TransferModel,
    TransferSample,
    fit_compute,
    fit_transfer,
)

BATCHES, CONTEXTS = (1, 2, 4, 8), (500, 4000, 16000, 64000)


def samples(constant: float, request: float, token: float, layers: int) -> list[DecodeSample]:
    return [
        DecodeSample(batch, context, layers * (constant + request * batch + token * context))
        for batch in BATCHES
        for context in CONTEXTS
    ]


@seeded(60)
@given(st.floats(1e-5, 1e-3), st.floats(1e-7, 1e-4), st.floats(1e-10, 1e-7))
def test_exact_samples_give_back_the_coefficients(
    constant: float, request: float, token: float
) -> None:
    fitted = fit_compute(samples(constant, request, token, 32), 32)
    assert fitted.r2 == pytest.approx(1)
    for batch, context in ((3, 10_000), (16, 100_000)):
        expected = 32 * (constant + request * batch + token * context)
        assert fitted.step_s(batch, context) == pytest.approx(expected, rel=1e-4)


def test_a_few_disturbed_samples_do_not_count() -> None:
    rng = np.random.default_rng(0)
    clean = samples(3e-4, 1e-5, 1e-8, 32)
    noisy = [
        DecodeSample(s.batch, s.context_tokens, s.step_s * rng.normal(1, 0.01)) for s in clean * 3
    ]
    for row in (3, 17, 30):
        bad = noisy[row]
        noisy[row] = DecodeSample(bad.batch, bad.context_tokens, bad.step_s * 10)
    fitted = fit_compute(noisy, 32)
    expected = 32 * (3e-4 + 4e-5 + 2e-4)
    assert fitted.step_s(4, 20_000) == pytest.approx(expected, rel=0.02)
    assert fitted.r2 < 0.5, "R^2 is of all samples, the disturbed ones too"


def test_a_transfer_has_a_constant_and_a_rate() -> None:
    fitted = fit_transfer([TransferSample(n, 2e-5 + 3e-6 * n) for n in (1, 4, 16, 64, 256)])
    assert fitted.setup_s == pytest.approx(2e-5, rel=1e-4)
    assert fitted.per_page_s == pytest.approx(3e-6, rel=1e-4)
    assert fitted.seconds(0) == 0
    assert fitted.seconds(10) == pytest.approx(5e-5, rel=1e-4)


def test_no_coefficient_is_negative() -> None:
    fitted = fit_transfer([TransferSample(1, 1e-6), TransferSample(100, 5e-4)])
    assert fitted.setup_s >= 0 and fitted.per_page_s > 0


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="three decode samples"):
        fit_compute(samples(1, 1, 1, 2)[:2], 2)
    with pytest.raises(ValueError, match="two transfer samples"):
        fit_transfer([TransferSample(1, 1.0)])


PROFILE = Profile(
    model="tiny",
    device="cpu",
    page_bytes=8192,
    compute=ComputeModel(12, 1e-4, 1e-5, 1e-8, 0.99),
    h2d=TransferModel(1e-5, 2e-6, 1.0),
    d2h=TransferModel(1e-5, 3e-6, 1.0),
    prefill_tokens_per_s=2000.0,
)


def test_a_profile_read_back_is_the_same() -> None:
    assert Profile.load(PROFILE.dump()) == PROFILE


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("version", 2, "version"),
        ("page_bytes", 1.5, "page_bytes"),
        ("page_bytes", ..., "page_bytes"),
        ("model", 3, "model"),
        ("extra", 3, "extra"),
        ("compute", 3, "compute"),
        ("compute.constant_s", -1, "compute.constant_s"),
        ("compute.layers", "x", "compute.layers"),
        ("h2d.per_page_s", ..., "h2d.per_page_s"),
        ("d2h.more", 1, "d2h.more"),
        ("prefill_tokens_per_s", -2, "prefill_tokens_per_s"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_key(path: str, value: object, named: str) -> None:
    values = orjson.loads(PROFILE.dump())
    at, *keys = values, *path.split(".")
    for key in keys[:-1]:
        at = at[key]
    if value is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    with pytest.raises(ValueError, match=f"^{named}: "):
        Profile.load(orjson.dumps(values))
