"""Hypothesis profiles: a reproducible one by default, HYPOTHESIS_PROFILE=long to search on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "residency",
    max_examples=300 if os.environ.get("ORBITFLOW_TEST_FULL") == "1" else 150,
    stateful_step_count=40,
    suppress_health_check=SLOW,
)
settings.register_profile(
    "long",
    derandomize=False,
    max_examples=3000,
    stateful_step_count=80,
    print_blob=True,
    suppress_health_check=SLOW,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
