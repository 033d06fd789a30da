"""Fixtures of the tests that start real servers."""

from __future__ import annotations

import pytest
from servers import Stock


@pytest.fixture(scope="session")
def stock() -> Stock:
    """Answers of stock SGLang, each asked for once a session."""
    return Stock()
